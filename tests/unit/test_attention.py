"""Attention, its rollout over blocks, and maps of a network."""

import numpy as np
import pytest
import reference
import timm
import torch
from conftest import tiny_network
from torch import nn

import sepvit
from sepvit import SepViT, SepViTDense
from sepvit_lib.inference.attention import BlockAttention, record_attention, rollout
from sepvit_lib.inference.maps import attribution, principal_components, token_similarity

# ------------------------------------------------------------------------------------------------------------ recording


def softmaxes_of_reference(monkeypatch, model, images, dense) -> list[torch.Tensor]:
    """All attention weights of the independent implementation, in the order in which it computes them."""
    found: list[torch.Tensor] = []
    original = reference.softmax

    def softmax(x: torch.Tensor) -> torch.Tensor:
        found.append(original(x))
        return found[-1]

    monkeypatch.setattr(reference, "softmax", softmax)
    reference.forward(model.state_dict(), images, num_heads=(1, 2, 2, 3), depths=(1, 2, 2, 1), dense=dense)
    return found


@pytest.mark.parametrize("size", [(33, 47), (28, 60), (28, 28)])
@pytest.mark.parametrize("dense", [False, True], ids=["classification", "dense"])
def test_attention_equals_the_references(size, dense, monkeypatch):
    """Sizes with padding, and with blocks of one window."""
    kwargs = {} if dense else dict(img_size=size, num_classes=5)
    model = tiny_network(SepViTDense if dense else SepViT, **kwargs).double().eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = record_attention(model, images)
    expected = iter(softmaxes_of_reference(monkeypatch, model, images, dense))
    assert [block.name for block in blocks] == list(model.named_blocks())
    assert [block.grid for block in blocks] == model.window_grids(size)
    for block in blocks:
        B, n, heads, T, _ = block.inside.shape
        assert (B, n) == (2, block.grid[0] * block.grid[1])
        assert block.has_token == (dense or n > 1)
        assert block.window_size**2 + block.has_token == T
        assert (block.among is None) == (n == 1)
        for window in range(n):
            for head in range(heads):
                torch.testing.assert_close(block.inside[:, window, head], next(expected), rtol=0, atol=1e-9)
        for _ in range(n if block.has_token else 0):  # it computes the weights among windows once for each window
            for head in range(heads):
                weights = next(expected)
                if block.among is not None:
                    torch.testing.assert_close(block.among[:, head], weights, rtol=0, atol=1e-9)
        assert block.difference < 1e-12
    assert next(expected, None) is None


def test_rows_sum_to_one_and_maps_keep_their_size():
    blocks = record_attention(tiny_network(SepViTDense).eval(), torch.randn(1, 3, 130, 61))
    assert [block.map_size for block in blocks] == [(33, 16), (17, 8), (17, 8), (9, 4), (9, 4), (5, 2)]
    assert [block.stride for block in blocks] == [28, 56, 112, 112, 224, 224]
    for block in blocks:
        for weights in (block.inside, *([block.among] if block.among is not None else [])):
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(blocks[0].among_mean(), blocks[0].among.mean(dim=1))
    assert blocks[0].window_at(29, 55.9) == (1, 1)
    assert blocks[0].window_at(-5, 1000) == (0, 2)


def test_the_export_form_has_the_same_attention():
    model, images = tiny_network(SepViTDense).eval(), torch.randn(1, 3, 64, 64)
    for block, exported in zip(*(record_attention(one, images) for one in (model, sepvit.exportable(model)))):
        torch.testing.assert_close(exported.inside, block.inside)


