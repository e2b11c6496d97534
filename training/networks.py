"""Building one of timm's networks for an image size, and placing it on a device."""

from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value
from torch import nn

from training.errors import UserError


def create_network(what: str, name: str, num_classes: int, input_size: int | tuple[int, int], **kwargs: Any) -> Any:
    """Build one of timm's networks, for the image size if the network has a fixed one.

    Args:
        what: names the network in messages, with the setting that chose it.
        name: timm's name.
        num_classes: number of classes.
        input_size: side of the images in pixels, or height and width.
        **kwargs: other arguments of timm's `create_model`.

    Raises:
        UserError: timm cannot build it so.
    """
    if get_pretrained_cfg_value(name, "fixed_input_size"):
        kwargs["img_size"] = input_size
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:  # for settings that a network does not have
        raise UserError(f"{what}: timm cannot build it with these settings ({error})") from None


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device.

    The weights of its convolutions become channels last, as the maps of SepViT are: otherwise each convolution would
    convert them.
    """
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
