"""Build a timm network for an image size, and move it to a device."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg_value
from torch import nn

from sepvit import VARIANTS
from sepvit_lib.common.command_line import first_line
from sepvit_lib.common.errors import UserError, out_of_memory, setting
from sepvit_lib.common.processes import print_main


def create_network(
    what: str,
    name: str,
    num_classes: int,
    input_size: int | Sequence[int],
    rates: Mapping[str, float] | None = None,
    asked_for: Collection[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Build a timm network. A SepViT, or a network with a fixed input size, is built for `input_size`.

    Args:
        what: the network and the setting that chose it, for messages.
        name: timm's name of the network.
        num_classes: number of classes.
        input_size: side of the images in pixels, or height and width.
        rates: rates of dropout ('drop') and stochastic depth ('drop_path').
        model_kwargs: other arguments of the network's constructor.
        asked_for: names of the rates that the network must support. Other rates that it does not support are ignored,
            with a message.

    Raises:
        UserError: timm does not have the network or cannot build it with these settings, or it does not support the
            image size or a rate.
    """
    if not timm.is_model(name):
        raise UserError(f"{what}: timm has no such model; choose {', '.join(VARIANTS)}, or one of timm.list_models()")
    rates = rates or {}
    build = partial(timm.create_model, name, num_classes=num_classes, **(model_kwargs or {}))
    if is_sepvit(name) or get_pretrained_cfg_value(name, "fixed_input_size"):
        build.keywords["img_size"] = to_2tuple(input_size)
    try:
        network, unsupported = _built(build, {f"{rate}_rate": value for rate, value in rates.items()})
    except (TypeError, ValueError, AssertionError) as error:  # for settings that a network does not have
        raise UserError(f"{what}: timm cannot build it with these settings ({error})") from None
    for rate, value in rates.items():
        if value and f"{rate}_rate" in unsupported:
            if rate in asked_for:
                raise UserError(f"{setting(rate, value)}: {name} has no {rate}_rate; use {setting(rate, 0)}")
            print_main(f"{what}: has no {rate}_rate; the default, {value}, is ignored")
    _check_size(network, name, to_2tuple(input_size), build.keywords.get("in_chans", 3))
    return network


def is_sepvit(name: str) -> bool:
    """Whether timm's name of a network is that of a SepViT, in any form."""
    return name.startswith(tuple(VARIANTS))


def _built(build: Callable[..., Any], rates: Mapping[str, float]) -> tuple[Any, Collection[str]]:
    """Build a network with all rates that it supports. Also returns the names of the unsupported rates."""
    problem = None
    for count in range(len(rates) + 1):
        for unsupported in combinations(rates, count):
            try:
                return build(**{name: rate for name, rate in rates.items() if name not in unsupported}), unsupported
            except TypeError as error:  # an argument that the network does not have
                problem = problem or error
    raise problem or TypeError


def _check_size(network: nn.Module, name: str, size: tuple[int, int], channels: int) -> None:
    """Run a forward pass to check that a network supports an image size, which timm does not check.

    Raises:
        UserError: the network does not support the size.
    """
    own: Any = get_pretrained_cfg_value(name, "input_size")
    if is_sepvit(name) or own is None or own[1:] == size:
        return
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{setting('input_size', *size)}: not supported by {name} ({first_line(error)}); its default input size is "
            f"{own[1]} × {own[2]} pixels"
        ) from None
    network.train()


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device.

    Convolution weights become channels-last, like SepViT's feature maps. Otherwise, a convolution would convert its
    weights on each call.
    """
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
