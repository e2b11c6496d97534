"""Settings of the network: from the command line and recipes to checkpoints, and from there to every command."""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import ROOT, SMALL, SMALLEST, differences, refusal
from safetensors.torch import save_file
from timm.utils import dispatch_clip_grad

import main
import predict
import sepvit
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.run.checkpoints import load_weights
from tools import export, visualize

WINDOWS = "window_sizes=((7,),(7,),(7,),(7,))"
PLAIN_WINDOWS = [[7], [7], [7], [7]]
SIZE = 32  # later stages are a single window of 7 or 14: the entries are the same, the outputs are not


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def windows_of(network: Any) -> set[int]:
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
    hub = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=str(bare), img_size=SIZE, num_classes=3)
    with torch.no_grad():
        torch.testing.assert_close(hub.eval()(images), direct(images))
    assert run(*shared, "--finetune", bare, "--lr", 0, "--output_dir", folder.parent / "tuned") == 0
    tuned = torch.load(folder.parent / "tuned/checkpoint.pth", weights_only=True)
    assert sepvit.settings_of(tuned["model"]) == sepvit.settings_of(checkpoint["model"])


def test_weights_that_fit_only_by_luck_are_refused(trained, capsys):
    folder, shared = trained
    weights = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    save_file(weights, folder / "bare.safetensors")
    arguments = [*shared, "--eval", "--resume", folder / "bare.safetensors"]
    assert "pass the sizes that it was trained with" in refusal(main.run, "main", arguments, capsys)
    assert run(*arguments, "--model-kwargs", WINDOWS) == 0
    arguments = [*shared, "--eval", "--resume", folder / "checkpoint.pth", "--model-kwargs", "window_sizes=[[7]]*4"]
    capsys.readouterr()
    assert "--model-kwargs" in refusal(main.run, "main", arguments, capsys)
    default = timm.create_model("SepViT_Lite", img_size=SIZE, num_classes=3)
    with pytest.raises(UserError, match="was trained with window_sizes="):
        load_weights(default, weights, "x", variant_hint="")
    report = load_weights(default, weights, "x", variant_hint="", new_classifier=True)
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


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes/ablations").iterdir()), ids=lambda path: path.stem)
def test_the_recipes_of_the_ablations_train(recipe, few_digits, tmp_path):
    shared = [*SMALLEST, "--data-path", few_digits, "--device", "cpu", "--num_workers", 0]
    assert run("--config", recipe, *shared, "--epochs", 1, "--warmup-epochs", 0, "--output_dir", tmp_path) == 0
    kwargs = main.parse_with_recipe(main.build_parser(), ["--config", str(recipe)]).model_kwargs
    settings = load_classifier(str(tmp_path / "checkpoint.pth")).network.settings()
    assert {name: settings[name] for name in kwargs if name != "grouped"} == {
        k: v for k, v in kwargs.items() if k != "grouped"
    }
    assert (14 in settings["window_sizes"][1]) == kwargs.get("grouped", True)