class Segmentor(nn.Module):
    """A module with a backbone and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny_network(SepViTDense)
        self.head = nn.Conv2d(32, 2, 1)

    def predict(self, images):
        return self.head(self.backbone(images)[0])


def test_modules_that_contain_a_network():
    segmentor, images = Segmentor().eval(), torch.randn(1, 3, 64, 64)
    blocks = record_attention(segmentor, images, segmentor.predict)
    assert blocks[1].name == "backbone.blocks.1.0"
    assert blocks[1].stage == 1
    alone = record_attention(segmentor.backbone, images)
    torch.testing.assert_close(blocks[1].among, alone[1].among, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in segmentor.modules())


def test_blocks_that_do_not_run_are_left_out():
    model = tiny_network(SepViT, img_size=64, num_classes=0).eval()
    blocks = record_attention(
        model, torch.randn(1, 3, 64, 64), lambda x: model.forward_intermediates(x, [0, 1], stop_early=True)
    )
    assert [block.stage for block in blocks] == [0, 1, 1]


def test_16_bit_formats():
    model, images = tiny_network(SepViT, img_size=64, num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks = record_attention(model, images)
    assert 0 < blocks[0].difference < 0.05
    expected = record_attention(model, images)
    torch.testing.assert_close(blocks[0].among.float(), expected[0].among, rtol=0, atol=0.02)


def test_what_cannot_be_recorded():
    model, images = tiny_network(SepViTDense).eval(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="Linear contains no SepViT"):
        record_attention(nn.Linear(2, 2), images)
    with pytest.raises(ValueError, match=r"blocks\.0\.0 ran twice"):
        record_attention(model, images, lambda x: (model(x), model(x)))
    with pytest.raises(ValueError, match="none of the network's blocks ran"):
        record_attention(model, images, lambda x: None)
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        record_attention(model.train(), images)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_the_networks_are_refused(monkeypatch):
    model, images = tiny_network(SepViTDense).eval(), torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(sepvit, "window_attention", lambda q, k, v, dropout: v)  # the network attends to itself alone
    with pytest.raises(RuntimeError, match=r"blocks\.0\.0: the output recomputed from its attention differs"):
        record_attention(model, images)


def test_rows_that_do_not_sum_to_one_are_refused(monkeypatch):
    weights = sepvit.window_weights
    monkeypatch.setattr(sepvit, "window_weights", lambda q, k: 0.9 * weights(q, k))
    with pytest.raises(RuntimeError, match="sums to one only within"):
        record_attention(tiny_network(SepViTDense).eval(), torch.randn(1, 3, 64, 64))


# -------------------------------------------------------------------------------------------------------------- rollout


def block_of(among: torch.Tensor | None, grid: tuple[int, int], stage: int, map_size: tuple[int, int], window_size=7):
    """A block's attention with given weights among windows, B × h × n × n."""
    inside = torch.full((1, grid[0] * grid[1], 1, 2, 2), 0.5)
    return BlockAttention(f"blocks.{stage}.0", stage, grid, window_size, map_size, among, inside, True, 0.0)


def random_weights(n: int, seed: int) -> torch.Tensor:
    """Weights among n windows of two heads, 1 × 2 × n × n."""
    return torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=-1)


def test_rollout_on_one_grid_is_a_product():
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    result = rollout([block_of(weights[None, None], (1, 2), 0, (7, 14)) for weights in (first, second)])
    by_hand = torch.tensor([[0.75, 0.25], [0.1875, 0.8125]])  # (second + I) / 2 times (first + I) / 2
    torch.testing.assert_close(result.weights[0], by_hand)
    assert (result.grid, result.stride) == ((1, 2), 28)


