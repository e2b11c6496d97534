"""SepViT's dense form from a checkpoint of a whole segmentor or detector, read without their libraries."""

import pickle
from dataclasses import dataclass
from typing import Any

import torch

from sepvit import SepViTDense, create_dense, entries_under, variant_of
from sepvit_lib.training import checkpoints
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.images import EXIF, orientation_for
from sepvit_lib.training.networks import place


class _Log:
    """Stands for mmengine's `HistoryBuffer`, in which its checkpoints keep the log, which nobody reads here."""


def _log_statistic(owner: type, name: str) -> str:
    """Stands for `getattr`, by which mmengine's log refers to methods of `HistoryBuffer`.

    Raises:
        pickle.UnpicklingError: anything else is requested.
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
        variant: its name, such as SepViT_Tiny.
        network: the network, in evaluation mode.
        orientation: 'exif' to turn images upright, or 'stored'.
    """

    variant: str
    network: SepViTDense
    orientation: str = EXIF


def load_backbone(path: str, what: str, averaged: bool = False) -> Backbone | None:
    """Load the backbone of a segmentor or detector, or a backbone alone.

    Args:
        path: path or https address of a checkpoint of mmengine, or of bare weights.
        what: flag and path, for messages.
        averaged: take the averaged weights.

    Returns:
        the backbone; None if the checkpoint holds no dense form.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint, would run code, or its weights do not fit.
    """
    checkpoint: dict[str, Any] = checkpoints.read_checkpoint(path, what, LOG_CLASSES)
    weights = checkpoints.weights_of(checkpoint, what, prefer_ema=averaged)
    own = entries_under(weights, "backbone") or weights
    variant = variant_of(own)
    if variant is None or not any(name.startswith("norm_list.") for name in own):  # which only the dense form has
        return None
    if averaged and not checkpoints.has_averaged_weights(checkpoint):
        raise UserError(f"{what}: has no averaged weights; take the others")
    network = create_dense(variant)
    checkpoints.load_weights(network, own, what, variant_hint="name another checkpoint")
    place(network, torch.device("cpu")).eval()
    return Backbone(variant, network, orientation_for(checkpoint.get("reading")))
