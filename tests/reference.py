"""SepViT written from the equations alone: slow and obvious, with loops over windows and heads.

Shares no code with sepvit.py. Uses the published weight names, and torch so that gradients can be compared too.
"""

import math

import torch


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x, weight, bias):
    return torch.einsum("...i,oi->...o", x, weight) + bias


def softmax(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def convolution(x, weight, bias, stride, padding):
    """Convolve x, B × H × W × C, with a weight, out × in × k × k, or out × 1 × k × k for a depthwise convolution."""
    B, H, W, C = x.shape
    k = weight.shape[-1]
    padded = torch.zeros(B, H + 2 * padding, W + 2 * padding, C, dtype=x.dtype)
    padded[:, padding : padding + H, padding : padding + W] = x
    rows, columns = (H + 2 * padding - k) // stride + 1, (W + 2 * padding - k) // stride + 1
    out = torch.zeros(B, rows, columns, weight.shape[0], dtype=x.dtype)
    for row in range(rows):
        for column in range(columns):
            patch = padded[:, row * stride : row * stride + k, column * stride : column * stride + k]  # B × k × k × C
            depthwise = weight.shape[1] == 1 and C > 1
            equation = "bijc,cij->bc" if depthwise else "bijc,ocij->bo"
            out[:, row, column] = torch.einsum(equation, patch, weight[:, 0] if depthwise else weight) + bias
    return out


def attention(p, windows, tokens, heads, shortcut):
    """The attention part of a block, on windows, B × L × C each, and their window tokens, B × 1 × C each, or None."""
    n, C, d = len(windows), windows[0].shape[-1], windows[0].shape[-1] // heads
    outputs = []
    for i in range(n):  # depthwise self-attention, window by window
        z = windows[i] if tokens is None else torch.cat([tokens[i], windows[i]], dim=1)
        z = layer_norm(z, p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = linear(z, p["attn.DSA_qkv.weight"], p["attn.DSA_qkv.bias"])
        joined = []
        for h in range(heads):
            q, k, v = (qkv[..., part * C + h * d : part * C + (h + 1) * d] for part in range(3))
            joined.append(softmax(torch.einsum("bid,bjd->bij", q, k) / math.sqrt(d)) @ v)
        outputs.append(torch.cat(joined, dim=-1) + (z if shortcut else 0))
    if tokens is None:
        return [linear(a, p["attn.proj.weight"], p["attn.proj.bias"]) for a in outputs]

    t = torch.stack([a[:, 0] for a in outputs], dim=1)  # B × n × C
    f = [a[:, 1:] for a in outputs]
    t = gelu(layer_norm(t, p["attn.win_tokens_norm.weight"], p["attn.win_tokens_norm.bias"], 1e-5))
    qk = linear(t, p["attn.PSA_qk.weight"], p["attn.PSA_qk.bias"])
    mixed = []
    for i in range(n):  # pointwise self-attention: every window attends to all windows
        parts = []
        for h in range(heads):
            channels = slice(h * d, (h + 1) * d)
            q, k = qk[..., channels], qk[..., C + h * d : C + (h + 1) * d]
            P = softmax(torch.einsum("bid,bjd->bij", q, k) / math.sqrt(d))
            parts.append(sum(P[:, i, j, None, None] * f[j][..., channels] for j in range(n)))
        mixed.append(torch.cat(parts, dim=-1) + (f[i] if shortcut else 0))
    return [linear(a, p["attn.proj.weight"], p["attn.proj.bias"]) for a in mixed]


def window_token(p, kind, windows, i):
    """Token of window i, B × 1 × C."""
    B, L, C = windows[i].shape
    if kind == "learned":
        return p["win_tokens"][0, i].expand(B, 1, C)
    if kind == "shared":
        return p["win_tokens"][0, 0].expand(B, 1, C)
    if kind == "average":
        return sum(windows[i][:, pixel] for pixel in range(L))[:, None] / L
    if kind == "depthwise":
        weight = p["win_conv.weight"].reshape(C, L)
        return (sum(windows[i][:, pixel] * weight[:, pixel] for pixel in range(L)) + p["win_conv.bias"])[:, None]
    return torch.zeros(B, 1, C, dtype=windows[i].dtype)


def block(p, x, heads, w, dense, pointwise, shortcut, kind):
    """A block with window side w on a map, B × H × W × C."""
    B, H, W, C = x.shape
    rows, columns = math.ceil(H / w), math.ceil(W / w)
    padded = torch.zeros(B, rows * w, columns * w, C, dtype=x.dtype)
    padded[:, :H, :W] = x
    places = [(r * w, c * w) for r in range(rows) for c in range(columns)]
    windows = [padded[:, r : r + w, c : c + w].reshape(B, w * w, C) for r, c in places]
    tokens = None
    if pointwise and (dense or len(places) > 1):
        tokens = [window_token(p, kind, windows, i) for i in range(len(places))]
    attended = torch.zeros(B, rows * w, columns * w, C, dtype=x.dtype)
    for (r, c), a in zip(places, attention(p, windows, tokens, heads, shortcut)):
        attended[:, r : r + w, c : c + w] = a.reshape(B, w, w, C)
    x = x + attended[:, :H, :W]
    hidden = gelu(
        linear(layer_norm(x, p["norm2.weight"], p["norm2.bias"], 1e-6), p["mlp.fc1.weight"], p["mlp.fc1.bias"])
    )
    return x + linear(hidden, p["mlp.fc2.weight"], p["mlp.fc2.bias"])


def window_side(stage, index, grouped):
    """Window side of a block: stages 2 and 3 alternate windows of side 7 and 2 × 2 groups of them."""
    return 14 if grouped and stage in (1, 2) and index % 2 == 1 else 7


def forward(
    weights,
    images,
    num_heads,
    depths,
    dense,
    pointwise=True,
    grouped=True,
    inner_shortcuts=True,
    overlap=True,
    positional_encoding="conditional",
    window_tokens=None,
):
    """Compute logits from images, B × 3 × H × W; in the dense form, four maps, B × C × H × W each."""
    x = images.permute(0, 2, 3, 1)
    maps, kind = [], window_tokens or ("zeros" if dense else "learned")
    for stage in range(4):
        embed = {
            key: weights[f"patch_embeds.{stage}.{key}"]
            for key in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
        }
        stride, padding = (4, 3) if stage == 0 else (2, 1)
        if not overlap:
            padding, (B, H, W, C) = 0, x.shape
            whole = torch.zeros(B, math.ceil(H / stride) * stride, math.ceil(W / stride) * stride, C, dtype=x.dtype)
            whole[:, :H, :W] = x
            x = whole
        x = convolution(x, embed["proj.weight"], embed["proj.bias"], stride, padding)
        x = layer_norm(x, embed["norm.weight"], embed["norm.bias"], 1e-5)
        for index in range(depths[stage]):
            prefix = f"blocks.{stage}.{index}."
            p = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
            x = block(
                p, x, num_heads[stage], window_side(stage, index, grouped), dense, pointwise, inner_shortcuts, kind
            )
            if index == 0 and positional_encoding == "conditional":
                peg = f"pos_block.{stage}.proj.0."
                x = x + convolution(x, weights[peg + "weight"], weights[peg + "bias"], 1, 1)
        if dense:
            x = layer_norm(x, weights[f"norm_list.{stage}.weight"], weights[f"norm_list.{stage}.bias"], 1e-6)
            maps.append(x.permute(0, 3, 1, 2))
    if dense:
        return maps
    x = layer_norm(x, weights["norm.weight"], weights["norm.bias"], 1e-6)
    return linear(x.mean(dim=(1, 2)), weights["head.weight"], weights["head.bias"])
