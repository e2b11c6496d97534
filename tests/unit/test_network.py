"""The network: published outputs, an independent reference, sizes, execution modes, checkpoints."""

import argparse
import copy
import logging
import re
import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
from conftest import GOLDEN, ROOT, VARIANTS, golden_images, golden_shapes, golden_weights, tiny_network

import main
import sepvit
from sepvit import SepViT, SepViTDense, adapt_state_dict, create_dense, mark_adapted
from sepvit_lib.common.errors import UserError
from sepvit_lib.count import count_multiply_adds
from sepvit_lib.run.checkpoints import load_weights

PARAMETERS = {"SepViT_Lite": 3.661, "SepViT_Tiny": 31.183, "SepViT_Small": 46.571, "SepViT_Base": 82.377}
MULTIPLY_ADDS = {"SepViT_Lite": 0.573, "SepViT_Tiny": 4.533, "SepViT_Small": 7.476, "SepViT_Base": 13.082}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# --------------------------------------------------------------------------------------- the published implementation


@pytest.mark.parametrize("variant", VARIANTS)
def test_classification_golden(variant):
    model = timm.create_model(variant).eval()
    shapes = golden_shapes(variant)
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert list(own.items()) == list(shapes.items())  # order matters too: optimisers number parameters by it
    model.load_state_dict(golden_weights(shapes))
    with torch.no_grad():
        logits = model(golden_images(2, 224, 224))
    expected = np.load(GOLDEN / f"{variant}_224_seed0.npz")["logits"]
    assert largest_difference(logits, torch.from_numpy(expected)) < 1e-5


@pytest.mark.parametrize(("height", "width", "batch"), [(224, 224, 1), (200, 304, 2)])
def test_dense_golden(height, width, batch):
    model = create_dense("SepViT_Tiny").eval()
    shapes = golden_shapes("SepViT_Tiny_dense")
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert own == {name: shape for name, shape in shapes.items() if not name.startswith(("norm.", "head."))}
    model.load_state_dict(golden_weights(shapes))  # strict: the unused norm and head are dropped
    with torch.no_grad():
        maps = model(golden_images(batch, height, width))
    golden = np.load(GOLDEN / f"SepViT_Tiny_dense_{height}x{width}_seed0.npz")
    for i, feature_map in enumerate(maps):
        assert list(feature_map.shape) == golden[f"stage{i}_shape"].tolist()
        values = feature_map.flatten()[torch.from_numpy(golden[f"stage{i}_index"])]
        assert largest_difference(values, torch.from_numpy(golden[f"stage{i}_value"])) < 1e-4
        assert abs(feature_map.mean().item() - golden[f"stage{i}_mean"]) < 1e-5
        assert abs(feature_map.std().item() - golden[f"stage{i}_std"]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_multiply_adds(variant):
    with torch.device("meta"):
        model = timm.create_model(variant).eval()
        total = count_multiply_adds(model, torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.001)
    assert total / 1e9 == pytest.approx(MULTIPLY_ADDS[variant], rel=0.005)


# ------------------------------------------------------------------------------------------ the independent reference

SIZES = [(56, 56), (33, 47), (64, 120), (101, 30), (29, 29), (28, 28)]


VARIATIONS: list[dict[str, Any]] = [
    dict(pointwise=False),
    dict(grouped=False),
    dict(inner_shortcuts=False),
    dict(overlap=False),
    dict(positional_encoding="none"),
    dict(window_tokens="zeros"),
    dict(window_tokens="average"),
    dict(window_tokens="depthwise"),
    dict(window_tokens="shared"),
    dict(pointwise=False, grouped=False, inner_shortcuts=False, overlap=False, positional_encoding="none"),
]
CASES: list[tuple[tuple[int, int], dict[str, Any]]] = [(size, {}) for size in SIZES] + [
    ((57, 90), variation) for variation in VARIATIONS
]


@pytest.mark.parametrize(("size", "variation"), CASES)
@pytest.mark.parametrize("dense", [False, True], ids=["classification", "dense"])
def test_equals_reference(size, variation, dense):
    if dense:
        model = tiny_network(SepViTDense, **variation).double()
    else:
        model = tiny_network(SepViT, img_size=size, num_classes=5, **variation).double()
    generator = torch.Generator().manual_seed(sum(size))
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    theirs = reference.forward(weights, images, (1, 2, 2, 3), (1, 2, 2, 1), dense, **variation)
    ours = model(images)
    theirs, ours = (outputs if dense else [outputs] for outputs in (theirs, ours))
    factors = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ours]
    for y, expected in zip(ours, theirs):
        assert y.shape == expected.shape
        assert largest_difference(y, expected) < 1e-9
    sum((y * factor).sum() for y, factor in zip(ours, factors)).backward()
    sum((y * factor).sum() for y, factor in zip(theirs, factors)).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert largest_difference(parameter.grad, expected) < 1e-8 * (1 + expected.abs().max().item()), name


