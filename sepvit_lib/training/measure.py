"""Measurements of a model: multiply-adds, activations, memory and time."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sepvit_lib.training.devices import synchronize

# ----------------------------------------------------------------------------------------------------------------------
# Multiply-adds and activations
# ----------------------------------------------------------------------------------------------------------------------

FUSED_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
LAYER_NORM = 5  # multiply-adds per element, as fvcore counts


def multiply_adds(func: Any, args: Any, kwargs: Any, outputs: Any) -> int:
    """Multiply-adds of one operation of PyTorch; 0 for those that are no products."""
    if func.overloadpacket._qualified_op_name == FUSED_ATTENTION:  # PyTorch's counter knows only those of GPUs
        (q, k, v) = args[:3]
        return q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs) // 2
    return 0


@dataclass
class Count:
    """What a forward pass, or a part of it, computes.

    Attributes:
        multiply_adds: those of matrix products, convolutions, linear layers and LayerNorm.
        activations: outputs of matrix products, convolutions and linear layers.
    """

    multiply_adds: int = 0
    activations: int = 0


class Counter(TorchDispatchMode):
    """Count multiply-adds and activations while active, as fvcore does.

    Attributes:
        counts: the counts by place.
        places: the place that is computed now, after those that it is part of.
    """

    ACTIVATIONS = (
        torch.ops.aten.convolution,
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = {}
        self.places = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        count = self._count()
        count.multiply_adds += multiply_adds(func, args, kwargs, outputs)
        if func.overloadpacket in self.ACTIVATIONS:
            count.activations += outputs.numel()
        return outputs

    def _count(self) -> Count:
        return self.counts.setdefault(self.places[-1], Count())

    def count_layer_norm(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Count a LayerNorm: a hook for modules."""
        self._count().multiply_adds += LAYER_NORM * output.numel()


def count_by_module(model: nn.Module, *inputs: Any, methods: Mapping[str, nn.Module] | None = None) -> dict[str, Count]:
    """Count the multiply-adds and activations of a forward pass by module.

    Counts what fvcore counts; see `Count`.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
        methods: methods to count by themselves: the modules that call them, by the methods' names in the model, such
            as 'blocks.0.0.attn.pointwise'.

    Returns:
        the counts by the name of the module, or method, that computes them itself.
    """
    counter = Counter()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hooks = [module.register_forward_hook(counter.count_layer_norm)] if isinstance(module, nn.LayerNorm) else []
            hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: counter.places.append(name), prepend=True),
                module.register_forward_hook(lambda *_: counter.places.pop() and None, always_call=True),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        for name, module in (methods or {}).items():
            stack.enter_context(_counted(counter, module, name))
        # The counter knows the matrix products of attention. A fused kernel has no outputs to count between them.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*inputs)
    return counter.counts


@contextmanager
def _counted(counter: Counter, module: nn.Module, name: str) -> Iterator[None]:
    """Count a module's method, the last part of the name, as a place of its own."""
    method = name.rpartition(".")[2]
    function = getattr(module, method)

    def call(*args: Any) -> Any:
        counter.places.append(name)
        try:
            return function(*args)
        finally:
            counter.places.pop()

    setattr(module, method, call)
    try:
        yield
    finally:
        delattr(module, method)  # which hid that of the class


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of a forward pass.

    Counts what fvcore counts: matrix products, convolutions, linear layers and LayerNorm.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    return sum(count.multiply_adds for count in count_by_module(model, *inputs).values())


def count_activations(model: nn.Module, *inputs: Any) -> int:
    """Count the activations of a forward pass.

    Counts what fvcore counts: outputs of convolutions, linear layers and matrix products.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    return sum(count.activations for count in count_by_module(model, *inputs).values())


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def bytes_of(network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a network's parameters and buffers, and of its optimiser's state."""
    tensors: list[Any] = [*network.parameters(), *network.buffers()]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes of tensors that a call has allocated at once, beyond what was allocated before it. None on MPS."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch for CUDA reports an error where there is no GPU
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


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
