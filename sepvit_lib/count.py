"""Count a network's parameters, multiply-adds and activations by stage and kind; measure its memory and time.

Shared by the three scripts named get_flops.py, the benchmarks and the throughput measurement.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sepvit import SepViTStages
from sepvit_lib.common.devices import synchronize
from sepvit_lib.common.errors import setting

INSIDE, AMONG = "attention inside windows", "attention among windows"
KINDS = ("convolutions", "projections", INSIDE, AMONG, "MLP", "norms, window tokens", "classifier")
LAYER_KINDS = ("convolutions", "linear layers", "norms", "other")  # of networks other than SepViT
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HEAD, WHOLE = "head", "whole"
SMALL_PADDING, LARGE_PADDING = 0.1, 0.25  # share of the multiply-adds

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
        spans: computations to count separately. Each name is mapped to two modules: the span lasts from the end of the
            first to the start of the second. The name is that of the enclosing module, with a suffix, such as
            'blocks.0.0.attn.pointwise'.

    Returns:
        the counts, keyed by the name of the layer or span. The key '' contains the rest of the forward pass.
    """
    root = type(model).__name__  # the name under which the counters record the model
    norms = {aten.native_layer_norm: lambda shape, *_, **__: 2 * LAYER_NORM * math.prod(shape)}
    outputs = dict.fromkeys(ACTIVATIONS, lambda *_, out_shape, **__: math.prod(out_shape))
    flops, sizes = (FlopCounterMode(display=False, custom_mapping=mapping) for mapping in (norms, outputs))
    with ExitStack() as stack:
        for name, (before, after) in (spans or {}).items():
            for parents in (flops.mod_tracker.parents, sizes.mod_tracker.parents):
                begin, end = (partial(_note, note, f"{root}.{name}") for note in (parents.add, parents.discard))
                stack.callback(before.register_forward_hook(begin).remove)
                stack.callback(after.register_forward_pre_hook(end).remove)
        # Unfused attention exposes its matrix products to the counters. A fused kernel is a single operation.
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
    """Module hook that marks the start or the end of a span."""
    note(name)


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Count the multiply-adds of a forward pass (see `Count`).

    Args:
        model: the model.
        *inputs: arguments of its forward pass.
    """
    return sum(count.multiply_adds for count in count_by_module(model, *inputs).values())


# ----------------------------------------------------------------------------------------------------------------------
# Padding
# ----------------------------------------------------------------------------------------------------------------------


class Padding(NamedTuple):
    """Padding of maps to whole windows.

    Attributes:
        stages: padded pixels divided by the map's pixels, by stage; 0 without padding.
        extra: multiply-adds that padding adds, divided by the others, approximately: those of linear layers.
    """

    stages: list[float]
    extra: float


def padding_of(network: SepViTStages, size: tuple[int, int]) -> Padding:
    """Padding that a SepViT adds to images of `size` (H, W) pixels."""
    grids = iter(network.window_grids(size))
    stages, extra, others = [], 0.0, 0.0
    for i, blocks in enumerate(network.blocks):
        pixels = math.prod(math.ceil(side / (4 * 2**i)) for side in size)
        padded = [math.prod(next(grids)) * block.window_size**2 - pixels for block in blocks]
        stages.append(sum(padded) / len(padded) / pixels)
        square = network.embed_dims[i] ** 2
        extra += 3 * square * sum(padded)  # queries, keys and values
        others += 12 * square * pixels * len(padded)
    return Padding(stages, extra / others)


def with_less_padding(network: SepViTStages, size: tuple[int, int]) -> str:
    """Settings with less padding: the nearest size, and windows that fit `size` (H, W) exactly, if there are any."""
    shifted = ((size[0] + shift, size[1] + shift) for shift in sorted(range(-224, 225), key=abs))
    sizes = [(H, W) for H, W in shifted if min(H, W) >= 32 and H % 32 == W % 32 == 0]
    nearest = next((one for one in sizes if padding_of(network, one).extra <= SMALL_PADDING), None)
    ways = [setting("input_size", *dict.fromkeys(nearest))] if nearest else []
    fitting = [side for side in range(3, 13) if math.gcd(*size) % (32 * side) == 0]  # 2 × side in stages 1 and 2
    if fitting:
        side = min(fitting, key=lambda side: abs(side - 7))
        sizes_of_stages = f"(({side},),({side},{2 * side}),({side},{2 * side}),({side},))"
        ways.append(setting("model_kwargs", dict(window_sizes=f"'{sizes_of_stages}'")))
    return " or ".join(ways)


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
    """Peak bytes of tensors allocated by a call, beyond those allocated before it. None on MPS."""
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # CUDA builds of torch report an error without a GPU
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including its asynchronous work on the device."""
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------------
# By stage and kind of operation
# ----------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A kind of computation in a stage of a network."""

    stage: str
    kind: str