def test_the_page_has_the_costs_of_variations():
    """Parameters and multiply-adds of SepViT_Tiny, at 224 × 224 pixels."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--model-kwargs (\w+=\w+)` \|.*\| ([\d.]+) M \| ([\d.]+) G \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for argument, parameters, multiply_adds in rows:
        args = main.build_parser().parse_args(["--model-kwargs", argument])
        with torch.device("meta"):
            model = timm.create_model("SepViT_Tiny", **args.model_kwargs).eval()
            total = count_multiply_adds(model, torch.zeros(1, 3, 224, 224))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == parameters
        assert f"{total / 1e9:.2f}" == multiply_adds


# Combined in fewer networks, because an export takes seconds.
COMBINED = [VARIATIONS[-1], *({**one, **other} for one, other in zip(VARIATIONS[1:5], VARIATIONS[5:9]))]


@pytest.mark.parametrize("variation", COMBINED)
def test_variations_are_exported(variation):
    model = tiny_network(SepViT, img_size=(57, 90), num_classes=5, **variation).eval()
    images = torch.randn(2, 3, 57, 90)
    program = torch.export.export(model, (images,))
    assert largest_difference(program.module()(images), model(images)) < 1e-5
    assert largest_difference(sepvit.exportable(model)(images), model(images)) < 1e-6
    assert largest_difference(torch.jit.script(model)(images), model(images)) < 1e-5


@pytest.mark.parametrize("variation", VARIATIONS)
def test_variations_are_recorded_and_refused_by_others(variation, tmp_path):
    model = tiny_network(SepViT, img_size=(57, 90), num_classes=5, **variation).eval()
    images = torch.randn(2, 3, 57, 90)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    recorded = sepvit.settings_of(torch.load(tmp_path / "x.pth", weights_only=True))
    assert recorded == model.settings()
    again = tiny_network(SepViT, 1, img_size=(57, 90), num_classes=5, **recorded).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    with pytest.raises((UserError, RuntimeError)):
        load_weights(tiny_network(SepViT, img_size=(57, 90), num_classes=5), model.state_dict(), "x", variant_hint="")


def test_settings_that_exclude_each_other():
    with pytest.raises(ValueError, match="choose one"):
        SepViTDense(grouped=False, window_sizes=[[7]] * 4)
    for mistake in (dict(positional_encoding="sine"), dict(window_tokens="learned"), dict(window_tokens="mean")):
        with pytest.raises(ValueError, match="choose"):
            SepViTDense(**mistake)


@pytest.mark.parametrize("kind", ["zeros", "average", "depthwise", "shared"])
def test_window_tokens_without_a_size_are_kept_at_other_sizes(kind):
    """Blocks with a single window have none, and get fresh ones if the image grows."""
    model = tiny_network(SepViT, img_size=64, num_classes=5, window_tokens=kind)
    larger = tiny_network(SepViT, 1, img_size=224, num_classes=5, window_tokens=kind)
    report = load_weights(larger, model.state_dict(), "x", variant_hint="")
    assert {name.split(".")[1] for name in report.adaptation.fresh} == {"1", "2"}
    weights = larger.state_dict()
    for name in model.state_dict().keys() - set(report.adaptation.dropped):
        assert torch.equal(weights[name], model.state_dict()[name])
    model.set_input_size(224)
    assert model.state_dict().keys() == weights.keys()
    model.set_input_size(64)
    back = load_weights(model, weights, "x", variant_hint="")
    assert sorted(back.adaptation.dropped) == sorted(report.adaptation.fresh)


# -------------------------------------------------------------------------------------------------------------- forms


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("SepViT_Tiny")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    tokens = [p for name, p in model.named_parameters() if name.endswith("win_tokens")]
    assert len(tokens) == 6
    assert not any(p.any() for p in tokens)


def test_stochastic_depth_rises_linearly():
    with torch.device("meta"):
        model = timm.create_model("SepViT_Tiny", drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for blocks in model.blocks for block in blocks]
    assert rates == pytest.approx([0.2 * i / 10 for i in range(11)])


def test_dropout_rates_take_effect():
    model = tiny_network(SepViT, img_size=56, num_classes=4, drop_rate=0.3, attn_drop_rate=0.2)
    images = torch.randn(1, 3, 56, 56)
    assert largest_difference(model(images), model(images)) > 0
    attention_only = tiny_network(SepViT, img_size=56, num_classes=4, attn_drop_rate=0.2)
    assert largest_difference(attention_only(images), attention_only(images)) > 0
    model.eval()
    assert largest_difference(model(images), model(images)) == 0


@pytest.mark.parametrize("size", [(32, 32), (200, 304), (448, 224), 97])
def test_any_image_size(size):
    model = timm.create_model("SepViT_Lite", img_size=size, num_classes=7).eval()
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        assert model(torch.zeros(1, 3, height, width)).shape == (1, 7)
    tokens = model.blocks[0][0].win_tokens
    if max(height, width) > 28:
        assert tokens.shape[1] == -(-height // 28) * -(-width // 28)


def test_wrong_input_size_error_names_both_sizes():
    model = timm.create_model("SepViT_Lite", img_size=(64, 96))
    with pytest.raises(AssertionError, match=r"96 × 64.*64 × 96"):
        model(torch.zeros(1, 3, 96, 64))


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="global_pool='mean'"):
        timm.create_model("SepViT_Lite", global_pool="mean")
    with pytest.raises(ValueError, match="img_size"):
        timm.create_model("SepViT_Lite", img_size=0)
    with pytest.raises(ValueError, match="out_indices"):
        create_dense("SepViT_Lite", out_indices=(4,))
    with pytest.raises(ValueError, match="SepViT_Huge"):
        create_dense("SepViT_Huge")


def test_dense_out_indices():
    model = create_dense("SepViT_Lite", out_indices=(2, 1))
    maps = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 128, 4, 6), (1, 64, 8, 12)]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())  # every remaining parameter contributes to the maps
    full = create_dense("SepViT_Lite")
    model.load_state_dict(full.state_dict())


# ----------------------------------------------------------------------------------------------------- execution modes


@pytest.fixture(scope="module")
def lite():
    model = timm.create_model("SepViT_Lite", num_classes=10, img_size=(96, 64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.fixture(scope="module")
def lite_images():
    return torch.randn(2, 3, 96, 64)


def test_float64(lite, lite_images):
    outputs = copy.deepcopy(lite).double()(lite_images.double())
    assert outputs.dtype == torch.float64
    assert largest_difference(outputs, lite(lite_images)) < 1e-5


def test_more_windows_than_a_kernel_takes_are_attended_in_parts():
    inputs = torch.randn(3, 10, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for max_windows in (10, 4):
        q, k, v = (values.clone().requires_grad_() for values in inputs)
        outputs = sepvit.window_attention(q, k, v, 0.0, max_windows)
        outputs.square().sum().backward()
        results.append([outputs, q.grad, k.grad, v.grad])
    for whole, parts in zip(*results):
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_attention_and_its_gradients_in_16_bits(dtype, tolerance):
    inputs = torch.randn(3, 10, 2, 50, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for values in (inputs.float(), inputs):
        q, k, v = (part.clone().requires_grad_() for part in values)
        outputs = sepvit.window_attention(q, k, v, 0.0)
        assert outputs.dtype == values.dtype
        outputs.float().square().sum().backward()
        results.append([outputs, q.grad, k.grad, v.grad])
    for expected, actual in zip(*results):
        assert largest_difference(actual, expected) < tolerance * expected.abs().max().item()


def test_attention_in_16_bits_drops_weights():
    q, k, v = torch.ones(3, 1, 1, 500, 8, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    outputs = sepvit.window_attention(q, k, v, 0.25)
    assert outputs.std() > 0.01
    assert abs(outputs.mean().item() - 1) < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast(lite, lite_images, dtype, tolerance):
    expected = lite(lite_images)
    model = copy.deepcopy(lite).train()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(lite_images)
    assert outputs.dtype == dtype
    assert largest_difference(outputs, expected) < tolerance * expected.std().item()
    outputs.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_channels_last(lite, lite_images):
    model = copy.deepcopy(lite).to(memory_format=torch.channels_last)
    outputs = model(lite_images.contiguous(memory_format=torch.channels_last))
    assert largest_difference(outputs, lite(lite_images)) < 1e-5


@pytest.mark.parametrize("form", [SepViT, SepViTDense])
def test_gradient_checkpointing_gives_the_same_gradients(form):
    kwargs = dict(img_size=64, num_classes=5) if form is SepViT else {}
    gradients = []
    for enable in (False, True):
        model = tiny_network(form, drop_rate=0.1, drop_path_rate=0.3, **kwargs).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        outputs = model(torch.randn(2, 3, 64, 64))
        sum(y.square().sum() for y in ([outputs] if form is SepViT else outputs)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("dense", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_in_one_graph(lite, lite_images, dense):
    model = create_dense("SepViT_Lite").eval() if dense else copy.deepcopy(lite)
    images = torch.randn(1, 3, 50, 71) if dense else lite_images
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for y, expected in zip(compiled(images), model(images)):
        assert largest_difference(y, expected) < 1e-5
    compiled(images)[0].sum().backward()
    assert model.patch_embeds[0].proj.weight.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiles_to_native_code():
    model = tiny_network(SepViT, img_size=56, num_classes=5, depths=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert largest_difference(torch.compile(model, fullgraph=True)(images), model(images)) < 1e-5


def highest_rank(program):
    """Of the tensors of an exported program; runtimes of phones take four to six dimensions."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    return max(value.dim() for value in values if isinstance(value, torch.Tensor))


