"""Networks of timm besides SepViT: built, trained and evaluated by main.py, whatever they take."""

import math

import pytest
import torch
from conftest import PLAIN, link_digits, read_log, refusal

import main
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.networks import create_network

# One small network each of twenty families, and the side of its images.
NETWORKS = {
    "dla46x_c": 32,
    "levit_128s": 64,
    "mobilevit_xxs": 32,
    "pvt_v2_b0": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "test_mambaout": 32,
    "test_nfnet": 32,
}
FAMILIES = """convit_tiny edgenext_xx_small efficientformerv2_s0 efficientvit_b0 fastvit_t8 ghostnet_050 lcnet_035
    pit_ti_224 repghostnet_050 test_byobnet test_convnext test_resnet"""
SLOW = {"efficientvit_m0": 64, **dict.fromkeys(FAMILIES.split(), 32)}
SIZES = [*NETWORKS.items(), *(pytest.param(*entry, marks=pytest.mark.slow) for entry in SLOW.items())]
LACKING = ("densenet121", "hrnet_w18_small", "repvit_m0_9", "vgg11")  # some of those without stochastic depth


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """Two classes, with two training images and one validation image each."""
    return link_digits(digits, tmp_path_factory.mktemp("other"), "01", train=2, val=1)


def settings(data, out, name, size=32, batch_size=4):
    flags = f"--model {name} --input-size {size} --batch-size {batch_size} --epochs 1 --num_workers 0 --device cpu"
    return [*flags.split(), "--data-path", data, "--output_dir", out]


def run(*arguments):
    return main.run(list(map(str, arguments)))


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_a_network_trains_and_is_loaded(name, size, data, tmp_path):
    assert run(*settings(data, tmp_path, name, size)) == 0
    assert math.isfinite(read_log(tmp_path)[-1]["train_loss"])
    classifier = load_classifier(str(tmp_path / "checkpoint.pth"))
    assert classifier.description.model == name
    assert classifier.logits([torch.zeros(3, size, size)]).isfinite().sum() == 2


def test_two_heads_are_evaluated_and_finetuned(data, few_digits, tmp_path, capsys):
    """A distilled DeiT has two heads, both of which depend on the number of classes."""
    common = settings(data, tmp_path / "two", "deit_tiny_distilled_patch16_224")
    assert run(*common) == 0
    assert run(*common, "--eval", "--resume", tmp_path / "two/checkpoint.pth") == 0
    three = settings(few_digits, tmp_path / "three", "deit_tiny_distilled_patch16_224")
    line = refusal(main.run, "main", [*three, "--eval", "--resume", tmp_path / "two/checkpoint.pth"], capsys)
    assert "1 names differ (2)" in line
    assert run(*three, "--finetune", tmp_path / "two/checkpoint.pth") == 0
    printed = capsys.readouterr().out
    assert "2 of 3 classes of the classifier are carried over by name" in printed
    two, weights = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"] for name in ("two", "three")
    )
    for head in ("head.weight", "head_dist.weight"):
        assert len(weights[head]) == 3
        torch.testing.assert_close(weights[head][:2], two[head], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", LACKING)
def test_a_default_that_a_network_lacks_is_ignored_and_said(name, capsys):
    rates = dict(drop=0.1, drop_path=0.2)
    with torch.device("meta"):
        network = create_network("--model", name, 3, 64, rates, asked_for=["drop"])
        found = {getattr(module, name, None) for module in network.modules() for name in ("p", "drop_rate")}
        assert 0.1 in found
        assert "drop_path_rate" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"`drop_path` 0.2"):
            create_network("--model", name, 3, 64, rates, asked_for=["drop_path"])
        create_network("--model", name, 3, 64, dict(drop=0, drop_path=0), asked_for=["drop_path"])
        assert capsys.readouterr().out == ""


def test_a_rate_that_is_asked_for_is_refused(data, tmp_path, capsys):
    common = settings(data, tmp_path / "run", "ghostnet_050")
    assert "--drop-path 0.1" in refusal(main.run, "main", [*common, "--drop-path", 0.1], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "size", "flags", "expected"),
    [
        ("vgg11", 32, ["--grad-checkpointing"], "--grad-checkpointing"),
        ("crossvit_tiny_240", 224, [], "--input-size 224"),
        ("efficientformer_l1", 32, [], "--input-size 32"),
    ],
)
def test_what_a_network_cannot_do_is_refused(name, size, flags, expected, data, tmp_path, capsys):
    line = refusal(main.run, "main", [*settings(data, tmp_path / "run", name, size), *flags], capsys)
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_single_value_per_channel_is_refused(data, tmp_path, capsys):
    """BatchNorm has no variance of one image whose map is one pixel."""
    line = refusal(main.run, "main", settings(data, tmp_path, "test_resnet", batch_size=1) + PLAIN, capsys)
    assert "--batch-size" in line
    assert not list(tmp_path.glob("*.pth"))