def rolled_out_by_pixels(blocks: list[BlockAttention], size: tuple[int, int], cell: int) -> torch.Tensor:
    """Rollout that averages over pairs of pixels: one map pixel of the first stage (4 image pixels) at a time."""
    places = [(row, column) for row in range(0, size[0], 4) for column in range(0, size[1], 4)]

    def numbers(stride: int) -> torch.Tensor:
        columns = -(-size[1] // stride)
        return torch.tensor([row // stride * columns + column // stride for row, column in places])

    cells = numbers(cell)
    m = int(cells.max()) + 1
    in_cell = torch.nn.functional.one_hot(cells, m).double()  # pixels × m
    total = torch.eye(m, dtype=torch.float64)
    for block in blocks:
        if block.among is not None:
            windows = numbers(block.stride)
            pairs = block.among.double().mean(1)[0][windows][:, windows]  # pixels × pixels
            attended = in_cell.T @ (pairs @ in_cell / in_cell.sum(0).max()) / in_cell.sum(0)[:, None]
            total = (attended / attended.sum(1, keepdim=True) + torch.eye(m)) / 2 @ total
    return total.float()


def test_rollout_over_grids_of_stages_equals_one_by_pixels():
    """An image of 200 × 72 pixels: the last windows are padded."""
    blocks = [
        block_of(random_weights(24, 0), (8, 3), 0, (50, 18)),
        block_of(random_weights(8, 1), (4, 2), 1, (25, 9)),
        block_of(random_weights(2, 2), (2, 1), 2, (13, 5)),
        block_of(None, (1, 1), 2, (13, 5), 14),
    ]
    result = rollout(blocks)
    assert (result.grid, result.stride) == ((8, 3), 28)
    torch.testing.assert_close(result.weights.sum(dim=-1), torch.ones(1, 24))
    torch.testing.assert_close(result.weights[0], rolled_out_by_pixels(blocks, (200, 72), 28), rtol=0, atol=1e-5)


def test_windows_that_do_not_nest_share_by_area():
    """Windows of 28 and of 40 pixels on 112 × 40 pixels, which overlap by 28, 12 + 16, 24 + 4 and 28 rows."""
    identity = torch.eye(4)[None, None]
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[None, None]
    blocks = [block_of(identity, (4, 1), 0, (28, 7)), block_of(swap, (3, 1), 0, (28, 7), 10)]
    weights = rollout(blocks).weights[0]
    # Cell 0 lies in window 0, which attends to window 1: rows 40 to 80, of which cells 1 and 2 hold 16 and 24.
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5 * 16 / 40, 0.5 * 24 / 40, 0.0]))


def test_rollout_of_a_network():
    blocks = record_attention(
        tiny_network(SepViT, img_size=(64, 120), num_classes=2).eval(), torch.randn(2, 3, 64, 120)
    )
    result = rollout(blocks)
    assert result.weights.shape == (2, 15, 15)
    torch.testing.assert_close(result.weights.sum(dim=-1), torch.ones(2, 15))
    assert (result.weights >= 0).all()
    with pytest.raises(ValueError, match="no block has more than one window"):
        rollout(blocks[-1:])


# ----------------------------------------------------------------------------------------------------------------- maps


def test_similarity_of_window_tokens():
    model = tiny_network(SepViT, img_size=56, num_classes=2)
    block = model.blocks[0][0]
    similarity = token_similarity(block)
    tokens = block.win_tokens.detach()[0, :, 0].numpy()
    expected = tokens @ tokens.T / np.outer(np.linalg.norm(tokens, axis=1), np.linalg.norm(tokens, axis=1))
    np.testing.assert_allclose(similarity.numpy(), expected, atol=1e-5)
    assert token_similarity(model.blocks[3][0]) is None  # a single window
    assert token_similarity(timm.create_model("SepViT_Lite", img_size=56).blocks[0][0]) is None  # zeros


def test_principal_components_find_the_directions_of_a_map():
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    directions = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    colours, share = principal_components(columns[..., None] * directions[0] + rows[..., None] * directions[1])
    assert colours.shape == (20, 30, 3)
    assert share == pytest.approx(1)
    assert colours.min() == 0
    assert colours.max() == 1
    assert abs(np.corrcoef(colours[..., 0].ravel(), columns.ravel())[0, 1]) > 0.99
    assert abs(np.corrcoef(colours[..., 1].ravel(), rows.ravel())[0, 1]) > 0.99


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (3, 3, 2)])
def test_principal_components_of_small_maps(shape):
    colours, share = principal_components(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert colours.shape == (*shape[:2], 3)
    assert np.isfinite(colours).all()
    assert 0 <= share <= 1 + 1e-9


def test_attribution_sums_up_to_the_logit():
    model = tiny_network(SepViT, img_size=(64, 96), num_classes=4).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = attribution(model, images, 2)
    assert [tuple(values.shape) for values in maps] == [(2, 16, 24), (2, 8, 12), (2, 4, 6), (2, 2, 3)]
    torch.testing.assert_close(maps[-1].sum(dim=(1, 2)), (model(images) - model.head.bias)[:, 2].detach())
