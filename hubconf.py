"""Entry points for torch.hub: `torch.hub.load(DIR, 'SepViT_Tiny', source='local')`.

This file imports only torch, timm and sepvit.py. While torch.hub loads it, DIR is first on sys.path, and other modules
of this repository (`utils`, `datasets`, …) could shadow those of the calling program.
"""

import argparse
import contextlib
import typing

import timm
import torch
from torch import nn

import sepvit

dependencies = ["torch", "timm"]


def SepViT_Lite(checkpoint: str = "", **kwargs: typing.Any) -> nn.Module:
    """SepViT-Lite: 3.7 M parameters, 0.57 G multiply-adds at 224 × 224; arguments as for `SepViT_Tiny`."""
    return _classifier("SepViT_Lite", checkpoint, kwargs)


def SepViT_Tiny(checkpoint: str = "", **kwargs: typing.Any) -> nn.Module:
    """SepViT-T: 31.2 M parameters, 4.5 G multiply-adds at 224 × 224.

    Args:
        checkpoint: file with the weights: a checkpoint of main.py or of the published code, a state dict, or
            safetensors. Averaged weights are preferred. Without a checkpoint, weights are random.
        **kwargs: as for timm's `create_model`: `num_classes` (1000), `img_size` (224, or height and width),
            `drop_path_rate`, …

    Returns:
        the network, which computes logits, B × classes, from normalised images, B × 3 × H × W.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RuntimeError: loading the file would run code, or its weights do not fit.
    """
    return _classifier("SepViT_Tiny", checkpoint, kwargs)


def SepViT_Small(checkpoint: str = "", **kwargs: typing.Any) -> nn.Module:
    """SepViT-S: 46.6 M parameters, 7.5 G multiply-adds at 224 × 224; arguments as for `SepViT_Tiny`."""
    return _classifier("SepViT_Small", checkpoint, kwargs)


def SepViT_Base(checkpoint: str = "", **kwargs: typing.Any) -> nn.Module:
    """SepViT-B: 82.4 M parameters, 13.1 G multiply-adds at 224 × 224; arguments as for `SepViT_Tiny`."""
    return _classifier("SepViT_Base", checkpoint, kwargs)


def sepvit_dense(variant: str = "SepViT_Tiny", checkpoint: str = "", **kwargs: typing.Any) -> nn.Module:
    """The dense prediction form of a variant: feature maps with strides 4, 8, 16 and 32, from images of any size.

    Args:
        variant: 'SepViT_Lite', 'SepViT_Tiny', 'SepViT_Small' or 'SepViT_Base'.
        checkpoint: as for `SepViT_Tiny`. Weights that this form lacks, such as the classifier's, are dropped.
        **kwargs: as for `sepvit.SepViTDense`: `out_indices`, `drop_path_rate`, …

    Returns:
        the network, which computes feature maps, B × C × H' × W' each, from normalised images, B × 3 × H × W.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RuntimeError: loading the file would run code, or its weights do not fit.
        ValueError: the variant is unknown.
    """
    recorded = {name: value for name, value in _recorded(variant, checkpoint).items() if value != "learned"}
    return _loaded(sepvit.create_dense(variant, **{**recorded, **kwargs}), checkpoint)


def _classifier(variant: str, checkpoint: str, kwargs: dict[str, typing.Any]) -> nn.Module:
    return _loaded(timm.create_model(variant, **{**_recorded(variant, checkpoint), **kwargs}), checkpoint)


def _recorded(variant: str, checkpoint: str) -> dict[str, typing.Any]:
    """Arguments that the network in a checkpoint was built with, from its run or its state dict; {} if unknown."""
    with contextlib.suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # the weights are read later
        args, recorded = content.get("args", {}), sepvit.settings_of(content.get("model", content))
        if kwargs := (args if isinstance(args, dict) else vars(args)).get("model_kwargs"):
            return dict(kwargs)
        recorded = recorded if recorded and recorded != sepvit.default_settings(variant) else {}
        first = content.get("model", content).get("patch_embeds.0.proj.weight")
        return recorded if first is None or first.shape[1] == 3 else {**recorded, "in_chans": first.shape[1]}
    return {}  # loading the weights reports what is wrong with the file


def _loaded(network: nn.Module, checkpoint: str) -> nn.Module:
    """Load a network's weights, if a checkpoint is given. No code in the file is executed."""
    if checkpoint:
        timm.models.load_checkpoint(network, checkpoint, weights_only=True)
    return network
