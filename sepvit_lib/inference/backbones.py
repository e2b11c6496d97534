"""Load SepViT's dense form from a checkpoint of a segmentor or detector, without mmseg and mmdet."""

import pickle
from dataclasses import dataclass
from typing import Any

import torch

from sepvit import SepViTDense, create_dense, entries_under, settings_of, variant_of
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.networks import to_device
from sepvit_lib.pipeline.image_files import EXIF, orientation_for
from sepvit_lib.run import checkpoints


class _Log:
    """Placeholder for mmengine's `HistoryBuffer`, the class of the logs in its checkpoints. The logs are not used."""


def _log_statistic(owner: type, name: str) -> str:
    """Placeholder for `getattr`, through which a pickled `HistoryBuffer` refers to its methods.

    Raises:
        pickle.UnpicklingError: an attribute of any other class is requested.
    """
    if owner is _Log:
        return name
    raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name}")


LOG_CLASSES = (
    (_Log, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_log_statistic, "builtins.getattr"),
    *checkpoints.NUMPY_CLASSES,
)


@dataclass(frozen=True)
class Backbone:
    """SepViT's dense form with trained weights.

    Attributes:
        variant: name of the variant, such as SepViT_Tiny.
        network: the network, in evaluation mode.
        orientation: 'exif' to turn images upright, or 'stored' to keep them as stored.
    """

    variant: str
    network: SepViTDense
    orientation: str = EXIF


def load_backbone(path: str, what: str, averaged: bool = False) -> Backbone | None:
    """Load a SepViT backbone from a checkpoint of a segmentor or detector, or from a checkpoint of the backbone alone.

    Args:
        path: path or https address of an mmengine checkpoint or of bare weights.
        what: flag and path, for messages.
        averaged: use the averaged weights.

    Returns:
        the backbone; None if the checkpoint contains no SepViT in dense form.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint, it contains code or no averaged weights, or its
            weights do not fit.
    """
    checkpoint: dict[str, Any] = checkpoints.read_checkpoint(path, what, LOG_CLASSES)
    weights = checkpoints.weights_of(checkpoint, what, prefer_ema=averaged)
    own = entries_under(weights, "backbone") or weights
    variant = variant_of(own)
    if variant is None or not any(name.startswith("norm_list.") for name in own):  # only in the dense form
        return None
    if averaged and not checkpoints.has_averaged_weights(checkpoint):
        raise UserError(f"{what}: has no averaged weights; omit {setting('averaged')}")
    network = create_dense(variant, **(settings_of(own) or {}))
    checkpoints.load_weights(network, own, what, variant_hint="choose another checkpoint")
    to_device(network, torch.device("cpu")).eval()
    return Backbone(variant, network, orientation_for(checkpoint.get("reading")))