@dataclass
class Cost:
    """Cost of a part of a network, per image.

    Attributes:
        parameters: number of parameters.
        multiply_adds: multiply-adds of the forward pass.
        activations: outputs of convolutions, linear layers and matrix products.
    """

    parameters: int = 0
    multiply_adds: int = 0
    activations: int = 0


QUANTITIES = {"parameters": 3, "multiply_adds": 2, "activations": 3}  # with the number of decimals in tables


# ----------------------------------------------------------------------------------------------------------------------
# Counting
# ----------------------------------------------------------------------------------------------------------------------


def costs_of(network: nn.Module, image: Tensor) -> dict[Part, Cost]:
    """Count the cost of each part of a network.

    Args:
        network: the network, in evaluation mode. The costs of a SepViT are split by stage and kind of layer, those of
            other networks only by kind.
        image: one image, 1 × C × H × W.

    Returns:
        the cost of each part. The sum over all parts is the cost of the whole network.
    """
    is_sepvit = isinstance(network, SepViTStages)
    spans = _attention_of(network) if isinstance(network, SepViTStages) else {}

    def part_of(name: str) -> Part:
        return _part_of_sepvit(name) if is_sepvit else Part(WHOLE, _kind_of_layer(network.get_submodule(name)))

    costs: dict[Part, Cost] = {}
    for name, parameter in network.named_parameters():  # shared parameters appear once
        costs.setdefault(part_of(name.rpartition(".")[0]), Cost()).parameters += parameter.numel()
    for name, count in count_by_module(network, image, spans=spans).items():
        cost = costs.setdefault(part_of(name), Cost())
        cost.multiply_adds += count.multiply_adds
        cost.activations += count.activations
    return {part: cost for part, cost in costs.items() if cost != Cost()}


def _attention_of(network: SepViTStages) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The spans of SepViT's attention (see `count_by_module`), each with the layers before and after it."""
    spans: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, block in network.named_blocks().items():
        attn = block.attn
        spans[f"{name}.attn.depthwise"] = (attn.DSA_qkv, attn.win_tokens_norm or attn.proj)
        if attn.PSA_qk is not None:
            spans[f"{name}.attn.pointwise"] = (attn.PSA_qk, attn.proj)
    return spans


def _part_of_sepvit(name: str) -> Part:
    """Part that a module or attention span belongs to."""
    stage = re.match(r"\w+\.(\d+)", name)
    patterns = {
        r"\.depthwise$": INSIDE,
        r"\.pointwise$": AMONG,
        r"\.(DSA_qkv|PSA_qk|attn\.proj)$": "projections",
        r"\.mlp\b": "MLP",
        r"^(patch_embeds|pos_block)\.\d+\.proj": "convolutions",
        r"^head$": "classifier",
    }
    kind = next((kind for pattern, kind in patterns.items() if re.search(pattern, name)), "norms, window tokens")
    return Part(f"stage {int(stage[1]) + 1}" if stage else HEAD, kind)


def _kind_of_layer(module: nn.Module) -> str:
    if isinstance(module, CONVOLUTIONS):
        return "convolutions"
    if isinstance(module, nn.Linear):
        return "linear layers"
    return "norms" if isinstance(module, NORMS) else "other"


