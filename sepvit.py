"""SepViT: Separable Vision Transformer (Li et al., 2022, https://arxiv.org/abs/2203.15380).

This file defines, in order: window token embedding, depthwise separable self-attention, grouped self-attention, the
block, the network and its variants. The last sections adapt checkpoints of other sizes and forms, work around limits of
kernels and compilers, and define the export form. One block computes:

    z    = norm1([win_tokens, windows of x])                  window token embedding
    a    = softmax(q kᵀ / √d) v + z,  q, k, v = DSA_qkv(z)    depthwise self-attention, inside each window
    t, f = a[:, :, 0], a[:, :, 1:]                            window tokens and pixels
    f    = softmax(q kᵀ / √d) f + f,  q, k = PSA_qk(GELU(win_tokens_norm(t)))    pointwise, among the windows
    x    = x + proj(f)
    x    = x + mlp(norm2(x))

A classification block whose map is a single window has no window token and skips the pointwise step. At 224 × 224,
these are the grouped blocks of stage 3 and all blocks of stage 4. A positional encoding follows the first block of
each stage.

The shortcuts ``+ z`` and ``+ f`` are in the published code, but not in the equations of the paper's early versions.
Modules have the names of the published code. DSA means depthwise self-attention, PSA means pointwise self-attention.
tests/reference.py computes the same with loops over windows and heads, and is the easiest version to read.

The network has two forms, made of the same stages:

* ``SepViT``, the classification form: built for one image size, with learned window tokens. Registered with timm as
  ``SepViT_Lite``, ``SepViT_Tiny``, ``SepViT_Small`` and ``SepViT_Base``.
* ``SepViTDense``, the dense prediction form: any image size, zeros as window tokens, one feature map per stage.

Shapes use ``B`` for batch, ``C_in × H × W`` for images, ``H × W`` (``H' × W'`` if images occur too) for the map of a
stage, ``C`` for channels, ``h`` for heads of size ``d``, ``w`` for the window side, ``n = rows · columns`` for windows,
``L = w²`` for pixels per window, and ``T`` for tokens per window: ``1+L`` with a window token, ``L`` without.
"""

import copy
import itertools
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

# isort: split
# These functions are private in timm, but its own models use them, and there is no public counterpart. Tested with timm
# 1.0.31, the first version with `update_model_input_size`.
from timm.layers import _assert
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size

__all__ = [
    "Adaptation",
    "SepViT",
    "SepViTDense",
    "adapt_state_dict",
    "create_dense",
    "default_settings",
    "entries_under",
    "exportable",
    "keep_settings",
    "mark_adapted",
    "settings_of",
    "variant_of",
]

_logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# Window token embedding
# ----------------------------------------------------------------------------------------------------------------------


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Split a map into windows.

    Args:
        x: map, B × H × W × C, whose sides are multiples of the window side.
        window_size: window side w.

    Returns:
        windows, B × n × L × C.
    """
    _, H, W, C = x.shape
    w = window_size
    x = x.reshape(-1, w, W // w, w * C).transpose(1, 2)  # B·rows × columns × w × w·C
    return x.reshape(-1, (H // w) * (W // w), w * w, C)


def window_reverse(f: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """Join windows, B × n × L × C, into a map, and remove its padding: B × H × W × C."""
    C, w = f.shape[-1], window_size
    rows, columns = (H + w - 1) // w, (W + w - 1) // w
    f = f.reshape(-1, columns, w, w * C).transpose(1, 2)  # B·rows × w × columns × w·C
    return crop_padding(f.reshape(-1, rows * w, columns * w, C), H, W)


def window_grid(img_size: tuple[int, int], stage: int, window_size: int) -> tuple[int, int]:
    """Rows and columns of windows in a block of stage `stage` (0 to 3) for images of `img_size` (H, W) pixels."""
    side = (
        4 * 2**stage * window_size
    )  # side of a window in image pixels; rounding up once equals rounding up at every stage
    return math.ceil(img_size[0] / side), math.ceil(img_size[1] / side)


def embed_window_tokens(windows: Tensor, win_tokens: Tensor) -> Tensor:
    """Put a window token in front of each window: B × n × L × C to B × n × (1+L) × C.

    Args:
        windows: pixels of the windows, B × n × L × C.
        win_tokens: tokens, B × n × 1 × C, with 1 in place of B or n if all images or windows share them.
    """
    tokens = win_tokens.expand(windows.shape[0], windows.shape[1], -1, -1)  # B × n × 1 × C
    return torch.cat([tokens.to(windows.dtype), windows], dim=2)


MAX_SIZES = 8  # image sizes whose window tokens are kept


@register_notrace_module
class ResampledWindowTokens(nn.Module):
    """Learned window tokens resampled to the windows of a map.

    In evaluation without gradients, the results of up to `MAX_SIZES` sizes are kept, until the tokens change.

    Args:
        window_size: window side w.
    """

    def __init__(self, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.kept: tuple[Any, Tensor, dict[tuple[int, int], Tensor]] | None = None

    def forward(self, tokens: Tensor, grid: tuple[int, int], H: int, W: int) -> Tensor:
        """Resample tokens, 1 × n' × 1 × C, from rows and columns of windows `grid` to the windows of an H × W map."""
        w = self.window_size
        wanted = ((H + w - 1) // w, (W + w - 1) // w)
        is_fixed = isinstance(H, int) and isinstance(W, int)  # False in exported programs, which take any size
        if is_fixed and wanted == grid:
            return tokens
        if not torch.jit.is_scripting():
            is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a program cannot keep a result
            is_recorded |= tokens.is_cuda and torch.cuda.is_current_stream_capturing()
            if not (is_recorded or self.training or torch.is_grad_enabled()):
                return self._keep(tokens, grid, wanted)
        return resample_window_tokens(tokens, grid, wanted)

    @torch.jit.unused
    def _keep(self, tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
        key = (grid, tokens.data_ptr(), 0 if tokens.is_inference() else tokens._version)
        kept = self.kept
        if kept is None or kept[0] != key:
            self.kept = kept = (key, tokens.detach(), {})  # the source, too, so that no other tensor gets its address
        results = kept[2]
        result = results.get(wanted)
        if result is None:
            result = resample_window_tokens(tokens.detach(), grid, wanted)
            if len(results) == MAX_SIZES:
                results.clear()
            results[wanted] = result
        return result

    def train(self, mode: bool = True) -> "ResampledWindowTokens":
        """Set training or evaluation mode. Forgets the results, since weights may have been changed unnoticed."""
        self.kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # addresses are those of this process


# ----------------------------------------------------------------------------------------------------------------------
# Depthwise separable self-attention
# ----------------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a tensor, B × … × C, flattened to three dimensions, B × N × C.

    OpenVINO computes LayerNorm of three dimensions in one operator, and of four dimensions in three.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a tensor, B × … × C."""
        y = F.layer_norm(x.flatten(1, -2), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.view(x.shape)


def window_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights within each window, B·n × h × T × T, from queries and keys, B·n × h × T × d."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)


class SeparableSelfAttention(nn.Module):
    """Depthwise separable self-attention: depthwise within each window, then pointwise across windows.

    A new module has only the depthwise part; `set_pointwise` adds the pointwise part.

    Args:
        dim: channels C.
        num_heads: heads h.
        window_size: window side w.
        attn_drop: dropout rate of the attention weights of both parts.
        proj_drop: dropout rate after the output projection.
        inner_shortcuts: whether both parts add their input to their output, as in the published code.

    Attributes:
        has_window_tokens: whether each window of the input starts with a window token.
        DSA_qkv: projection of windows to queries, keys and values.
        win_tokens_norm: LayerNorm of the window tokens before `PSA_qk`.
        PSA_qk: projection of the window tokens to queries and keys; None without pointwise self-attention.
        proj: output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        inner_shortcuts: bool = True,
    ) -> None:
        super().__init__()
        self.inner_shortcuts = inner_shortcuts
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.scale = self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.has_window_tokens = False

        self.DSA_qkv = nn.Linear(dim, 3 * dim)
        self.win_tokens_norm: nn.LayerNorm | None
        self.PSA_qk: nn.Linear | None
        self.register_module("win_tokens_norm", None)
        self.register_module("PSA_qk", None)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def set_pointwise(self, enable: bool) -> None:
        """Add a randomly initialised pointwise part, unless the module has one. With `enable` False, remove it."""
        if enable and self.PSA_qk is None:
            dim, where = self.proj.in_features, get_device_dtype(self)
            self.win_tokens_norm = LayerNorm(dim, eps=1e-5, **where)
            self.PSA_qk = nn.Linear(dim, 2 * dim, **where)
            init_weights(self.PSA_qk)
        elif not enable:
            self.win_tokens_norm = None
            self.PSA_qk = None

    def forward(self, z: Tensor, H: int, W: int) -> Tensor:
        """Apply depthwise, then pointwise self-attention.

        Args:
            z: normalised windows of an H × W map, B × n × T × C.
            H: rows of the map, without padding.
            W: columns of the map, without padding.

        Returns:
            map, B × H × W × C.
        """
        a = self.depthwise(z)  # B × n × T × C
        if self.PSA_qk is not None:
            return self.project(self.heads_to_map(self.pointwise(a), H, W))
        f = a[:, :, 1:] if self.has_window_tokens else a  # B × n × L × C
        return self.project(window_reverse(f, self.window_size, H, W))

    def depthwise(self, z: Tensor) -> Tensor:
        """Apply self-attention within each window, including its window token, and add the shortcut: B × n × T × C."""
        q, k, v = self.depthwise_heads(z)  # each B·n × h × T × d
        return self.join_heads(window_attention(q, k, v, self.attn_drop if self.training else 0.0), z)

    def depthwise_heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the depthwise attention, B·n × h × T × d each, from windows, B × n × T × C."""
        qkv = self.DSA_qkv(z).view(-1, z.shape[2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B·n × h × T × d
        return q, k, v

    def depthwise_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights within each window, B·n × h × T × T, from queries and keys of `depthwise_heads`."""
        return window_weights(q, k)

    def join_heads(self, a: Tensor, z: Tensor) -> Tensor:
        """Join heads, B·n × h × T × d, to B × n × T × C, and add the shortcut: the input z of the attention."""
        _, n, T, C = z.shape
        a = a.transpose(1, 2).reshape(-1, n, T, C)
        return a + z if self.inner_shortcuts else a

    def pointwise(self, a: Tensor) -> Tensor:
        """Mix pixels across windows by the attention among window tokens, and add the shortcut.

        Args:
            a: output of the depthwise attention, B × n × (1+L) × C.

        Returns:
            pixels split into heads, B × h × n × L·d.
        """
        P = F.dropout(self.pointwise_weights(a), self.attn_drop, self.training)  # B × h × n × n
        return self.mix_windows(P, a)

    def pointwise_weights(self, a: Tensor) -> Tensor:
        """Attention weights among windows, B × h × n × n, from the output of the depthwise attention."""
        assert self.win_tokens_norm is not None
        assert self.PSA_qk is not None
        t = F.gelu(self.win_tokens_norm(a[:, :, 0]))  # B × n × C
        qk = self.PSA_qk(t).view(-1, a.shape[1], 2, self.num_heads, self.head_dim)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)  # each B × h × n × d
        return torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1)

    def mix_windows(self, P: Tensor, a: Tensor) -> Tensor:
        """Mix the windows' pixels by weights among windows, and add the shortcut.

        Args:
            P: weights, B × h × n × n.
            a: output of the depthwise attention, B × n × (1+L) × C.

        Returns:
            pixels split into heads, B × h × n × L·d.
        """
        _, n, T, _ = a.shape
        h, d = self.num_heads, self.head_dim
        f = a[:, :, 1:].unflatten(3, (h, d)).permute(0, 3, 1, 2, 4)  # B × h × n × L × d
        f = f.reshape(-1, h, n, (T - 1) * d)
        if self.inner_shortcuts:
            P = P + torch.eye(n, dtype=P.dtype, device=P.device)  # P @ f + f in a single pass over the pixels
        return P @ f  # written out, because no fused kernel supports values (L·d wide) so much wider than keys (d)

    def heads_to_map(self, f: Tensor, H: int, W: int) -> Tensor:
        """Join windows and heads, B × h × n × L·d, into an H × W map, without its padding: B × H × W × C."""
        h, w, d = self.num_heads, self.window_size, self.head_dim
        rows, columns = (H + w - 1) // w, (W + w - 1) // w
        f = f.view(-1, h, rows, columns, w, w, d).permute(0, 2, 4, 3, 5, 1, 6)  # B × rows × w × columns × w × h × d
        return crop_padding(f.reshape(-1, rows * w, columns * w, h * d), H, W)

    def project(self, x: Tensor) -> Tensor:
        """Project a map, B × H × W × C."""
        return self.proj_drop(self.proj(x.contiguous()))  # otherwise, the bias is added in a second pass


# ----------------------------------------------------------------------------------------------------------------------
# Grouped self-attention
# ----------------------------------------------------------------------------------------------------------------------

