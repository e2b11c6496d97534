"""What networks cost: tools/get_flops.py, and the table that it shares with those of segmentation and detection."""

import re

import pytest
import timm
import torch
from conftest import ROOT, VARIANTS, refusal, tiny_network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sepvit
from sepvit_lib.count import (
    AMONG,
    HEAD,
    INSIDE,
    QUANTITIES,
    Part,
    costs_as_text,
    costs_of,
    count_by_module,
    count_multiply_adds,
    memory_of,
    padding_of,
    total_of,
    with_less_padding,
)
from tools import get_flops

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["SepViT_Lite", "convnext_tiny", "mobilenetv3_small_050"])
def test_multiply_adds_are_those_of_pytorch(name):
    """Which counts all but LayerNorm."""
    network, image = timm.create_model(name).eval(), torch.zeros(2, 3, 224, 224)
    norms: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *passed: norms.append(passed[-1].numel()))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(image)
    expected = counter.get_total_flops() // 2 + 5 * sum(norms)
    assert count_multiply_adds(network, image) == expected


# Millions of activations that timm publishes (results/benchmark-infer-*.csv), counted by fvcore.
ACTIVATIONS = {"swin_tiny_patch4_window7_224": 17.06, "convnext_tiny": 13.44, "pvt_v2_b0": 7.99}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    with torch.device("meta"):
        counts = count_by_module(timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224)).values()
    assert round(sum(count.activations for count in counts) / 1e6, 2) == ACTIVATIONS[name]


# Of images of 224 × 224 pixels: parameters, multiply-adds and activations; the multiply-adds of the dense form.
TOTALS = {
    "SepViT_Lite": (3_661_128, 573_229_824, 5_620_384, 575_244_832),
    "SepViT_Tiny": (31_182_856, 4_533_444_864, 16_859_152, 4_544_896_608),
    "SepViT_Small": (46_570_504, 7_475_818_752, 25_542_928, 7_491_721_824),
    "SepViT_Base": (82_377_064, 13_081_963_520, 34_056_904, 13_108_082_816),
}