@pytest.mark.parametrize(
    ("argument", "words"),
    [("pointwise=false", "no attention among windows"), ("window_tokens=shared", "no learned window tokens")],
)
def test_variations_through_every_command(argument, words, few_digits, tmp_path, capsys):
    """Trained, evaluated, predicted, drawn and exported from the checkpoint alone."""
    folder, image = tmp_path / "run", next(few_digits.glob("val/0/*"))
    shared = [*SMALL, "--input-size", 64, "--data-path", few_digits, "--device", "cpu"]
    assert run(*shared, "--output_dir", folder, "--model-kwargs", argument) == 0
    assert run(*shared, "--eval", "--resume", folder / "checkpoint.pth") == 0
    resume = ["--resume", str(folder / "checkpoint.pth")]
    assert predict.run([str(image), *resume, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert visualize.run([str(image), *resume, "--out", str(tmp_path / "figures")]) == 0
    assert words in capsys.readouterr().out
    formats = ["--formats", "safetensors", "torchscript", "--rounds", "1"]
    assert export.run([*resume, "--out", str(tmp_path / "exported"), *formats]) == 0
    loaded = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=resume[1], img_size=64, num_classes=3)
    assert loaded.settings() == load_classifier(resume[1]).network.settings()
    again = load_classifier(str(next((tmp_path / "exported").glob("*-timm"))))
    assert again.network.settings() == load_classifier(resume[1]).network.settings()


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


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser, loss and schedule
# ----------------------------------------------------------------------------------------------------------------------


def built(*flags: str) -> tuple[torch.nn.Module, main.Training, argparse.Namespace]:
    """A small network and its training state."""
    args = main.build_parser().parse_args(["--model", "SepViT_Lite", "--input-size", "64", *flags])
    precision = main.build_precision(args, torch.device("cpu"))
    model = main.build_model(args, 3, precision)
    return model, main.build_training(args, model, precision, 1), args


def groups_of(model: torch.nn.Module, training: main.Training) -> dict[str, dict]:
    """The parameter group of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in training.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("more", [(), ("--decay-window-tokens",)])
def test_layer_decay(more):
    """Each block learns slower than the one after it. Log and schedule have the rate of the head."""
    model, training, _ = built("--layer-decay", "0.5", "--layer-decay-min-scale", "0.01", "--warmup-epochs", "0", *more)
    groups = groups_of(model, training)
    scale = {name: group["lr_scale"] for name, group in groups.items()}
    assert scale["head.weight"] == 1
    assert scale["blocks.3.1.mlp.fc1.weight"] == 2 * scale["blocks.3.0.mlp.fc1.weight"]
    assert scale["patch_embeds.0.proj.weight"] == 0.01
    assert all(group["lr"] == pytest.approx(5e-4 * 64 / 512 * group["lr_scale"]) for group in groups.values())
    assert (groups["blocks.0.0.win_tokens"]["weight_decay"] > 0) == bool(more)


def test_muon_leaves_window_tokens_and_depthwise_convolutions_to_adamw():
    model, training, _ = built("--opt", "muon", "--opt-kwargs", "ns_steps=3")
    groups = groups_of(model, training)
    fallback = {name for name, group in groups.items() if group.get("use_fallback") and group["params"][0].ndim > 1}
    assert fallback == {
        n for n, p in model.named_parameters() if n.endswith("win_tokens") or ("pos_block" in n and p.ndim > 1)
    }
    assert all(group["ns_steps"] == 3 for group in groups.values())


@pytest.mark.parametrize(("mode", "bound"), [("norm", 0.1), ("value", 0.001), ("agc", 0.01)])
def test_clip_modes(mode, bound):
    """Gradients before the step are those of timm."""
    model, training, _ = built()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for p, q in zip(model.parameters(), expected):
        q.grad = p.grad.clone()
    dispatch_clip_grad(expected, bound, mode)
    seen: list[torch.Tensor] = []
    training.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    assert not training.step(bound, [], mode)
    torch.testing.assert_close(seen, [q.grad for q in expected])


FLAGS = {
    "layer decay": "--layer-decay 0.7",
    "muon": "--opt muon --lr 1e-3 --opt-eps 1e-7",
    "bce": "--bce-loss --bce-target-thresh 0.2",
    "agc": "--clip-mode agc --clip-grad 0.05",
    "mixup off": "--mixup-off-epoch 1 --mixup 0.8",
    "wsd": "--sched wsd --decay-epochs 1 --warmup-epochs 0 --lr-decay-fn cosine",
    "head": "--head-lr-scale 5",
    "frozen": "--freeze-stages 2",
    "no augmentation": "--no-aug",
    "rectangle": "--input-size 32 48 --mean 0.4 --std 0.3 --crop-pct 1",
    "classes": "--class-weights balanced --sampler balanced --smoothing 0",
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_resumed_runs_compute_the_same(flags, few_digits, tmp_path):
    """Bit for bit, from a checkpoint within the run's first epoch."""
    shared = [
        *SMALLEST,
        "--data-path",
        few_digits,
        "--device",
        "cpu",
        "--epochs",
        2,
        "--checkpoint-every",
        1,
        *flags.split(),
    ]
    shared += ["--keep-checkpoints", 9, "--auto-resume", "--output_dir"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(*shared, whole) == 0
    resumed.mkdir()
    shutil.copy(whole / "checkpoint-00000001.pth", resumed)
    assert run(*shared, resumed) == 0
    first, second = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, resumed))
    assert differences(first["model"], second["model"]) == []


def test_settings_change_what_a_run_computes(few_digits, tmp_path, capsys):
    """Each of them: none is ignored, and a run is not resumed with a different value."""
    shared = [*SMALLEST, "--data-path", few_digits, "--device", "cpu", "--epochs", 2, "--output_dir"]
    assert run(*shared, tmp_path / "plain") == 0
    plain = torch.load(tmp_path / "plain/checkpoint.pth", weights_only=True)["model"]
    for name, flags in FLAGS.items():
        assert run(*shared, tmp_path / name, *flags.split()) == 0, name
        varied = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"]
        assert differences(plain, varied), name
        capsys.readouterr()
        again = [*shared, tmp_path / "plain", "--auto-resume", "--epochs", 3, *flags.split()]
        assert flags.split()[0] in refusal(main.run, "main", again, capsys)
