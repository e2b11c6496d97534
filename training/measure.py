"""Measurements of a model: multiply-adds, activations and time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from training.devices import synchronize


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of a forward pass.

    Counts what fvcore counts: matrix products, convolutions, linear layers and LayerNorm.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    normalised: list[int] = []

    def count_layer_norm(module: nn.Module, inputs: Any, output: Tensor) -> None:
        normalised.append(output.numel())

    hooks = [module.register_forward_hook(count_layer_norm) for module in model.modules()
             if isinstance(module, nn.LayerNorm)]  # fmt: skip
    # The counter knows the matrix products of attention, but not the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + 5 * sum(normalised)


class _Activations(TorchDispatchMode):
    """Count the outputs of convolutions and matrix products while active."""

    COUNTED = (
        torch.ops.aten.convolution,
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.COUNTED:
            self.count += output.numel()
        return output


def count_activations(model: nn.Module, *inputs: Any) -> int:
    """Count the activations of a forward pass.

    Counts what fvcore counts: outputs of convolutions, linear layers and matrix products.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Activations() as counter:
        model(*inputs)
    return counter.count


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including the work it leaves to the device."""
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median_time(function: Callable[[], object], device: torch.device, least: float = 1.0) -> float:
    """Median seconds of a call, after one to warm up.

    Args:
        function: the call.
        device: the device it works on.
        least: seconds to repeat it for.
    """
    timed(function, device)
    times = [timed(function, device)]
    while sum(times) < least:
        times.append(timed(function, device))
    return statistics.median(times)