def test_counting_leaves_the_network_as_it_was():
    network = tiny_network(sepvit.SepViT, img_size=64).eval()
    costs_of(network, torch.zeros(1, 3, 64, 64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(AssertionError):
        count_by_module(network, torch.zeros(1, 3, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_totals(variant):
    with torch.device("meta"):
        network, image = timm.create_model(variant).eval(), torch.zeros(1, 3, 224, 224)
        dense = count_multiply_adds(sepvit.create_dense(variant).eval(), image)
    costs = costs_of(network, image)
    parameters, multiply_adds, _ = totals = [total_of(costs, quantity) for quantity in QUANTITIES]
    assert (*totals, dense) == TOTALS[variant]
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    assert re.search(rf"`{variant}` +\| +{parameters / 1e6:.1f} M \| +{multiply_adds / 1e9:.2f} G \|", README)


@pytest.mark.parametrize("size", [(64, 64), (100, 230)], ids=["whole windows", "padded"])
@pytest.mark.parametrize("form", [sepvit.SepViT, sepvit.SepViTDense])
def test_parts_are_those_of_the_equations(form, size):
    """Counted by hand from the shapes of the paper's equations."""
    sizes = dict(img_size=size, num_classes=10) if form is sepvit.SepViT else {}
    network = tiny_network(form, **sizes).eval()
    costs = costs_of(network, torch.zeros(1, 3, *size))
    for stage in range(4):
        found = {kind: costs.get(Part(f"stage {stage + 1}", kind)) for kind in (INSIDE, AMONG, "projections", "MLP")}
        inside = among = projections = mlp = 0
        for name, block in network.named_blocks().items():
            if not name.startswith(f"blocks.{stage}."):
                continue
            rows, columns = sepvit.window_grid(size, stage, block.window_size)
            height, width = (-(-side // (4 * 2**stage)) for side in size)
            n, pixels, C = rows * columns, block.window_size**2, network.embed_dims[stage]
            has_tokens = block.attn.PSA_qk is not None
            tokens = pixels + has_tokens
            inside += 2 * n * tokens**2 * C
            among += has_tokens * (n**2 * C + n**2 * pixels * C)
            projections += 3 * n * tokens * C**2 + has_tokens * 2 * n * C**2 + height * width * C**2
            mlp += 2 * height * width * C * 4 * C
        assert found[INSIDE].multiply_adds == inside
        assert (found[AMONG].multiply_adds if found[AMONG] else 0) == among
        assert found["projections"].multiply_adds == projections
        assert found["MLP"].multiply_adds == mlp
    assert any(part.stage == HEAD for part in costs) == (form is sepvit.SepViT)


def test_shared_parameters_count_once():
    network = tiny_network(sepvit.SepViT, img_size=64).eval()
    network.blocks[1][0].mlp = network.blocks[1][1].mlp
    costs = costs_of(network, torch.zeros(1, 3, 64, 64))
    assert total_of(costs, "parameters") == sum(parameter.numel() for parameter in network.parameters())


def test_memory():
    """Of a linear layer: its output; with a gradient of its weights, and twice these for AdamW."""
    network = nn.Linear(1000, 500, bias=False)
    memory = memory_of(network, torch.ones(200, 1000))
    forward, training = memory["forward pass"], memory["training step"]
    weights, outputs = 4 * 1000 * 500, 4 * 200 * 500
    assert (forward.weights, forward.moments, forward.computed) == (weights, 0, outputs)
    assert training.weights == weights
    assert training.moments == pytest.approx(2 * weights, abs=8)  # and the number of steps
    assert weights + outputs <= training.computed <= weights + 5 * outputs
    assert training.total == training.weights + training.moments + training.computed


def test_memory_grows_with_the_batch():
    network = tiny_network(sepvit.SepViT, img_size=64)
    few, many = (memory_of(network, torch.zeros(count, 3, 64, 64)) for count in (2, 8))
    assert many["forward pass"].computed == pytest.approx(4 * few["forward pass"].computed, rel=0.05)
    assert many["training step"].moments == few["training step"].moments


# ---------------------------------------------------------------------------------------------------------- commands


def printed(capsys, *arguments: object) -> str:
    """What the command prints."""
    assert get_flops.run(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_command(capsys):
    first, *rest = printed(capsys, "--model", "SepViT_Lite").splitlines()
    parameters, multiply_adds, activations = (value / 1e6 for value in TOTALS["SepViT_Lite"][:3])
    assert first == (
        f"SepViT_Lite, 224 × 224 pixels: {parameters:.3f} M parameters, {multiply_adds / 1e3:.3f} G "
        f"multiply-adds, {activations:.3f} M activations"
    )
    table = "\n".join(rest)
    heads = [line.split()[0] for line in rest if "stage 1" in line]
    assert heads == ["parameters,", "multiply-adds,", "activations,"]
    totals = re.findall(r"^total .*?([\d.,]+) +100\.0 %$", table, re.MULTILINE)
    assert totals == [f"{parameters:.3f}", f"{multiply_adds:.2f}", f"{activations:.3f}"]
    for call, most in (("forward pass", 50), ("training step", 200)):
        line = re.search(rf"^{call} +([\d.]+) .* ([\d.]+)$", table, re.MULTILINE)
        weights, total = float(line[1]), float(line[2])
        assert weights == pytest.approx(parameters * 4e6 / 2**20, abs=0.05)
        assert weights < total < most


def test_command_for_other_networks_and_forms(capsys):
    arguments = "--model SepViT_Lite --dense --input-size 64 96 --batch-size 3"
    text = printed(capsys, *arguments.split())
    assert text.startswith("SepViT_Lite, dense form, 64 × 96 pixels: 3.764 M parameters")
    assert "for 3 images on " in text
    assert " head " not in text
    text = printed(capsys, "--model", "resnet10t", "--input-size", 64)
    assert re.search(r"^linear layers ", text, re.MULTILINE)
    count = count_multiply_adds(timm.create_model("resnet10t").eval(), torch.zeros(1, 3, 64, 64))
    assert text.startswith(f"resnet10t, 64 × 64 pixels: 5.435 M parameters, {count / 1e9:.3f} G multiply-adds")
    assert "stage" not in text


def test_columns_are_aligned():
    text = costs_as_text(costs_of(timm.create_model("SepViT_Lite").eval(), torch.zeros(1, 3, 224, 224)))
    for table in text.split("\n\n"):
        assert len({len(line) for line in table.splitlines()}) == 1


MISTAKES = {
    "--model SepViT_Huge": ("--model SepViT_Huge", "SepViT_Tiny", "timm.list_models()"),
    "--dense --model resnet18": ("--dense --model resnet18", "SepViT_Base"),
    "--input-size 0": ("--input-size", "0", "at least 1"),
    "--input-size 8 8 8": ("--input-size 8 8 8", "one side, or H and W"),
    "--model efficientnet_b0 --input-size 1": ("--batch-size", "more than one value per channel"),
    "--device tpu": ("--device tpu: unknown; choose",),
    "--models x": ("--models", "did you mean --model?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, capsys):
    line = refusal(get_flops.run, "get_flops", mistake.split(), capsys)
    assert all(word in line for word in MISTAKES[mistake]), line


def test_padding_is_reported_with_the_way_out():
    """At 128 × 128, maps of 32, 16, 8 and 4 pixels do not fit windows of 7 and 14."""
    network = timm.create_model("SepViT_Lite", img_size=128)
    padding = padding_of(network, (128, 128))
    assert padding.stages == pytest.approx([0.2, 1.39, 2.06, 2.06], abs=0.01)
    share = 0.573 * (128 / 224) ** 2
    assert (
        0.7 < padding.extra / (count_multiply_adds(network.eval(), torch.zeros(1, 3, 128, 128)) / 1e9 / share - 1) < 1
    )
    assert with_less_padding(network, (128, 128)) == (
        "`input_size` 192 or `model_kwargs` window_sizes='((4,),(4,8),(4,8),(4,))'"
    )
    fitting = timm.create_model("SepViT_Lite", img_size=128, window_sizes=((4,), (4, 8), (4, 8), (4,)))
    assert padding_of(fitting, (128, 128)) == padding_of(network, (224, 448)) == ([0, 0, 0, 0], 0)
    assert with_less_padding(network, (40, 50)) == ""


def test_the_page_has_the_multiply_adds_of_sizes_and_windows():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (?:(\d+) %|none) \| (\d+) and \d+ \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for size, published, extra, side, fitting in ((int(row[0]), *row[1:]) for row in rows):
        w = int(side)
        for sizes, expected in ((sepvit.WINDOW_SIZES, published), (((w,), (w, 2 * w), (w, 2 * w), (w,)), fitting)):
            with torch.device("meta"):
                network = timm.create_model("SepViT_Lite", img_size=size, window_sizes=sizes).eval()
                count = count_multiply_adds(network, torch.zeros(1, 3, size, size))
            assert f"{count / 1e9:.3f}" == expected
            share = padding_of(network, (size, size)).extra
            assert round(100 * share) == (int(extra or 0) if sizes is sepvit.WINDOW_SIZES else 0)
