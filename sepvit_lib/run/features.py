"""Features of a frozen network, computed once and kept in memory, to train only its classifier on them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from sepvit_lib.common.processes import all_gather, get_rank, get_world_size
from sepvit_lib.common.randomness import SampleIndex
from sepvit_lib.pipeline.samples import ImageData, TrainSamples

MAX_BYTES = 2 << 30  # of all features; each process keeps them


class FeatureSamples(TrainSamples):
    """Training samples with features in place of images.

    Args:
        data: the images.
        rows: features (C values), target, and unreadable images as text (`Replacements.take`) of each sample.
    """

    def __init__(self, data: ImageData, rows: Sequence[tuple[np.ndarray, Any, str]]) -> None:
        super().__init__(data)
        self.rows = rows

    def __getitem__(self, sample: SampleIndex) -> tuple[Any, Any, str]:
        """Return features, target, and the unreadable images that the image replaces, as text."""
        return self.rows[sample.index]


def compute_features(
    data: ImageData, seed: int, features_of: Callable[[Any], Tensor], tick: Callable[[str], None], **loading: Any
) -> FeatureSamples:
    """Compute the features of all training images, which must not be augmented. A collective call.

    Args:
        data: the images.
        seed: the run's seed.
        features_of: computes features, B × C, from a loaded batch of images.
        tick: called with the position after each batch.
        **loading: arguments of the `DataLoader`.

    Raises:
        UserError: too many consecutive images are unreadable.
    """
    samples, own = TrainSamples(data, seed), range(get_rank(), len(data), get_world_size())
    order: Any = [SampleIndex(0, index, index) for index in own]
    rows: list[tuple[np.ndarray, Any, str]] = []
    for images, targets, unreadable in DataLoader(samples, sampler=order, **loading):
        rows += zip(features_of(images).float().cpu().numpy(), targets.numpy(), unreadable)
        tick(f"features of {len(rows)} images")
    gathered = all_gather([rows])
    return FeatureSamples(data, [gathered[i % len(gathered)][i // len(gathered)] for i in range(len(data))])
