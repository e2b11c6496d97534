"""What networks cost: tools/get_flops.py, and the table that it shares with those of segmentation and detection."""

import re

import pytest
import timm
import torch
from conftest import ROOT, VARIANTS, command, refusal, succeed, tiny_network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sepvit
from sepvit_lib.training.complexity import AMONG, HEAD, INSIDE, Part, costs_as_text, costs_of, memory_of, total_of
from sepvit_lib.training.measure import count_activations, count_by_module, count_multiply_adds
from tools import get_flops

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = "tools/get_flops.py"


@pytest.mark.parametrize("name", ["SepViT_Lite", "convnext_tiny", "pvt_v2_b0", "mobilenetv3_small_050"])
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


def test_counting_leaves_the_network_as_it_was():
    network = tiny_network(sepvit.SepViT, img_size=64).eval()
    costs_of(network, torch.zeros(1, 3, 64, 64))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert {"depthwise", "pointwise"}.isdisjoint(vars(module))
    with pytest.raises(AssertionError):
        count_by_module(network, torch.zeros(1, 3, 32, 32))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_totals_are_those_of_the_readme(variant):
    network, image = timm.create_model(variant).eval(), torch.zeros(1, 3, 224, 224)
    costs = costs_of(network, image)
    parameters, multiply_adds = (total_of(costs, quantity) for quantity in ("parameters", "multiply_adds"))
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    if variant == "SepViT_Lite":
        assert multiply_adds == count_multiply_adds(network, image)
        assert total_of(costs, "activations") == count_activations(network, image)
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


def test_command():
    printed = succeed("--model", "SepViT_Lite", script=SCRIPT)
    first, *rest = printed.splitlines()
    network, image = timm.create_model("SepViT_Lite").eval(), torch.zeros(1, 3, 224, 224)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    multiply_adds, activations = (count(network, image) / 1e6 for count in (count_multiply_adds, count_activations))
    assert first == (
        f"SepViT_Lite, 224 × 224 pixels: {parameters:.3f} M parameters, {multiply_adds / 1e3:.3f} G "
        f"multiply-adds, {activations:.3f} M activations"
    )
    table = "\n".join(rest)
    heads = [line.split()[0] for line in rest if "stage 1" in line]
    assert heads == ["parameters,", "multiply-adds,", "activations,"]
    assert re.findall(r"^total .*?([\d.,]+) +100\.0 %$", table, re.MULTILINE) == [
        f"{parameters:.3f}",
        f"{multiply_adds:.2f}",
        f"{activations:.3f}",
    ]
    for call, most in (("forward pass", 50), ("training step", 200)):
        weights, total = (
            float(re.search(rf"^{call} {pattern}$", table, re.MULTILINE)[1])
            for pattern in (r" *([\d.]+) .*", r".* ([\d.]+)")
        )
        assert weights == pytest.approx(parameters * 4e6 / 2**20, abs=0.05)
        assert weights < total < most


def test_command_for_other_networks_and_forms():
    printed = succeed("--model", "SepViT_Lite", "--dense", "--input-size", 64, 96, "--batch-size", 3, script=SCRIPT)
    assert printed.startswith("SepViT_Lite, dense form, 64 × 96 pixels: 3.764 M parameters")
    assert "for 3 images on " in printed
    assert " head " not in printed
    printed = succeed("--model", "resnet10t", "--input-size", 64, script=SCRIPT)
    assert re.search(r"^linear layers ", printed, re.MULTILINE)
    network = timm.create_model("resnet10t").eval()
    count = count_multiply_adds(network, torch.zeros(1, 3, 64, 64))
    assert printed.startswith(f"resnet10t, 64 × 64 pixels: 5.435 M parameters, {count / 1e9:.3f} G multiply-adds")
    assert "stage" not in printed


def test_columns_are_aligned():
    text = costs_as_text(costs_of(timm.create_model("SepViT_Lite").eval(), torch.zeros(1, 3, 224, 224)))
    for table in text.split("\n\n"):
        assert len({len(line) for line in table.splitlines()}) == 1


MISTAKES = {
    "unknown network": (["--model", "SepViT_Huge"], ["--model SepViT_Huge", "SepViT_Tiny", "timm.list_models()"]),
    "dense form of another": (["--dense", "--model", "resnet18"], ["--dense --model resnet18", "SepViT_Base"]),
    "no pixels": (["--input-size", "0"], ["--input-size", "0", "at least 1"]),
    "three sides": (["--input-size", "8", "8", "8"], ["--input-size 8 8 8", "name one side, or H and W"]),
    "too small": (
        ["--model", "efficientnet_b0", "--input-size", "1", "--batch-size", "1"],
        ["--batch-size 1", "use more images"],
    ),
    "no batch": (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    "unknown device": (["--device", "tpu"], ["--device tpu: unknown; choose"]),
    "unknown setting": (["--models", "x"], ["--models", "did you mean --model?"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, capsys):
    arguments, words = MISTAKES[mistake]
    line = refusal(get_flops.run, "get_flops", arguments, capsys)
    assert all(word in line for word in words), line


def test_a_mistake_as_a_command():
    result = command("--model", "SepViT_Huge", script=SCRIPT)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("folder", "config"),
    [("segmentation", "fpn_sepvit_lite_112x112_demo.py"), ("detection", "mask_rcnn_sepvit_lite_fpn_demo.py")],
)
def test_backbones_have_the_same_table(folder, config):
    arguments = [f"configs/{config}", "--shape", 64, 96, "--memory"]
    printed = succeed(*arguments, script=f"{folder}/get_flops.py", cwd=ROOT / folder)
    own = succeed("--model", "SepViT_Lite", "--dense", "--input-size", 64, 96, script=SCRIPT)
    table = costs_as_text(costs_of(sepvit.create_dense("SepViT_Lite").eval(), torch.zeros(1, 3, 64, 96)))
    assert table in printed
    assert table in own
    assert "\ntraining step " in printed
    assert re.search(r"^(EncoderDecoder|MaskRCNN), 64 × 96 pixels: [\d.]+ M parameters", printed, re.MULTILINE)