def test_export(lite, lite_images):
    batch = torch.export.Dim("batch")  # without an upper bound
    program = torch.export.export(lite, (lite_images,), dynamic_shapes=({0: batch},))
    three = torch.randn(3, 3, 96, 64)
    assert largest_difference(program.module()(three), lite(three)) < 1e-5
    dense = create_dense("SepViT_Lite").eval()
    images = torch.randn(1, 3, 50, 71)
    program = torch.export.export(dense, (images,))
    for y, expected in zip(program.module()(images), dense(images)):
        assert largest_difference(y, expected) < 1e-5


def test_exportable_form(lite, lite_images):
    """It changes nothing but the form, and no tensor has more than four dimensions, traced or exported."""
    dense = create_dense("SepViT_Lite").eval()
    for network, images in (lite, lite_images), (dense, torch.randn(1, 3, 50, 71)):
        before = copy.deepcopy(network.state_dict())
        form, expected = sepvit.exportable(network), network(images)
        program = torch.export.export(form, (images,))
        assert highest_rank(program) == 4
        traced = torch.jit.trace(form, images)
        sizes = [
            value.type().sizes()
            for node in traced.inlined_graph.nodes()
            for value in node.outputs()
            if isinstance(value.type(), torch._C.TensorType)
        ]
        assert max(len(size) for size in sizes if size) == 4
        for model in form, program.module(), traced:
            for y, y_expected in zip(model(images), expected):
                assert largest_difference(y, y_expected) < 1e-6 * max(1, y_expected.abs().max())
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_attention_runs_in_the_fused_kernel(lite, lite_images):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        lite(lite_images)
    names = [event.key for event in profile.key_averages()]
    assert any("flash_attention" in name for name in names), names


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_size_resamples_window_tokens(caplog):
    source = timm.create_model("SepViT_Lite", img_size=224, num_classes=5)
    target = timm.create_model("SepViT_Lite", img_size=(256, 192), num_classes=5)
    with torch.no_grad():
        tokens = source.blocks[0][0].win_tokens
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        tokens[0, :, 0, 0] = rows.flatten()
        tokens[0, :, 0, 1] = columns.flatten()
    with caplog.at_level(logging.WARNING):
        target.load_state_dict(source.state_dict())
    assert "resampled" in caplog.text
    assert "blocks.0.0.win_tokens" in caplog.text
    resampled = target.blocks[0][0].win_tokens[0, :, 0].view(10, 7, -1)
    assert (resampled[:, :, 0].diff(dim=0) > 0).all()  # rows still increase downwards, and are constant across
    assert (resampled[:, :, 1].diff(dim=1) > 0).all()
    assert resampled[:, :, 0].diff(dim=1).abs().max() < 1e-4
    for name, value in source.state_dict().items():
        if "win_tokens" not in name:
            torch.testing.assert_close(target.state_dict()[name], value, rtol=0, atol=0)


