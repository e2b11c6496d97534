"""What a network costs: parameters, multiply-adds and activations by stage and kind, and memory; as tables.

Shared by the three commands named get_flops.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sepvit import SepViTStages
from sepvit_lib.training.measure import bytes_of, count_by_module, peak_memory

INSIDE, AMONG = "attention inside windows", "attention among windows"
KINDS = ("convolutions", "projections", INSIDE, AMONG, "MLP", "norms, window tokens", "classifier")
LAYER_KINDS = ("convolutions", "linear layers", "norms", "other")  # of a network that is no SepViT
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HEAD, WHOLE = "head", "whole"


class Part(NamedTuple):
    """A kind of computation in a stage of a network."""

    stage: str
    kind: str


@dataclass
class Cost:
    """What a part of a network costs, for one image.

    Attributes:
        parameters: number of parameters.
        multiply_adds: multiply-adds of the forward pass.
        activations: outputs of convolutions, linear layers and matrix products.
    """

    parameters: int = 0
    multiply_adds: int = 0
    activations: int = 0


QUANTITIES = {"parameters": 3, "multiply_adds": 2, "activations": 3}  # with their decimals, in millions


# ----------------------------------------------------------------------------------------------------------------------
# Counting
# ----------------------------------------------------------------------------------------------------------------------


def costs_of(network: nn.Module, image: Tensor) -> dict[Part, Cost]:
    """Count what the parts of a network cost.

    Args:
        network: the network, in evaluation mode. The parts of SepViT are stages and the kinds of its layers, those of
            other networks only kinds.
        image: one image, 1 × C × H × W.

    Returns:
        the costs by part. Their sums are those of the whole network.
    """
    is_sepvit = isinstance(network, SepViTStages)
    spans = _attention_of(network) if isinstance(network, SepViTStages) else {}

    def part_of(name: str) -> Part:
        return _part_of_sepvit(name) if is_sepvit else Part(WHOLE, _kind_of_layer(network.get_submodule(name)))

    costs: dict[Part, Cost] = {}
    for name, parameter in network.named_parameters():  # each once, even if shared
        costs.setdefault(part_of(name.rpartition(".")[0]), Cost()).parameters += parameter.numel()
    for name, count in count_by_module(network, image, spans=spans).items():
        cost = costs.setdefault(part_of(name), Cost())
        cost.multiply_adds += count.multiply_adds
        cost.activations += count.activations
    return {part: cost for part, cost in costs.items() if cost != Cost()}


def _attention_of(network: SepViTStages) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The matrix products of SepViT's attention: the layers before and after them, by name."""
    spans: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, block in network.named_blocks().items():
        attn = block.attn
        spans[f"{name}.attn.depthwise"] = (attn.DSA_qkv, attn.win_tokens_norm or attn.proj)
        if attn.PSA_qk is not None:
            spans[f"{name}.attn.pointwise"] = (attn.PSA_qk, attn.proj)
    return spans


def _part_of_sepvit(name: str) -> Part:
    """The part that a module, or a span of the attention, belongs to."""
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
    """Sum a quantity of `Cost` over all parts, or over those of a stage or kind."""
    return sum(
        getattr(cost, quantity) for part, cost in costs.items() if stage in ("", part.stage) and kind in ("", part.kind)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a call needs, besides its images.

    Attributes:
        weights: the network's parameters and buffers.
        moments: the optimiser's state.
        computed: most bytes of activations, gradients and temporary results at once.
    """

    weights: int
    moments: int
    computed: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.moments + self.computed


def memory_of(network: nn.Module, images: Tensor) -> dict[str, Memory] | None:
    """Measure the memory of a forward pass, and of a training step with AdamW, in float32.

    Args:
        network: the network. Its weights are changed.
        images: B × C × H × W, on the network's device.

    Returns:
        the memory of 'forward pass' and 'training step'; None on a device that does not tell, MPS.
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
        if loss.requires_grad:  # not if all parts are frozen
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

WIDTH = 26  # of the first column


def costs_as_text(costs: Mapping[Part, Cost]) -> str:
    """Lay out costs as tables, in millions: a row for each kind, a column for each stage, and the sums of both."""
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
    """Lay out the memory of calls as a table, in MiB.

    Args:
        memory: what `memory_of` returned.
        images: number of images.
        device: the device that it was measured on.
    """
    if memory is None:
        return f"memory: {device.type} does not tell it"
    lines = [_line("memory, MiB", ["weights", "moments", "computed", "total"])]
    for name, call in memory.items():
        sizes = (call.weights, call.moments, call.computed, call.total)
        lines.append(_line(name, [f"{size / 2**20:,.1f}" if size else "–" for size in sizes]))
    count = f"{images} image{'s' if images > 1 else ''}"
    lines.append(f"for {count} on {device.type} in float32; moments: AdamW's; computed: activations and gradients")
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:{WIDTH}}" + "".join(f"{cell:>11}" for cell in cells)


def summary(costs: Mapping[Part, Cost]) -> str:
    """A network's totals, in one line."""
    parameters, multiply_adds, activations = (total_of(costs, quantity) for quantity in QUANTITIES)
    return (
        f"{parameters / 1e6:.3f} M parameters, {multiply_adds / 1e9:.3f} G multiply-adds, "
        f"{activations / 1e6:.3f} M activations"
    )
