"""Record the attention weights inside and among windows for given images, and compute the attention rollout.

The network is not reimplemented. Forward hooks capture the inputs and the output of each attention module. The module's
own methods then recompute the attention weights, and the output from these weights. It must match the captured output.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sepvit import SeparableSelfAttention, SepViTBlock, window_reverse

# Maximum error of a recomputed output, relative to the output's largest value; also maximum error of a row's sum.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class BlockAttention:
    """The attention weights of a block. Each row is the output of a softmax, and sums to one.

    Shapes use `B` for images, `h` for heads, `n` for windows and `T` for the tokens of a window: its window token, if
    it has one, then its pixels, row by row.

    Attributes:
        name: the block's name in the network, such as 'blocks.2.1' or 'backbone.blocks.2.1'.
        stage: the block's stage, 0 to 3.
        grid: number of rows and of columns of windows.
        window_size: window side, in pixels of the feature map.
        map_size: height and width of the feature map, without the padding of the last windows.
        among: weights among windows, B × h × n × n: row i contains the weights with which window i attends to each
            window. None for a block with a single window, which attends to no other.
        inside: weights inside windows, B × n × h × T × T.
        has_token: whether the windows have window tokens, which come first in `inside`.
        difference: largest error of the recomputed output, relative to the output's largest value.
    """

    name: str
    stage: int
    grid: tuple[int, int]
    window_size: int
    map_size: tuple[int, int]
    among: Tensor | None
    inside: Tensor
    has_token: bool
    difference: float

    @property
    def stride(self) -> int:
        """Image pixels per window side. Window (row, column) starts at pixel (row · stride, column · stride)."""
        return 4 * 2**self.stage * self.window_size

    def among_mean(self) -> Tensor:
        """Weights among windows, averaged over heads, B × n × n.

        Raises:
            ValueError: the block has a single window.
        """
        if self.among is None:
            raise ValueError(f"{self.name} has a single window, so there is no attention among windows")
        return self.among.mean(dim=1)

    def window_at(self, row: float, column: float) -> tuple[int, int]:
        """Row and column of the window that contains an image pixel, or of the nearest window if none does."""
        pairs = zip((row, column), self.grid)
        rows, columns = (min(max(int(pixel // self.stride), 0), count - 1) for pixel, count in pairs)
        return rows, columns


# ----------------------------------------------------------------------------------------------------------------------
# Recording
# ----------------------------------------------------------------------------------------------------------------------


def record_attention(
    network: nn.Module, images: Tensor, run: Callable[[Tensor], object] | None = None
) -> list[BlockAttention]:
    """Run a network, and return the attention of its blocks in the order in which they ran.

    Args:
        network: a SepViT in either form, or any module that contains one, such as a segmentor.
        images: B × C_in × H × W, or whatever `run` takes.
        run: function that runs the network on the images, and may skip blocks; None to call the network itself.

    Raises:
        ValueError: the network contains no SepViT or is in training mode, none of its blocks ran, or one ran twice.
        RuntimeError: rows of weights do not sum to one, or an output recomputed from the weights is not the network's.
    """
    blocks = {name: block.attn for name, block in network.named_modules() if isinstance(block, SepViTBlock)}
    if not blocks:
        raise ValueError(f"{type(network).__name__} contains no SepViT, so there is no attention to record")
    if any(attention.training for attention in blocks.values()):
        raise ValueError("the network is in training mode, in which dropout changes its attention; call eval() first")
    records: dict[str, BlockAttention] = {}

    def record(name: str, attention: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name in records:
            raise ValueError(f"{name} ran twice; record one run at a time")
        records[name] = _attention_of(name, attention, inputs, output)

    with ExitStack() as hooks, torch.no_grad():
        for name, attention in blocks.items():
            hooks.callback(attention.register_forward_hook(partial(record, name)).remove)
        (run or network)(images)
    if not records:
        raise ValueError("none of the network's blocks ran; a compiled network does not call them one by one")
    return list(records.values())


def _attention_of(
    name: str, attention: SeparableSelfAttention, inputs: tuple[Any, ...], output: Tensor
) -> BlockAttention:
    """Compute a block's attention from the inputs of its attention module, and check it against the output."""
    z, H, W = inputs
    stage = int(name.split(".")[-2])
    (B, n), w = z.shape[:2], attention.window_size
    q, k, v = attention.depthwise_heads(z)  # each B·n × h × T × d
    inside = attention.depthwise_weights(q, k)  # B·n × h × T × T
    a = attention.join_heads(inside.to(v.dtype) @ v, z)  # B × n × T × C
    among, has_token = None, attention.has_window_tokens
    if attention.PSA_qk is not None:
        among = attention.pointwise_weights(a)  # B × h × n × n
        x = attention.heads_to_map(attention.mix_windows(among, a), H, W)  # B × H × W × C
    else:
        x = window_reverse(a[:, :, 1:] if has_token else a, w, H, W)  # B × H × W × C
    weights = [inside] if among is None else [inside, among]
    difference = _check(name, weights, attention.project(x), output)
    inside = inside.unflatten(0, (B, n))
    grid, among = (-(-H // w), -(-W // w)), among if n > 1 else None
    return BlockAttention(name, stage, grid, w, (H, W), among, inside, has_token, difference)


def _check(name: str, weights: Sequence[Tensor], recomputed: Tensor, output: Tensor) -> float:
    """Check a block's weights. Returns the `difference` of `BlockAttention`.

    Raises:
        RuntimeError: rows do not sum to one, or the recomputed output differs from the network's.
    """
    tolerance = TOLERANCES[output.dtype]
    for rows in weights:
        excess = (rows.double().sum(dim=-1) - 1).abs().max().item()
        if not excess <= tolerance:  # also if it is NaN
            raise RuntimeError(f"{name}: a row of attention weights sums to one only within {excess:.1g}")
    max_output = output.double().abs().max().item()
    difference = (recomputed.double() - output.double()).abs().max().item() / max(max_output, 1e-30)
    if not difference <= tolerance:
        raise RuntimeError(f"{name}: the output recomputed from its attention differs by {difference:.1g}")
    return difference


# ----------------------------------------------------------------------------------------------------------------------
# Rollout
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """Attention among windows through several blocks, on a common grid of m cells.

    Attributes:
        weights: B × m × m, rows sum to one. Row i is the contribution of each cell before the first block to cell i
            after the last block.
        grid: number of rows and of columns of cells.
        stride: image pixels per side of a cell. Cells in the last row and column may reach beyond the image.
    """

    weights: Tensor
    grid: tuple[int, int]
    stride: int


def rollout(blocks: Sequence[BlockAttention], dtype: torch.dtype = torch.float64) -> Rollout:
    """Multiply the attention among windows over blocks: attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928).

    Each block contributes (P + I) / 2, where P is its attention among windows, averaged over heads. The identity I
    represents the shortcut around the attention.

    Blocks have different grids of windows. The finest grid, with m cells, is the common grid. P is resampled to the
    common grid in proportion to areas: it becomes A P D, m × m. A (m × n, rows sum to one) gives a cell the attention
    of the windows that the cell overlaps, in proportion to the overlaps. D (n × m) spreads a window's weight evenly
    over the window's area. Weight on padding is dropped, and rows are divided by their sums. I is not resampled: the
    shortcut does not move pixels.

    Blocks with a single window have no attention among windows, and are skipped. Attention inside windows and
    convolutions, which only mix neighbours, are ignored.

    Args:
        blocks: the attention of blocks, in the order in which they ran.
        dtype: number format of the computation.

    Raises:
        ValueError: no block has more than one window.
    """
    several = [block for block in blocks if block.among is not None]
    if not several:
        raise ValueError("no block has more than one window, so there is no attention among windows to multiply")
    finest = min(several, key=lambda block: block.stride)
    # Map sizes are rounded up at each stage, so later stages may overestimate the image's size: take the smallest.
    extent = [min(block.map_size[axis] * 4 * 2**block.stage for block in several) for axis in (0, 1)]
    total: Tensor | None = None
    for block in several:
        P = block.among_mean().to(dtype)  # B × n × n
        overlaps = [_overlaps(extent[axis], finest.stride, block.stride).to(P) for axis in (0, 1)]
        overlap = torch.kron(*overlaps)  # areas in pixels, m × n
        shared = _normalised(_normalised(overlap) @ P @ overlap.T)  # B × m × m; all windows have the same area
        mixed = (shared + torch.eye(len(overlap), dtype=P.dtype, device=P.device)) / 2
        total = mixed if total is None else mixed @ total
    assert total is not None
    return Rollout(total.float(), finest.grid, finest.stride)


def _overlaps(extent: int, cell: int, window: int) -> Tensor:
    """Lengths in pixels that cells and windows share along one axis, cells × windows.

    Args:
        extent: length of the image.
        cell: length of a cell. The first starts at 0.
        window: length of a window. The first starts at 0.
    """
    cells, windows = (torch.arange(0, extent, side, dtype=torch.float64) for side in (cell, window))
    ends = torch.minimum((cells + cell)[:, None], (windows + window)[None]).clamp(max=extent)
    return (ends - torch.maximum(cells[:, None], windows[None])).clamp(min=0)


def _normalised(weights: Tensor) -> Tensor:
    """Divide rows by their sums."""
    return weights / weights.sum(dim=-1, keepdim=True)