# Grouped self-attention is the same attention with twice the window side: 2 × 2 windows of side 7 form a group of side
# 14. Below are the window sides per stage, cycled over its blocks: (7, 14) alternates plain and grouped attention.
WINDOW_SIZES = ((7,), (7, 14), (7, 14), (7,))

# ----------------------------------------------------------------------------------------------------------------------
# The block
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """What the paper's ablations change. The defaults are those of the published classification form.

    Attributes:
        pointwise: attention among windows; without it, there are no window tokens.
        inner_shortcuts: shortcuts inside the attention, which the paper's early versions do not have.
        overlap: overlapping patch embeddings; without it, patches of 4 × 4 and 2 × 2 pixels.
        positional_encoding: 'conditional' or 'none'.
        window_tokens: 'learned' for each window, 'zeros' (the default of the dense form, which refuses 'learned'),
            'average' of the window's pixels, 'depthwise' (a depthwise convolution over the window), or 'shared' (one
            learned token for all windows).

    Raises:
        ValueError: a name is unknown.
    """

    pointwise: bool = True
    inner_shortcuts: bool = True
    overlap: bool = True
    positional_encoding: str = "conditional"
    window_tokens: str = "learned"

    def __post_init__(self) -> None:
        if self.positional_encoding not in ("conditional", "none"):
            raise ValueError(f"positional_encoding={self.positional_encoding!r}: choose 'conditional' or 'none'")
        kinds = ("learned", "zeros", "average", "depthwise", "shared")
        if self.window_tokens not in kinds:
            raise ValueError(f"window_tokens={self.window_tokens!r}: choose from {kinds}")


PUBLISHED = Variation()


class SepViTBlock(nn.Module):
    """Pre-norm block: window token embedding, depthwise separable self-attention, MLP.

    Args:
        dim: channels C.
        num_heads: heads h.
        window_size: window side w.
        grid: rows and columns of windows in the classification form, which learns a window token per window unless
            there is a single window. None for the dense form, whose window tokens are zeros.
        mlp_ratio: hidden channels of the MLP divided by `dim`.
        drop: dropout rate of the projection and the MLP.
        attn_drop: dropout rate of the attention maps.
        drop_path: stochastic depth rate.
        variation: what differs from the published block.
        dynamic: resample learned window tokens to the windows of each map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        grid: tuple[int, int] | None,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        variation: Variation = PUBLISHED,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.pointwise, self.window_tokens = variation.pointwise, variation.window_tokens
        self.register_parameter("win_tokens", None)
        self.win_conv: nn.Conv2d | None
        self.register_module("win_conv", None)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=drop)
        self.attn = SeparableSelfAttention(dim, num_heads, window_size, attn_drop, drop, variation.inner_shortcuts)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.resampling: ResampledWindowTokens | None
        is_resampled = dynamic and variation.window_tokens == "learned"
        self.register_module("resampling", ResampledWindowTokens(window_size) if is_resampled else None)
        self.set_grid(grid)

    @torch.jit.ignore
    def set_grid(self, grid: tuple[int, int] | None) -> None:
        """Set the grid: add or remove pointwise self-attention, and reset the learned window tokens to zero."""
        self.grid = grid
        is_single_window = grid is not None and math.prod(grid) == 1
        self.attn.has_window_tokens = self.pointwise and not is_single_window
        self.attn.set_pointwise(self.attn.has_window_tokens)
        kind = self.window_tokens if self.attn.has_window_tokens else ""
        dim, w, where = self.norm1.normalized_shape[0], self.window_size, get_device_dtype(self)
        if kind not in ("learned", "shared"):
            self.win_tokens = None
        elif kind == "learned" or self.win_tokens is None:
            count = math.prod(grid) if kind == "learned" and grid is not None else 1
            self.win_tokens = nn.Parameter(torch.zeros(1, count, 1, dim, **where))
        if kind != "depthwise":
            self.win_conv = None
        elif self.win_conv is None:
            self.win_conv = nn.Conv2d(dim, dim, w, stride=w, groups=dim, **where)
            init_weights(self.win_conv)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block; keeps the shape B × H × W × C."""
        _, H, W, C = x.shape
        # The branch is not bound to a variable: in inference, it is freed before the MLP, where memory peaks.
        x = x.flatten(1, 2) + self.drop_path(self.attn(self.normalised_windows(x), H, W)).flatten(1, 2)  # B × H·W × C
        return (x + self.drop_path(self.mlp(self.norm2(x)))).view(-1, H, W, C)

    def normalised_windows(self, x: Tensor) -> Tensor:
        """Split a map, B × H × W × C, into normalised windows, B × n × T × C, with window tokens if the block has them.

        The norm precedes the partition, so that normalised learned window tokens are constants in an exported program.
        """
        x = pad_to_windows(x, self.window_size)
        windows = window_partition(self.norm1(x), self.window_size)  # B × n × L × C
        if not self.attn.has_window_tokens:
            return windows
        return embed_window_tokens(windows, self.norm1(self.tokens_of(x)))

    def tokens_of(self, x: Tensor) -> Tensor:
        """Window tokens, 1 × n × 1 × C, 1 × 1 × 1 × C or B × n × 1 × C, of a padded map, B × H × W × C."""
        _, H, W, C = x.shape
        if self.window_tokens == "average":
            return window_partition(x, self.window_size).mean(dim=2, keepdim=True)
        if self.win_conv is not None:
            tokens = self.win_conv(x.permute(0, 3, 1, 2))  # B × C × rows × columns
            return tokens.flatten(2).transpose(1, 2).unsqueeze(2)  # B × n × 1 × C
        if self.win_tokens is None:
            return x.new_zeros(1, 1, 1, C)
        if self.resampling is not None and self.grid is not None:
            return self.resampling(self.win_tokens, self.grid, H, W)
        return self.win_tokens


# ----------------------------------------------------------------------------------------------------------------------
# The network: four stages, and its two forms
# ----------------------------------------------------------------------------------------------------------------------


class OverlapPatchEmbed(nn.Module):
    """Overlapping patch embedding: a strided convolution, then LayerNorm; B × C_in × H × W to B × H' × W' × C.

    With a kernel as large as its stride, patches do not overlap. The image is then padded to a multiple of the stride.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding, self.multiple = (kernel_size // 2, 1) if kernel_size > stride else (0, stride)
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding)
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if self.multiple > 1:
            x = F.pad(x, (0, -x.shape[3] % self.multiple, 0, -x.shape[2] % self.multiple))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConditionalPositionalEncoding(nn.Module):
    """Conditional positional encoding: x + dwconv3×3(x); keeps B × H × W × C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))  # named proj.0.…, as published

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # B × H × W × C
        # Added with three dimensions: with four, OpenVINO converts the layout before and after each convolution.
        return (x.flatten(1, 2) + y.flatten(1, 2)).view(x.shape)