def total_of(costs: Mapping[Part, Cost], quantity: str, stage: str = "", kind: str = "") -> int:
    """Sum a quantity of `Cost` over all parts, or over one stage or kind."""
    return sum(
        getattr(cost, quantity) for part, cost in costs.items() if stage in ("", part.stage) and kind in ("", part.kind)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Memory of a call in bytes, excluding its input images.

    Attributes:
        weights: the network's parameters and buffers.
        moments: the optimiser's state.
        computed: peak size of activations, gradients and temporary results.
    """

    weights: int
    moments: int
    computed: int

    @property
    def total(self) -> int:
        """Sum of weights, moments and computed."""
        return self.weights + self.moments + self.computed


def memory_of(network: nn.Module, images: Tensor) -> dict[str, Memory] | None:
    """Measure the memory of a forward pass, and of a training step with AdamW, in float32.

    Args:
        network: the network. Its weights are changed.
        images: B × C × H × W, on the network's device.

    Returns:
        the memory of 'forward pass' and 'training step'; None on MPS, where it cannot be measured.
    """
    device = images.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def forward() -> None:
        with torch.no_grad():
            network(images)

    def step() -> None:
        outputs = network(images)
        maps = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        loss = torch.stack([output.float().square().mean() for output in maps]).sum()
        if loss.requires_grad:  # False if all parameters are frozen
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    network.eval()
    predicted = peak_memory(forward, device)
    network.train()
    step()  # creates the optimiser's state
    trained = peak_memory(step, device)
    if predicted is None or trained is None:
        return None
    weights, moments = bytes_of(network), bytes_of(network, optimizer) - bytes_of(network)
    return {"forward pass": Memory(weights, 0, predicted), "training step": Memory(weights, moments, trained)}


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

WIDTH = 26  # of the first column, in characters


def costs_as_text(costs: Mapping[Part, Cost]) -> str:
    """Format costs as tables, in millions: one row per kind, one column per stage, and totals."""
    return "\n\n".join(_table(costs, quantity) for quantity in QUANTITIES)


def _table(costs: Mapping[Part, Cost], quantity: str) -> str:
    stages = sorted({part.stage for part in costs} - {WHOLE}, key=lambda stage: (stage == HEAD, stage))
    kinds = [kind for kind in dict.fromkeys((*KINDS, *LAYER_KINDS)) if total_of(costs, quantity, kind=kind)]
    whole = total_of(costs, quantity)
    lines = [_line(f"{quantity.replace('_', '-')}, M", [*stages, "total", "share"])]
    for kind in (*kinds, ""):
        sums = [*(total_of(costs, quantity, stage, kind) for stage in stages), total_of(costs, quantity, kind=kind)]
        cells = [f"{value / 1e6:,.{QUANTITIES[quantity]}f}" if value else "–" for value in sums]
        lines.append(_line(kind or "total", [*cells, f"{100 * sums[-1] / whole:.1f} %" if whole else "–"]))
    return "\n".join(lines)


def memory_as_text(memory: Mapping[str, Memory] | None, images: int, device: torch.device) -> str:
    """Format the memory of calls as a table, in MiB.

    Args:
        memory: returned by `memory_of`.
        images: number of images.
        device: the device on which it was measured.
    """
    if memory is None:
        return f"memory: cannot be measured on {device.type}"
    lines = [_line("memory, MiB", ["weights", "moments", "computed", "total"])]
    for name, call in memory.items():
        sizes = (call.weights, call.moments, call.computed, call.total)
        lines.append(_line(name, [f"{size / 2**20:,.1f}" if size else "–" for size in sizes]))
    count = f"{images} image{'s' if images > 1 else ''}"
    lines.append(f"for {count} on {device.type} in float32; moments: AdamW's; computed: activations and gradients")
    return "\n".join(lines)


def padding_as_text(network: SepViTStages, size: tuple[int, int]) -> str:
    """Padding by stage, in one line."""
    padding = padding_of(network, size)
    stages = ", ".join(f"{share:.0%}" for share in padding.stages)
    return (
        f"padding to whole windows, share of each stage's map: {stages}; about {padding.extra:.0%} more multiply-adds"
    )


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:{WIDTH}}" + "".join(f"{cell:>11}" for cell in cells)


def summary(costs: Mapping[Part, Cost]) -> str:
    """A network's totals, in one line."""
    parameters, multiply_adds, activations = (total_of(costs, quantity) for quantity in QUANTITIES)
    return (
        f"{parameters / 1e6:.3f} M parameters, {multiply_adds / 1e9:.3f} G multiply-adds, "
        f"{activations / 1e6:.3f} M activations"
    )