def test_pointwise_attention_is_added_or_dropped_with_the_size(caplog):
    small, large = (timm.create_model("SepViT_Lite", img_size=size) for size in (224, 256))
    extra = large.state_dict().keys() - small.state_dict().keys()
    assert "blocks.3.0.attn.PSA_qk.weight" in extra
    with caplog.at_level(logging.WARNING):
        large.load_state_dict(small.state_dict())
    assert "fresh" in caplog.text
    assert all(name in caplog.text for name in extra)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        small.load_state_dict(large.state_dict())
    assert "dropped" in caplog.text


@pytest.mark.parametrize("size", [224, 256])
@pytest.mark.parametrize("missing", ["blocks.2.0.attn.PSA_qk.weight", "blocks.0.0.win_tokens", "blocks.2.2.win_tokens"])
def test_checkpoints_with_missing_entries_are_rejected(size, missing):
    weights = timm.create_model("SepViT_Lite").state_dict()
    del weights[missing]
    with pytest.raises(RuntimeError, match=r"blocks\."):
        timm.create_model("SepViT_Lite", img_size=size).load_state_dict(weights)


@pytest.mark.parametrize(
    ("old", "new"),
    [(224, (160, 160)), (224, (112, 448)), ((56, 224), (112, 112)), ((56, 224), (112, 448)), (28, (224, 224))],
)
def test_set_input_size_equals_building_and_loading(old, new):
    """Also where other grids have the same number of windows."""
    model = timm.create_model("SepViT_Lite", img_size=old, num_classes=3, drop_path_rate=0.1).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("win_tokens"):
                weights[name] = value.normal_().clone()
    built = timm.create_model("SepViT_Lite", img_size=new, num_classes=3).eval()
    adapted = dict(weights)
    adapt_state_dict(adapted, built, old if isinstance(old, tuple) else (old, old))
    built.load_state_dict(mark_adapted(adapted))
    model.set_input_size(new)
    assert model.state_dict().keys() == built.state_dict().keys()
    for name, value in model.state_dict().items():
        if name in weights or "PSA_qk" not in name:
            assert torch.equal(value, built.state_dict()[name]), name
    built.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, *new)
    assert torch.equal(model(images), built(images))
    assert timm.models.get_model_input_config(model)["input_size"] == (3, *new)


