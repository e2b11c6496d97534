"""Measurements of a model: multiply-adds, activations, memory and time."""

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sepvit_lib.training.devices import synchronize

# ----------------------------------------------------------------------------------------------------------------------
# Multiply-adds and activations
# ----------------------------------------------------------------------------------------------------------------------

aten = torch.ops.aten
ACTIVATIONS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
LAYER_NORM = 5  # multiply-adds per element, as fvcore counts


class Count(NamedTuple):
    """Multiply-adds and activations of (part of) a forward pass, as fvcore counts.

    Attributes:
        multiply_adds: those of matrix products, convolutions, linear layers and LayerNorm.
        activations: outputs of matrix products, convolutions and linear layers.
    """

    multiply_adds: int
    activations: int


def count_by_module(
    model: nn.Module, *inputs: Any, spans: Mapping[str, tuple[nn.Module, nn.Module]] | None = None
) -> dict[str, Count]:
    """Count the multiply-adds and activations of a forward pass by module.

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
        spans: what to count by itself, from the end of one module to the start of another one. The name comes below
            that of the module that computes it, such as 'blocks.0.0.attn.pointwise'.

    Returns:
        the counts by the name of the layer or span; what is computed outside of these is under ''.
    """
    root = type(model).__name__  # by which the counters name the model
    norms = {aten.native_layer_norm: lambda shape, *_, **__: 2 * LAYER_NORM * math.prod(shape)}
    outputs = dict.fromkeys(ACTIVATIONS, lambda *_, out_shape, **__: math.prod(out_shape))
    flops, sizes = (FlopCounterMode(display=False, custom_mapping=mapping) for mapping in (norms, outputs))
    with ExitStack() as stack:
        for name, (before, after) in (spans or {}).items():
            for parents in (flops.mod_tracker.parents, sizes.mod_tracker.parents):
                begin, end = (partial(_note, note, f"{root}.{name}") for note in (parents.add, parents.discard))
                stack.callback(before.register_forward_hook(begin).remove)
                stack.callback(after.register_forward_pre_hook(end).remove)
        # The counter knows the matrix products of attention. A fused kernel has no outputs to count between them.
        for context in (torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flops, sizes):
            stack.enter_context(context)
        model(*inputs)

    def count(name: str) -> Count:
        return Count(sum(flops.flop_counts[name].values()) // 2, sum(sizes.flop_counts[name][op] for op in ACTIVATIONS))

    inner = [name for name in flops.flop_counts if "." in name]
    leaves = [name for name in inner if not any(other.startswith(f"{name}.") for other in inner)]
    counts = {name.partition(".")[2]: count(name) for name in leaves}
    counts[""] = Count(*(total - sum(part[i] for part in counts.values()) for i, total in enumerate(count("Global"))))
    return counts


def _note(note: Callable[[str], None], name: str, *_: Any) -> None:
    """Note the start or the end of a span: a hook for modules."""
    note(name)


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of a forward pass (see `Count`).

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    return sum(count.multiply_adds for count in count_by_module(model, *inputs).values())


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
