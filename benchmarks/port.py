"""An unoptimised port of SepViT: the equations, implemented literally with standard layers.

It is the baseline for the optimised network: for speed and memory in `benchmarks/benchmark.py`, and for outputs and
gradients in `tests/commands/test_benchmark.py`. Maps are kept as sequences of pixels. They are copied to B × C × H × W
for convolutions, and partitioned into windows for attention. Attention is two matrix products and a softmax.

Shapes use the notation of `sepvit.py`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from sepvit import SepViTDense


class Attention(nn.Module):
    """Depthwise self-attention in each window, then pointwise self-attention across windows.

    Args:
        dim: channels C.
        num_heads: heads h.
        has_tokens: whether the windows have window tokens. Without them, there is no pointwise self-attention.
    """

    def __init__(self, dim: int, num_heads: int, has_tokens: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.DSA_qkv = nn.Linear(dim, 3 * dim)
        if has_tokens:
            self.win_tokens_norm = nn.LayerNorm(dim, eps=1e-5)
            self.PSA_qk = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def depthwise(self, z: Tensor) -> Tensor:
        """Attend within each window; keeps the shape B × n × T × C."""
        B, n, T, C = z.shape
        h = self.num_heads
        qkv = self.DSA_qkv(z).reshape(B * n, T, 3, h, C // h).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # B·n × h × T × d
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)  # B·n × h × T × T
        return (attention @ v).transpose(1, 2).reshape(B, n, T, C) + z

    def pointwise(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Mix windows, weighted by the attention among their window tokens.

        Args:
            tokens: window tokens, B × n × C.
            pixels: the windows' pixels, B × n × L × C.

        Returns:
            B × n × L × C.
        """
        B, n, L, C = pixels.shape
        h, d = self.num_heads, C // self.num_heads
        t = F.gelu(self.win_tokens_norm(tokens))
        qk = self.PSA_qk(t).reshape(B, n, 2, h, d).permute(2, 0, 3, 1, 4)
        q, k = qk[0], qk[1]  # B × h × n × d
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)  # B × h × n × n
        f = pixels.reshape(B, n, L, h, d).permute(0, 3, 1, 2, 4).reshape(B, h, n, L * d)
        f = attention @ f + f
        return f.reshape(B, h, n, L, d).permute(0, 2, 3, 1, 4).reshape(B, n, L, C)


class Block(nn.Module):
    """Window partition, window tokens, attention and MLP.

    Args:
        dim: channels C.
        num_heads: heads h.
        window_size: window side w.
        windows: number of windows, which have learned tokens if there are several; None to use zeros as tokens.
        drop_path: stochastic depth rate.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, windows: int | None, drop_path: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.has_tokens = windows is None or windows > 1
        self.win_tokens: nn.Parameter | None = None
        if windows is not None and self.has_tokens:
            self.win_tokens = nn.Parameter(torch.zeros(1, windows, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, self.has_tokens)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """Apply the block to a map; keeps the shape B × H·W × C."""
        x = x + self.drop_path(self.attend(x, H, W))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, H: int, W: int) -> Tensor:
        """Partition the map into windows, attend, and merge the windows."""
        B, _, C = x.shape
        w = self.window_size
        rows, columns = math.ceil(H / w), math.ceil(W / w)
        x = x.reshape(B, H, W, C)
        if rows * w != H or columns * w != W:
            x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H))
        x = x.reshape(B, rows, w, columns, w, C).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, rows * columns, w * w, C)
        if self.has_tokens:
            tokens = x.new_zeros(1, rows * columns, 1, C) if self.win_tokens is None else self.win_tokens
            x = torch.cat([tokens.expand(B, -1, -1, -1), x], dim=2)  # B × n × (1+L) × C
        x = self.attn.depthwise(self.norm1(x))
        if self.has_tokens:
            x = self.attn.pointwise(x[:, :, 0], x[:, :, 1:])  # B × n × L × C
        x = x.reshape(B, rows, columns, w, w, C).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, rows * w, columns * w, C)[:, :H, :W].reshape(B, H * W, C)
        return self.attn.proj(x)


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: B × C_in × H × W to B × H'·W' × C. Also returns H' and W'."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        H, W = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), H, W


class PositionalEncoding(nn.Module):
    """Conditional positional encoding: x + dwconv3×3(x); keeps the shape B × H·W × C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        features = to_channels_first(x, H, W)
        return (self.proj(features) + features).flatten(2).transpose(1, 2)


def to_channels_first(x: Tensor, H: int, W: int) -> Tensor:
    """Copy a map from B × H·W × C to B × C × H × W."""
    return x.reshape(x.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous()


class Port(nn.Module):
    """An unoptimised port of a network, in its classification or dense form. It shares the network's parameters.

    Dropout is not ported; stochastic depth is.

    Args:
        network: the network, a `SepViT` or a `SepViTDense`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.is_dense = isinstance(network, SepViTDense)
        self.out_indices = network.out_indices if isinstance(network, SepViTDense) else ()
        dims = network.embed_dims[: len(network.blocks)]
        with torch.device("meta"):
            self.patch_embeds, self.pos_block = nn.ModuleList(), nn.ModuleList()
            for i, dim in enumerate(dims):
                previous = dims[i - 1] if i else network.in_chans
                self.patch_embeds.append(PatchEmbed(previous, dim, *((3, 2) if i else (7, 4))))
                self.pos_block.append(PositionalEncoding(dim))
            self.blocks: Any = nn.ModuleList(  # one ModuleList per stage, a nesting that torch's types cannot express
                nn.ModuleList(self._block(block, dim) for block in blocks) for blocks, dim in zip(network.blocks, dims)
            )
            if self.is_dense:
                self.norm_list = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
            else:
                self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
                self.head = nn.Linear(dims[-1], network.head.out_features)
        self.load_state_dict(network.state_dict(keep_vars=True), assign=True)
        self.train(network.training)

    def _block(self, block: Any, dim: int) -> Block:
        windows = None if self.is_dense else 1 if block.win_tokens is None else block.win_tokens.shape[1]
        rate = block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0
        return Block(dim, block.attn.num_heads, block.window_size, windows, rate or 0.0)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in addition to biases and norms: the window tokens."""
        return {name for name, _ in self.named_parameters() if name.endswith("win_tokens")}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits, or the dense form's maps, from images, B × C_in × H × W."""
        maps = []
        for i, blocks in enumerate(self.blocks):
            x, H, W = self.patch_embeds[i](x)
            for j, block in enumerate(blocks):
                x = block(x, H, W)
                if j == 0:
                    x = self.pos_block[i](x, H, W)
            if self.is_dense:
                x = self.norm_list[i](x)
            if self.is_dense or i + 1 < len(self.blocks):
                x = to_channels_first(x, H, W)  # for the next stage
            maps.append(x)
        if self.is_dense:
            return tuple(maps[i] for i in self.out_indices)
        return self.head(self.norm(x).mean(dim=1))