def test_set_input_size_keeps_frozen_parameters_frozen():
    model = timm.create_model("SepViT_Lite").requires_grad_(False)
    before = {name for name, _ in model.named_parameters()}
    model.set_input_size(256)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters()} - before  # fresh parameters are trainable


# Window sides of each stage, repeated up to its depth. In some, no block's window side divides another's.
SIDES = {
    "as published": ((7,), (7, 14), (7, 14), (7,)),
    "5": ((5,), (5,), (5,), (5,)),
    "6 and 12": ((6,), (6, 12), (6, 12), (6,)),
    "12 in one stage": ((6,), (6,), (12,), (6,)),
    "one a stage": ((5,), (6,), (10,), (7,)),
    "mixed": ((5,), (6, 10), (10, 7), (7,)),
    "coarse first": ((14,), (6, 10), (3, 7), (5,)),
}


def all_blocks(model: Any) -> dict[str, Any]:
    return {f"blocks.{i}.{j}": block for i, blocks in enumerate(model.blocks) for j, block in enumerate(blocks)}


@pytest.mark.parametrize("size", [(224, 224), (200, 304), (61, 300), (20, 20)])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_window_sides_round_trip(sides, size, caplog):
    source, target = (tiny_network(SepViT, seed, img_size=size, num_classes=3, window_sizes=sides) for seed in (0, 1))
    with caplog.at_level(logging.WARNING):
        target.load_state_dict(source.state_dict())
    assert not caplog.text  # nothing was adapted
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


RESIZED = [((224, 224), (256, 192)), ((168, 280), (336, 560)), ((96, 96), (1024, 1024)), ((1024, 768), (256, 192))]
# 2 × 2 windows in the first block, then 1 × 2 or 2 × 1: the model's aspect ratio tells rows from columns.
LATER = [(((6,), (5,), (5,), (5,)), *sizes) for sizes in (((32, 48), (64, 96)), ((48, 32), (96, 64)))]