def init_weights(module: nn.Module) -> None:
    """Initialise one layer; a function for `Module.apply`. LayerNorms and window tokens keep their initial values."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        assert module.bias is not None
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        nn.init.zeros_(module.bias)


class SepViTStages(nn.Module):
    """Base class of both forms: the four stages. The dense form has a LayerNorm after each stage (`norm_list`).

    Args:
        img_size: image size (H, W) in pixels for the classification form; None for the dense form (any size).
        in_chans: image channels.
        embed_dims: channels of each stage.
        num_heads: heads of each stage.
        depths: blocks of each stage.
        window_sizes: window sides per stage, cycled over its blocks; by default `WINDOW_SIZES`.
        mlp_ratio: hidden channels of the MLPs divided by the stage's channels.
        drop_rate: dropout rate after the patch embeddings and projections, and in the MLPs.
        attn_drop_rate: dropout rate of the attention maps.
        drop_path_rate: stochastic depth rate of the last block. Rates rise linearly from 0 at the first block.
        grouped: grouped attention; without it, all windows have side 7. Excludes `window_sizes`.
        pointwise: see `Variation`, as for the other settings below.
        inner_shortcuts: see there.
        overlap: see there.
        positional_encoding: see there.
        window_tokens: see there; by default 'learned' in the classification form and 'zeros' in the dense form.
        dynamic_img_size: accept images of any size in the classification form. The dense form always does.

    Raises:
        ValueError: an image side is below 1 pixel, or settings are unknown or exclude each other.
    """

    def __init__(
        self,
        img_size: tuple[int, int] | None,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (1, 2, 6, 2),
        window_sizes: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pointwise: bool = True,
        grouped: bool = True,
        inner_shortcuts: bool = True,
        overlap: bool = True,
        positional_encoding: str = "conditional",
        window_tokens: str | None = None,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        window_tokens = window_tokens or ("zeros" if img_size is None else "learned")
        if img_size is None and window_tokens == "learned":
            raise ValueError("window_tokens='learned': the dense form has none; choose 'zeros' or another kind")
        if window_sizes is not None and not grouped:
            raise ValueError(f"window_sizes={window_sizes} and grouped=False: choose one")
        window_sizes = window_sizes or (WINDOW_SIZES if grouped else tuple(sides[:1] for sides in WINDOW_SIZES))
        self.variation = varied = Variation(pointwise, inner_shortcuts, overlap, positional_encoding, window_tokens)
        if img_size is not None and min(img_size) < 1:
            raise ValueError(f"img_size={img_size}: both sides must be at least 1 pixel")
        self.img_size = img_size
        self.is_dense = img_size is None
        self.dynamic_img_size = dynamic_img_size
        self.in_chans = in_chans
        self.embed_dims = tuple(embed_dims)
        self.grad_checkpointing = False
        self.frozen_stages = -1
        self.feature_info = []

        self.patch_embeds = nn.ModuleList()
        self.pos_block = nn.ModuleList()
        self.blocks: Any = nn.ModuleList()  # one ModuleList per stage, a nesting that torch's types cannot express
        self.norm_list = nn.ModuleList()
        self.pos_drop = nn.Dropout(drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            previous = in_chans if i == 0 else embed_dims[i - 1]
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            self.patch_embeds.append(OverlapPatchEmbed(previous, dim, kernel if varied.overlap else stride, stride))
            is_encoded = varied.positional_encoding == "conditional"
            self.pos_block.append(ConditionalPositionalEncoding(dim) if is_encoded else nn.Identity())
            sides = [window_sizes[i][j % len(window_sizes[i])] for j in range(depth)]
            self.blocks.append(
                nn.ModuleList(
                    SepViTBlock(
                        dim,
                        num_heads[i],
                        side,
                        None if img_size is None else window_grid(img_size, i, side),
                        mlp_ratio=mlp_ratio,
                        drop=drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=rates[i][j],
                        variation=varied,
                        dynamic=dynamic_img_size,
                    )
                    for j, side in enumerate(sides)
                )
            )
            self.norm_list.append(LayerNorm(dim, eps=1e-6) if img_size is None else nn.Identity())
            last = f"blocks.{i}.{depth - 1}" if depth > 1 else f"pos_block.{i}"
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=last))
        self.register_load_state_dict_pre_hook(_adapt_before_loading)
        self.register_state_dict_post_hook(_record_settings)

    def forward_stages(self, x: Tensor, count: int = 4) -> list[Tensor]:
        """Compute the maps of the first `count` stages, B × H' × W' × C each, from images, B × C_in × H × W."""
        maps: list[Tensor] = []
        stages = zip(self.patch_embeds, self.pos_block, self.blocks, self.norm_list)
        for i, (patch_embed, pos_block, blocks, norm) in enumerate(stages):
            if i < count:
                x = patch_embed(x)  # B × H' × W' × C
                if i >= self.frozen_stages:
                    x = self.pos_drop(x)
                for j, block in enumerate(blocks):
                    if self.grad_checkpointing and not torch.jit.is_scripting():
                        x = checkpoint(block, x)
                    else:
                        x = block(x)
                    if j == 0:
                        x = pos_block(x)
                x = norm(x)  # in the dense form, the next stage also starts from the normalised map
                maps.append(x)
                x = x.permute(0, 3, 1, 2)  # B × C × H' × W'
        return maps

    def keep_stages(self, count: int) -> None:
        """Keep only the first `count` stages."""
        self.patch_embeds = self.patch_embeds[:count]
        self.pos_block = self.pos_block[:count]
        self.blocks = self.blocks[:count]
        self.norm_list = self.norm_list[:count]

    def named_blocks(self) -> dict[str, SepViTBlock]:
        """All blocks, by name."""
        return {name: block for name, block in self.named_modules() if isinstance(block, SepViTBlock)}

    def window_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of windows in every block for images of `img_size` (H, W) pixels."""
        blocks = self.named_blocks().items()
        return [window_grid(img_size, _stage_of(name), block.window_size) for name, block in blocks]

    @torch.jit.ignore
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor that the shapes of the weights do not show. State dicts record them."""
        return dict(
            **vars(self.variation),
            num_heads=[blocks[0].attn.num_heads for blocks in self.blocks],
            window_sizes=[[block.window_size for block in blocks] for blocks in self.blocks],
        )

    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages with their patch embeddings, like `frozen_stages` of mmseg's backbones.

        -1 freezes nothing, and 0 only the first patch embedding. If all stages of a classifier are frozen, so is its
        norm. Frozen parts stay in evaluation mode, without stochastic depth.
        """
        self.frozen_stages = count
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _frozen_parts(self) -> list[nn.Module]:
        parts = [self.patch_embeds[0]] if self.frozen_stages >= 0 else []
        for layers in (self.patch_embeds, self.pos_block, self.blocks, self.norm_list):
            parts += layers[: max(0, self.frozen_stages)]
        return [*parts, self.norm] if isinstance(self, SepViT) and self.frozen_stages == len(self.blocks) else parts

    def train(self, mode: bool = True) -> "SepViTStages":
        """Set training or evaluation mode, except for frozen parts."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in addition to biases and norms: the window tokens."""
        return {name for name, _ in self.named_parameters() if name.endswith("win_tokens")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters into layers, for layer decay: a layer per block, or per stage if `coarse`."""
        if coarse:
            return dict(stem=r"^patch_embeds\.0", blocks=r"^(?:patch_embeds|pos_block|blocks)\.(\d+)")
        return dict(
            stem=r"^patch_embeds\.0",
            blocks=[
                (r"^(?:patch_embeds|pos_block)\.(\d+)", (0,)),
                (r"^blocks\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )


def _stage_of(block: str) -> int:
    """Index of a block's stage, from the block's name, blocks.STAGE.INDEX."""
    return int(block.split(".")[1])


class SepViT(SepViTStages):
    """SepViT for classification, with timm's interface: stages, LayerNorm, global pooling, linear classifier.

    With `dynamic_img_size`, images may have any size, and the window tokens are resampled to it. Blocks that have
    several windows at `img_size` keep their pointwise attention at every size, and the others have none at any size.

    Args:
        img_size: image size in pixels, one number or (H, W).
        num_classes: number of classes; 0 for no classifier.
        global_pool: 'avg', 'max', or '' to skip pooling and classify every pixel of the map.
        dense: use the stages of the dense form, which accept any size. The last one's map needs no further norm.
        **kwargs: see `SepViTStages`.

    Raises:
        ValueError: `global_pool` is unknown.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        self.img_size: tuple[int, int]
        size = to_2tuple(img_size)
        super().__init__(None if dense else size, **kwargs)
        self.img_size = size
        self.num_classes = num_classes
        self.global_pool = _checked_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dims[-1]
        self.norm: nn.Module = nn.Identity() if dense else LayerNorm(self.num_features, eps=1e-6)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last stage's normalised map, B × H' × W' × C, from images, B × C_in × H × W.

        Raises:
            AssertionError: the images are not of size `img_size`, and the network does not accept any size.
        """
        self.check_input_size(x)
        return self.norm(self.forward_stages(x)[-1])

    def check_input_size(self, x: Tensor) -> None:
        """Refuse images, B × C_in × H × W, of a size other than `img_size`, unless any size is accepted.

        Raises:
            AssertionError: the size is wrong.
        """
        if not (self.is_dense or self.dynamic_img_size):
            check_input_size(x, self.img_size)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map of `forward_features` to B × C and, unless `pre_logits`, compute logits, B × classes.

        With `global_pool` '', nothing is pooled, and the result is B × H' × W' × C or B × H' × W' × classes.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        elif self.global_pool == "max":
            x = x.amax(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, B × classes, from images, B × C_in × H × W."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, or `nn.Identity` if the model has none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a fresh one for `num_classes` classes (0: none), and set the pooling if given."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
            init_weights(self.head)
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Adapt the model to images of `img_size` pixels (one number or (H, W)), keeping its weights.

        Window tokens are resampled. Blocks that change from one window to several gain fresh window tokens and
        pointwise attention; blocks that change from several windows to one lose both. The dense form needs no change.
        """
        size: tuple[int, int] = to_2tuple(img_size)
        old_grids, grids = self.window_grids(self.img_size), self.window_grids(size)
        for block, old_grid, grid in zip(self.named_blocks().values(), old_grids, grids):
            if self.is_dense or grid == old_grid:
                continue
            old_tokens = block.win_tokens
            block.set_grid(grid)
            if old_tokens is not None and block.win_tokens is not None and block.window_tokens == "learned":
                block.win_tokens.data = resample_window_tokens(old_tokens.data, old_grid, grid)
                block.win_tokens.requires_grad_(old_tokens.requires_grad)
        self.img_size = size
        update_model_input_size(self, size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the stages' maps (timm's interface for feature extraction).

        Args:
            x: images, B × C_in × H × W.
            indices: stages to return: a list, a number n for the last n, or None for all.
            norm: normalise the last stage's map; the other stages have no norm in this form.
            stop_early: skip the stages after the last one to return.
            output_fmt: 'NCHW' for B × C × H × W, 'NHWC' for B × H × W × C.
            intermediates_only: return the maps without the final features.

        Returns:
            the maps if `intermediates_only`, otherwise the final features, B × H' × W' × C, and the maps. The final
            features equal `forward_features(x)` if all stages were computed.
        """
        _assert(output_fmt in ("NCHW", "NHWC"), "output_fmt must be NCHW or NHWC")
        self.check_input_size(x)
        take, last = feature_take_indices(len(self.blocks), indices)
        maps = self.forward_stages(x, last + 1) if stop_early else self.forward_stages(x)
        final = self.norm(maps[-1]) if len(maps) == len(self.embed_dims) else maps[-1]
        intermediates = [final if norm and i == len(self.embed_dims) - 1 else maps[i] for i in take]
        if output_fmt == "NCHW":
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last requested stage (see `indices` of `forward_intermediates`).

        The norm and the head are dropped if requested, or if any stage is dropped.

        Returns:
            the indices of the requested stages, counted from 0.
        """
        take, last = feature_take_indices(len(self.blocks), indices)
        prune_end = last < len(self.blocks) - 1
        self.keep_stages(last + 1)
        self.num_features = self.head_hidden_size = self.embed_dims[last]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", "max", ""):
        raise ValueError(f"global_pool={global_pool!r}: choose 'avg', 'max' or '' (none)")
    return global_pool


class SepViTDense(SepViTStages):
    """SepViT for dense prediction (segmentation, detection). Computes a normalised map per stage, for any image size.

    Args:
        out_indices: stages whose maps are returned, in this order. Stages after the last of these are dropped.
        **kwargs: see `SepViTStages`.

    Raises:
        ValueError: there is no index, or an index is out of range.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        if not out_indices or not set(out_indices) <= set(range(len(self.blocks))):
            raise ValueError(f"out_indices={tuple(out_indices)}: choose from the stages 0 to {len(self.blocks) - 1}")
        self.out_indices = tuple(out_indices)
        self.keep_stages(max(out_indices) + 1)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps from images, B × C_in × H × W.

        Returns:
            maps of the stages in `out_indices`, B × C × H' × W' each. The four stages' strides are 4, 8, 16 and 32.
        """
        maps = self.forward_stages(x)
        return tuple(maps[i].permute(0, 3, 1, 2).contiguous() for i in self.out_indices)


# ----------------------------------------------------------------------------------------------------------------------
# The paper's variants
# ----------------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "SepViT_Lite": dict(embed_dims=(32, 64, 128, 256), num_heads=(1, 2, 4, 8), depths=(1, 2, 6, 2)),
    "SepViT_Tiny": dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(1, 2, 6, 2)),
    "SepViT_Small": dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(1, 2, 14, 2)),
    "SepViT_Base": dict(embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(1, 2, 14, 2)),
}


