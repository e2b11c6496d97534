"""Settings of the network: from the command line and recipes to checkpoints, and from there to every command."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import SMALL, refusal
from safetensors.torch import save_file

import main
import sepvit
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.run.checkpoints import load_weights

WINDOWS = "window_sizes=((7,),(7,),(7,),(7,))"
PLAIN_WINDOWS = [[7], [7], [7], [7]]
SIZE = 32  # later stages are a single window of 7 or 14: the entries are the same, the outputs are not


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def windows_of(network: torch.nn.Module) -> set[int]:
    return {block.window_size for block in network.named_blocks().values()}


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory) -> tuple[Path, list]:
    """A run without grouped attention, and the arguments that it shares with others."""
    folder = tmp_path_factory.mktemp("vary") / "run"
    shared = [*SMALL, "--data-path", few_digits, "--device", "cpu"]
    assert run(*shared, "--output_dir", folder, "--model-kwargs", WINDOWS) == 0
    return folder, shared


def test_checkpoints_know_how_their_network_was_built(trained, capsys):
    """The checkpoint alone is enough, also as bare weights: torch.save keeps what state dicts record."""
    folder, shared = trained
    path, bare = folder / "checkpoint.pth", folder / "bare.pth"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint["model"], bare)
    images = torch.randn(2, 3, SIZE, SIZE)
    direct = timm.create_model("SepViT_Lite", img_size=SIZE, num_classes=3, window_sizes=PLAIN_WINDOWS).eval()
    direct.load_state_dict(checkpoint["model"])
    classifier = load_classifier(str(path))
    assert windows_of(classifier.network) == {7}
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(images), direct(images))
    losses = []
    for resumed in (path, bare):
        capsys.readouterr()
        assert run(*shared, "--eval", "--resume", resumed) == 0
        losses.append(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[-1])
    assert losses[0] == losses[1]
    assert run(*shared, "--finetune", bare, "--lr", 0, "--output_dir", folder.parent / "tuned") == 0
    tuned = torch.load(folder.parent / "tuned/checkpoint.pth", weights_only=True)
    assert sepvit.settings_of(tuned["model"]) == sepvit.settings_of(checkpoint["model"])


def test_weights_that_fit_only_by_luck_are_refused(trained, capsys):
    folder, shared = trained
    weights = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    save_file(weights, folder / "bare.safetensors")
    arguments = [*shared, "--eval", "--resume", folder / "bare.safetensors"]
    assert "pass those that it was trained with" in refusal(main.run, "main", arguments, capsys)
    assert run(*arguments, "--model-kwargs", WINDOWS) == 0
    arguments = [*shared, "--eval", "--resume", folder / "checkpoint.pth", "--model-kwargs", "window_sizes=[[7]]*4"]
    capsys.readouterr()
    assert "--model-kwargs" in refusal(main.run, "main", arguments, capsys)
    default = timm.create_model("SepViT_Lite", img_size=SIZE, num_classes=3)
    with pytest.raises(UserError, match="was trained with window_sizes="):
        load_weights(default, weights, "x", variant_hint="")
    report = load_weights(default, weights, "x", variant_hint="", new_settings=True)
    assert "trained with window_sizes=" in str(report)


def test_recipes_and_resumed_runs_keep_the_settings(trained, capsys):
    folder, shared = trained
    recipe = yaml.safe_load((folder / "args.yaml").read_text())
    assert recipe["model_kwargs"] == dict(window_sizes=PLAIN_WINDOWS)
    args = main.parse_with_recipe(main.build_parser(), ["--config", str(folder / "args.yaml")])
    assert args.model_kwargs == recipe["model_kwargs"]
    resumed = [*shared, "--output_dir", folder, "--auto-resume", "--model-kwargs"]
    assert run(*resumed, WINDOWS) == 0
    capsys.readouterr()
    assert "--model-kwargs" in refusal(main.run, "main", [*resumed, "mlp_ratio=4"], capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model-kwargs window_sizes", "expected KEY=VALUE"),
        ("--model-kwargs windows=7", "unexpected keyword argument"),
    ],
)
def test_mistakes(flags, words, few_digits, tmp_path, capsys):
    arguments = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--device", "cpu", *flags.split()]
    assert words in refusal(main.run, "main", arguments, capsys)
    assert not list(tmp_path.iterdir())