@pytest.mark.parametrize(("sides", "old", "new"), [*LATER, *((s, *sizes) for s in SIDES.values() for sizes in RESIZED)])
def test_window_sides_resample_from_the_true_grids(sides, old, new):
    source = tiny_network(SepViT, 0, img_size=old, num_classes=3, window_sizes=sides)
    target = tiny_network(SepViT, 1, img_size=new, num_classes=3, window_sizes=sides)
    adapted_tokens(source, target, old)
    resampled = 0
    for (name, block), other in zip(all_blocks(target).items(), all_blocks(source).values()):
        if block.win_tokens is not None and other.win_tokens is not None:
            expected = sepvit.resample_window_tokens(other.win_tokens.data, other.grid, block.grid)
            assert torch.equal(block.win_tokens, expected), name
            resampled += block.grid != other.grid
    assert resampled > 0


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("old", [224, 160, 1024])
def test_square_source_grids_need_no_settings(sides, old):
    source = tiny_network(SepViT, 0, img_size=old, num_classes=3, window_sizes=sides)
    target = tiny_network(SepViT, 1, img_size=(320, 192), num_classes=3, window_sizes=sides)
    known, found = (adapted_tokens(source, target, size) for size in ((old, old), None))
    for name, tokens in known.items():
        assert torch.equal(found[name], tokens), name


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_dense_loads_classification_weights_with_any_window_sides(sides):
    source = tiny_network(SepViT, 0, img_size=(200, 304), num_classes=3, window_sizes=sides)
    dense = tiny_network(SepViTDense, 1, window_sizes=sides)
    dense.load_state_dict(source.state_dict())
    own = source.state_dict()
    for name, value in dense.state_dict().items():
        if not name.startswith("norm_list.") and name in own:
            assert torch.equal(value, own[name]), name
    assert [tuple(y.shape[2:]) for y in dense(torch.zeros(1, 3, 97, 64))] == [(25, 16), (13, 8), (7, 4), (4, 2)]
    source.load_state_dict(own)  # loading did not change it


def test_dense_loads_classification_weights(caplog):
    source = timm.create_model("SepViT_Lite")
    dense = create_dense("SepViT_Lite")
    with caplog.at_level(logging.WARNING):
        dense.load_state_dict(source.state_dict())
    for name in ("norm_list.3.weight", "blocks.3.0.attn.PSA_qk.weight", "head.weight", "blocks.0.0.win_tokens"):
        assert name in caplog.text
    assert torch.equal(dense.blocks[1][1].attn.PSA_qk.weight, source.blocks[1][1].attn.PSA_qk.weight)
    incomplete = dense.state_dict()
    del incomplete["blocks.3.0.attn.PSA_qk.weight"]  # dense checkpoints have it in every block
    with pytest.raises(RuntimeError, match="PSA_qk"):
        dense.load_state_dict(incomplete)


@pytest.fixture
def adaptations(monkeypatch) -> list[sepvit.Adaptation]:
    """The adaptations of checkpoints of another size, in order, whoever called them."""
    adapt, found = sepvit._adapt_to_size, []
    monkeypatch.setattr(sepvit, "_adapt_to_size", lambda *args: found.append(adapt(*args)) or found[-1])
    return found


def load(route: str, prefix: str, source: SepViT, target: SepViT) -> None:
    """Load weights into a network, or into its part "backbone"."""
    whole: Any = torch.nn.ModuleDict({"backbone": target}) if prefix else target
    weights = source.state_dict()
    if route == "marked":
        adapt_state_dict(weights, target)
    weights = {prefix + name: value for name, value in weights.items()}
    if route == "by command":
        load_weights(whole, weights, "weights", variant_hint="", network=prefix.removesuffix("."))
    else:
        whole.load_state_dict(mark_adapted(weights, prefix) if route == "marked" else weights)