def create_dense(variant: str, **kwargs: Any) -> SepViTDense:
    """Build the dense form of a variant ('SepViT_Tiny', …). For `kwargs`, see `SepViTDense`.

    Raises:
        ValueError: the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose from {', '.join(VARIANTS)}")
    return SepViTDense(**{**VARIANTS[variant], **kwargs})


FORMS: dict[str, dict[str, bool]] = {"": {}, "_dynamic": dict(dynamic_img_size=True), "_dense": dict(dense=True)}

default_cfgs = generate_default_cfgs(
    {
        variant + form: dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            fixed_input_size=not form,
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embeds.0.proj",
            classifier="head",
            license="apache-2.0",
        )
        for variant in VARIANTS
        for form in FORMS
    }
)


def _create_sepvit(variant: str, form: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        SepViT,
        variant + form,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **{**VARIANTS[variant], **FORMS[form], **kwargs},
    )


@register_model
def SepViT_Lite(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SepViT-Lite: 3.7 M parameters, 0.57 G multiply-adds at 224 × 224; `kwargs`: see `SepViT` and `create_model`."""
    return _create_sepvit("SepViT_Lite", "", pretrained, **kwargs)


@register_model
def SepViT_Tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SepViT-T: 31.2 M parameters, 4.5 G multiply-adds at 224 × 224; `kwargs`: see `SepViT` and `create_model`."""
    return _create_sepvit("SepViT_Tiny", "", pretrained, **kwargs)


@register_model
def SepViT_Small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SepViT-S: 46.6 M parameters, 7.5 G multiply-adds at 224 × 224; `kwargs`: see `SepViT` and `create_model`."""
    return _create_sepvit("SepViT_Small", "", pretrained, **kwargs)


@register_model
def SepViT_Base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SepViT-B: 82.4 M parameters, 13.1 G multiply-adds at 224 × 224; `kwargs`: see `SepViT` and `create_model`."""
    return _create_sepvit("SepViT_Base", "", pretrained, **kwargs)


def _register(variant: str, form: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_sepvit(variant, form, pretrained, **kwargs)

    create.__name__ = variant + form
    register_model(create)


# SepViT_Tiny_dynamic, SepViT_Tiny_dense, and so on: names for images of any size. Some libraries pass only a name.
for _variant, _form in itertools.product(VARIANTS, list(FORMS)[1:]):
    _register(_variant, _form)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of other sizes and forms
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Adaptation:
    """Names of the entries that `adapt_state_dict` resampled, took from the model (`fresh`), or dropped."""

    resampled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.resampled or self.fresh or self.dropped)

    def __str__(self) -> str:
        parts = (("resampled", self.resampled), ("fresh", self.fresh), ("dropped", self.dropped))
        return "; ".join(f"{what} {len(names)}: {', '.join(names)}" for what, names in parts if names)


def entries_under(state_dict: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """Entries of the module named `prefix`, without the prefix; all entries if it is ''. A trailing dot is optional."""
    below = f"{prefix.removesuffix('.')}." if prefix else ""
    named = ((name.removeprefix(below), value) for name, value in state_dict.items() if name.startswith(below))
    return keep_settings(named, state_dict)


def adapt_state_dict(
    state_dict: dict[str, Tensor], model: SepViTStages, img_size: tuple[int, int] | None = None
) -> Adaptation:
    """Adapt a state dict in place to the image size and the form of `model`.

    In the classification form, window tokens are resampled from the checkpoint's window grids to the model's. The
    checkpoint's image size is assumed to be the first of these that matches its numbers of window tokens: `img_size`,
    the model's image size, 224 × 224, and square sizes. Blocks that change from one window to several take their window
    tokens and pointwise attention from the model; blocks that change from several windows to one lose both.

    In the dense form, the window tokens, the final norm, the classifier, and stages that the model lacks are dropped.
    If the checkpoint has no norms of the stages' maps (`norm_list`), these norms are taken from the model. So is the
    pointwise attention of blocks that have no window tokens in the checkpoint.

    All other differences remain, and `load_state_dict` rejects them.

    Args:
        state_dict: the checkpoint's entries.
        model: the model to load them into.
        img_size: the checkpoint's image size (H, W), from its settings; None if unknown.
    """
    if isinstance(model, SepViT) and not model.is_dense:
        return _adapt_to_size(state_dict, model, img_size)
    return _adapt_to_dense(state_dict, model)


def _pointwise_names(block: str) -> list[str]:
    return [f"{block}.attn.{layer}.{kind}" for layer in ("win_tokens_norm", "PSA_qk") for kind in ("weight", "bias")]


def _adapt_to_dense(state_dict: dict[str, Tensor], model: SepViTStages) -> Adaptation:
    own, count = model.state_dict(), len(model.blocks)
    adaptation = Adaptation()
    surplus = re.compile(rf"(norm|head)\.\w+$|blocks\.\d+\.\d+\.win_tokens$|\w+\.[{count}-9]\.")
    if not any(name.startswith("norm_list.") for name in state_dict):
        single = [block for block in model.named_blocks() if f"{block}.win_tokens" not in state_dict]
        may_lack = [name for block in single for name in _pointwise_names(block) if name in own]
        may_lack += [name for name in own if name.startswith("norm_list.")]
        adaptation.fresh = [name for name in may_lack if name not in state_dict]
    adaptation.dropped = [name for name in state_dict if surplus.match(name) and name not in own]
    _apply(adaptation, state_dict, own)
    return adaptation


def _adapt_to_size(state_dict: dict[str, Tensor], model: SepViT, img_size: tuple[int, int] | None) -> Adaptation:
    own, blocks = model.state_dict(), model.named_blocks()
    if model.variation.window_tokens != "learned":
        return _adapt_blocks(state_dict, own, list(blocks))
    old_grids, grids = _source_grids(state_dict, model, img_size), model.window_grids(model.img_size)
    # Adapt only differences that result from the image size. A checkpoint that lacks entries for any other reason must
    # be rejected, not completed.
    if old_grids is None or not all(f"{block}.attn.DSA_qkv.weight" in state_dict for block in blocks):
        return Adaptation()
    adaptation = Adaptation()
    for block, old_grid, grid in zip(blocks, old_grids, grids):
        tokens = f"{block}.win_tokens"
        names = [tokens, *_pointwise_names(block)]
        if math.prod(old_grid) == 1:
            adaptation.fresh += [name for name in names if name in own and name not in state_dict]
        elif math.prod(grid) == 1:
            adaptation.dropped += [name for name in names if name in state_dict]
        elif grid != old_grid:
            state_dict[tokens] = resample_window_tokens(state_dict[tokens], old_grid, grid)
            adaptation.resampled.append(tokens)
    _apply(adaptation, state_dict, own)
    return adaptation


def _adapt_blocks(state_dict: dict[str, Tensor], own: dict[str, Tensor], blocks: list[str]) -> Adaptation:
    """Adapt blocks that have several windows only in the checkpoint, or only in the model: tokens have no size."""
    adaptation = Adaptation()
    for block in blocks:
        names = _pointwise_names(block) + [f"{block}.{n}" for n in ("win_tokens", "win_conv.weight", "win_conv.bias")]
        held, wanted = ([name for name in names if name in entries] for entries in (state_dict, own))
        if not held or not wanted:
            adaptation.fresh += wanted
            adaptation.dropped += held
    _apply(adaptation, state_dict, own)
    return adaptation


def _apply(adaptation: Adaptation, state_dict: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name in adaptation.dropped:
        del state_dict[name]
    for name in adaptation.fresh:
        state_dict[name] = own[name]


def _source_grids(
    state_dict: dict[str, Tensor], model: SepViT, img_size: tuple[int, int] | None
) -> list[tuple[int, int]] | None:
    """Find the window grids of a checkpoint's blocks; None if they equal the model's, or if no image size fits.

    An image size fits if, in every block, rows times columns of windows equals the number of window tokens. A block
    without window tokens counts as having one.
    """
    tokens = [state_dict.get(f"{name}.win_tokens") for name in model.named_blocks()]
    counts = [1 if entry is None else entry.shape[1] for entry in tokens]
    first = 4 * model.blocks[0][0].window_size  # window side of the first block, in image pixels
    longest = math.isqrt(counts[0]) * first
    squares = ((side, side) for side in range(longest - first + 1, longest + 1))
    own = model.window_grids(model.img_size)
    for size in ([img_size] if img_size and min(img_size) > 0 else []) + [model.img_size, (224, 224), *squares]:
        grids = model.window_grids(size)
        if [math.prod(grid) for grid in grids] == counts:
            return grids if grids != own else None
    return None


def resample_window_tokens(tokens: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample window tokens, 1 × n × 1 × C, from an old grid of windows to a new one."""
    C = tokens.shape[-1]
    grid = tokens.float().view(1, old[0], old[1], C).permute(0, 3, 1, 2)  # 1 × C × rows × columns
    grid = F.interpolate(grid, size=[new[0], new[1]], mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], 1, C).to(tokens.dtype)