@pytest.mark.parametrize(
    ("route", "prefix"), [("by timm", ""), *product(("directly", "marked", "by command"), ("", "backbone."))]
)
def test_every_route_adapts_once(route, prefix, adaptations, tmp_path):
    source = timm.create_model("SepViT_Lite", img_size=224, num_classes=3)
    with torch.no_grad():
        source.blocks[0][0].win_tokens.normal_()
    settings: dict[str, Any] = dict(img_size=160, num_classes=3)
    if route == "by timm":  # from a published checkpoint
        published = {"model": source.state_dict(), "epoch": 299, "args": argparse.Namespace(model="SepViT_Lite")}
        torch.save(published, tmp_path / "weights.pth")
        settings["checkpoint_path"] = str(tmp_path / "weights.pth")
    target = timm.create_model("SepViT_Lite", **settings)
    if route != "by timm":
        load(route, prefix, source, target)
    assert len(adaptations) == 1
    assert adaptations[0].resampled[0].endswith("blocks.0.0.win_tokens")
    expected = sepvit.resample_window_tokens(source.blocks[0][0].win_tokens.data, (8, 8), (6, 6))
    assert torch.equal(target.blocks[0][0].win_tokens, expected)
    assert torch.equal(target.head.weight, source.head.weight)


@pytest.mark.parametrize("prefix", ["", "backbone", "backbone."])
def test_hook_skips_marked_state_dicts(prefix, adaptations, caplog):
    source, target = (timm.create_model("SepViT_Lite", img_size=size) for size in (224, 160))
    below = f"{prefix.removesuffix('.')}." if prefix else ""
    whole = torch.nn.ModuleDict({"backbone": target}) if prefix else target
    weights = {below + name: value for name, value in source.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"), caplog.at_level(logging.WARNING):
        whole.load_state_dict(mark_adapted(weights, prefix))
    assert not adaptations
    assert not caplog.text
    assert not hasattr(weights, "_metadata")
    whole.load_state_dict(weights)  # marking made a copy: the original still adapts
    assert len(adaptations) == 1


def test_mark_keeps_other_metadata():
    weights = torch.nn.ModuleDict({"norm": torch.nn.BatchNorm2d(2), "backbone": torch.nn.ReLU()}).state_dict()
    before = copy.deepcopy(weights._metadata)
    marked = mark_adapted(weights, "backbone")
    assert weights._metadata == before
    assert marked._metadata["norm"] == before["norm"] == {"version": 2}
    assert marked._metadata["backbone"].items() > before["backbone"].items()
    assert list(marked.items()) == list(weights.items())


def test_entries_under_a_prefix():
    weights = {name: torch.zeros(1) for name in ("head.weight", "backbone.head.weight", "backbone2.head.weight")}
    assert sepvit.entries_under(weights, "backbone") == {"head.weight": weights["backbone.head.weight"]}
    assert sepvit.entries_under(weights, "backbone.") == sepvit.entries_under(weights, "backbone")
    assert sepvit.entries_under(weights, "") == weights


def adapted_tokens(source: SepViT, target: SepViT, img_size: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    weights = source.state_dict()
    adapt_state_dict(weights, target, img_size)
    target.load_state_dict(mark_adapted(weights))
    return {name: block.win_tokens.data.clone() for name, block in all_blocks(target).items() if block.attn.PSA_qk}


@pytest.mark.parametrize("new", [(560, 336), (280, 168)])
def test_given_image_size_decides_the_source_grids(new):
    """The numbers of window tokens alone would also fit 280 × 168 pixels."""
    source = tiny_network(SepViT, 0, img_size=(168, 280), num_classes=3)
    target = tiny_network(SepViT, 1, img_size=new, num_classes=3)
    given = adapted_tokens(source, target, (168, 280))
    for (name, block), other in zip(all_blocks(target).items(), all_blocks(source).values()):
        rows, columns = other.grid
        assert rows < columns
        assert torch.equal(given[name], sepvit.resample_window_tokens(other.win_tokens.data, other.grid, block.grid)), (
            name
        )


@pytest.mark.parametrize("img_size", [None, (224, 224), (168, 252), (28, 28), (0, 0), (-168, -280)])
def test_oblong_checkpoints_need_their_image_size(img_size):
    source = tiny_network(SepViT, 0, img_size=(168, 280), num_classes=3)
    target = tiny_network(SepViT, 1, img_size=(336, 560), num_classes=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted_tokens(source, target, img_size)


def test_variant_of():
    for variant in VARIANTS:
        assert sepvit.variant_of(golden_weights(golden_shapes(variant))) == variant
    assert sepvit.variant_of({"conv.weight": torch.zeros(1)}) is None