def mark_adapted(state_dict: Mapping[str, Tensor], prefix: str = "") -> OrderedDict[str, Tensor]:
    """Mark the entries of the module named `prefix` as adapted, so that loading does not adapt them again.

    Returns:
        a copy of the state dict. The mark is in its `_metadata`, which `load_state_dict` passes to each module's hooks.
    """
    name = prefix.removesuffix(".")
    metadata = dict(getattr(state_dict, "_metadata", {}))
    metadata[name] = {**metadata.get(name, {}), "sepvit_adapted": True}
    marked = OrderedDict(state_dict)
    marked._metadata = metadata  # type: ignore[attr-defined]
    return marked


def _record_settings(model: SepViTStages, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Post-hook of `state_dict`: record the network's settings in its metadata, which torch.save keeps."""
    local_metadata["settings"] = model.settings()


def settings_of(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of the SepViT in a state dict; None if they are not recorded."""
    metadata = getattr(state_dict, "_metadata", {})
    return next((entry["settings"] for entry in metadata.values() if "settings" in entry), None)


def keep_settings(entries: Iterable[tuple[str, Tensor]], state_dict: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """Make a state dict of `entries` that keeps the settings recorded in `state_dict`."""
    kept = OrderedDict(entries)
    if settings := settings_of(state_dict):
        kept._metadata = {"": dict(settings=settings)}  # type: ignore[attr-defined]
    return kept


def default_settings(variant: str) -> dict[str, Any]:
    """Settings of one of the paper's variants, in the form of `SepViTStages.settings`."""
    sizes = VARIANTS[variant]
    sides = [[sides[j % len(sides)] for j in range(depth)] for sides, depth in zip(WINDOW_SIZES, sizes["depths"])]
    return dict(**vars(PUBLISHED), num_heads=list(sizes["num_heads"]), window_sizes=sides)


def _adapt_before_loading(
    model: SepViTStages, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Pre-hook of `load_state_dict`: adapt a state dict unless it is marked as adapted, and warn of any change."""
    if local_metadata.get("sepvit_adapted"):
        return
    entries, recorded = entries_under(state_dict, prefix), local_metadata.get("settings")
    if recorded and not model.is_dense and recorded != model.settings():
        _logger.warning("the weights were trained with %s, not %s", recorded, model.settings())
    adaptation = adapt_state_dict(entries, model)
    for name in adaptation.dropped:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: entries[name] for name in adaptation.resampled + adaptation.fresh})
    if adaptation:
        _logger.warning("checkpoint of a different size or form: %s", adaptation)


def variant_of(state_dict: dict[str, Tensor]) -> str | None:
    """Identify a state dict's variant by its widths and depths; None if it is not one of the paper's variants."""
    stages: dict[int, set[int]] = {}
    for name in state_dict:
        if match := re.match(r"blocks\.(\d+)\.(\d+)\.attn\.DSA_qkv\.weight$", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(stages[i]) for i in sorted(stages))
    weights = [state_dict.get(f"patch_embeds.{i}.proj.weight") for i in range(len(depths))]
    embed_dims = tuple(weight.shape[0] for weight in weights if weight is not None)
    for variant, sizes in VARIANTS.items():
        if (embed_dims, depths) == (sizes["embed_dims"], sizes["depths"]):
            return variant
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Workarounds for kernels and compilers
# ----------------------------------------------------------------------------------------------------------------------


@register_notrace_function
def pad_to_windows(x: Tensor, window_size: int) -> Tensor:
    """Zero-pad a map, B × H × W × C, at the bottom and right to a multiple of the window side."""
    _, H, W, _ = x.shape
    w = window_size
    bottom, right = (H + w - 1) // w * w - H, (W + w - 1) // w * w - W
    is_fixed = isinstance(H, int) and isinstance(W, int)  # False in exported programs, which take any size
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if not is_fixed or bottom > 0 or right > 0 else x


@register_notrace_function
def crop_padding(x: Tensor, H: int, W: int) -> Tensor:
    """Crop a padded map, B × rows·w × columns·w × C, to B × H × W × C."""
    is_fixed = isinstance(H, int) and isinstance(W, int)  # False in exported programs, which take any size
    return x if is_fixed and x.shape[1] == H and x.shape[2] == W else x[:, :H, :W]


MAX_WINDOWS = 65_535  # per call: the limit of a CUDA grid in y and z


@register_notrace_function
def window_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, max_windows: int = MAX_WINDOWS) -> Tensor:
    """Scaled dot-product attention within each window, at most `max_windows` windows at a time.

    Args:
        q: queries, B·n × h × T × d.
        k: keys, of the same shape.
        v: values, of the same shape.
        dropout: dropout rate of the attention maps.
        max_windows: windows per call of the fused kernel.

    Returns:
        outputs, B·n × h × T × d.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 TorchScript skips the inner condition, which it cannot compile
        if torch.compiler.is_exporting():
            max_windows = q.shape[0]  # an exported program takes any batch size
    if q.requires_grad and q.is_cpu and q.dtype in (torch.bfloat16, torch.float16):
        # Written out: on CPUs, the fused kernel's backward pass in 16 bits takes five times as long as in float32.
        P = window_weights(q, k)  # B·n × h × T × T
        return F.dropout(P, dropout).to(v.dtype) @ v
    if q.shape[0] <= max_windows:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    parts = [
        F.scaled_dot_product_attention(qs, ks, vs, dropout_p=dropout)
        for qs, ks, vs in zip(q.split(max_windows), k.split(max_windows), v.split(max_windows))
    ]
    return torch.cat(parts)


@register_notrace_function
def check_input_size(x: Tensor, img_size: tuple[int, int]) -> None:
    H, W = x.shape[-2:]
    _assert(
        img_size[0] == H and img_size[1] == W,
        f"input is {H} × {W} pixels, but this model was built for {img_size[0]} × {img_size[1]}: "
        "build it with img_size=(H, W) or call set_input_size",
    )


# ----------------------------------------------------------------------------------------------------------------------
# The export form
# ----------------------------------------------------------------------------------------------------------------------


def exportable(network: nn.Module) -> nn.Module:
    """Return a copy of a network in its export form, for inference only; outputs are the same up to rounding.

    Queries, keys and values have separate linear layers, which also scale the queries; attention is a softmax between
    two matrix products instead of a fused kernel; and no tensor has more than four dimensions, the limit of ncnn.
    Modules other than SepViT's attention are only copied.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if type(module) is SeparableSelfAttention:
            attention: Any = module
            attention.__class__ = _ExportableAttention
            attention.DSA_qkv = _split(attention.DSA_qkv, 3, attention.scale)
            if attention.PSA_qk is not None:
                attention.PSA_qk = _split(attention.PSA_qk, 2, attention.scale)
    return network.eval()


def _split(layer: nn.Linear, count: int, scale: float) -> nn.ModuleList:
    """Split a layer into `count` layers with an equal share of its outputs. The outputs of the first are scaled."""
    parts = nn.ModuleList()
    for weight, bias in zip(layer.weight.data.chunk(count), layer.bias.data.chunk(count)):
        part = nn.Linear(layer.in_features, layer.out_features // count)
        factor = 1.0 if parts else scale
        part.weight.data, part.bias.data = factor * weight, factor * bias
        parts.append(part)
    return parts


class _ExportableAttention(SeparableSelfAttention):
    """Attention in its export form, with the shapes of `SeparableSelfAttention`. Queries are already scaled."""

    DSA_qkv: Any
    PSA_qk: Any
    win_tokens_norm: Any

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply one of the layers, and split its outputs into heads: B × … × T × C to B·… × h × T × d."""
        x, T = x.flatten(1, -2), x.shape[-2]
        return layer(x).view(-1, T, self.num_heads, self.head_dim).transpose(1, 2)

    def depthwise_heads(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self._heads(layer, z) for layer in self.DSA_qkv)  # each B·n × h × T × d
        return q, k, v

    def depthwise_weights(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1), dim=-1)

    def depthwise(self, z: Tensor) -> Tensor:
        q, k, v = self.depthwise_heads(z)  # each B·n × h × T × d
        return self.join_heads(self.depthwise_weights(q, k) @ v, z)

    def pointwise_weights(self, a: Tensor) -> Tensor:
        t = F.gelu(self.win_tokens_norm(a[:, :, 0]))  # B × n × C
        q, k = (self._heads(layer, t) for layer in self.PSA_qk)  # each B × h × n × d
        return torch.softmax(q @ k.transpose(-2, -1), dim=-1)

    def mix_windows(self, P: Tensor, a: Tensor) -> Tensor:
        _, n, T, _ = a.shape
        h, d, L = self.num_heads, self.head_dim, T - 1
        f = a[:, :, 1:].reshape(-1, n * L, h, d).transpose(1, 2)  # B × h × n·L × d
        f = f.reshape(-1, h, n, L * d)
        return P @ f + f if self.inner_shortcuts else P @ f

    def heads_to_map(self, f: Tensor, H: int, W: int) -> Tensor:
        h, n, w, d = self.num_heads, f.shape[2], self.window_size, self.head_dim
        f = f.view(-1, h, n * w * w, d).transpose(1, 2)  # B × n·L × h × d
        return window_reverse(f.reshape(-1, n, w * w, h * d), w, H, W)

    def project(self, x: Tensor) -> Tensor:
        return self.proj(x.flatten(1, 2)).view(-1, *x.shape[1:])
