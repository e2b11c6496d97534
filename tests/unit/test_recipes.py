"""Recipes: YAML files with settings of main.py, and the args.yaml that each run writes."""

import re

import pytest
import torch
import yaml
from conftest import ROOT, SMALLEST, differences, read_log, refusal

import main
from sepvit_lib.common.recipes import parse_with_recipe, write_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))


def parse(*arguments) -> dict:
    """The settings of a command line."""
    return vars(parse_with_recipe(main.build_parser(), [str(argument) for argument in arguments]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_valid(path):
    args = parse_with_recipe(main.build_parser(), ["--config", str(path), "--device", "cpu"])
    main.check_settings(args)


@pytest.mark.parametrize(
    ("variant", "drop_path", "weight_decay", "warmup_epochs"),
    [("Lite", 0.1, 0.05, 5), ("Tiny", 0.2, 0.05, 5), ("Small", 0.3, 0.05, 5), ("Base", 0.5, 0.1, 20)],
)
def test_recipes_match_the_published_ones(variant, drop_path, weight_decay, warmup_epochs):
    """The defaults, except for each variant's own settings."""
    args = parse("--config", ROOT / f"recipes/sepvit_{variant.lower()}_imagenet.yaml")
    own = dict(
        model=f"SepViT_{variant}",
        drop_path=drop_path,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        batch_size=128,
        dist_eval=True,
        config=args["config"],
    )
    assert args == parse() | own


def test_the_command_line_overrides_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "lr: 1e-3\nbatch-size: 8\ndist_eval: true\npin_mem: no\nmodel_ema: True\nopt_betas: [0.9, 0.95]\n"
        "amp: off\naa: ''\ncutmix_minmax: null\nnum_classes:\ndecay_milestones: [5, 7]\nlr_noise: [0.5]\n"
    )
    args = parse("--config", path, "--batch-size", 16, "--no-dist-eval", "--decay-milestones", 9)
    assert args == parse() | dict(
        lr=1e-3,
        batch_size=16,
        dist_eval=False,
        pin_mem=False,
        model_ema=True,
        decay_milestones=[9],
        lr_noise=[0.5],
        opt_betas=[0.9, 0.95],
        amp="off",
        aa="",
        config=str(path),
    )


def test_a_recipe_inherits_another(tmp_path):
    """Its own settings win. The network's arguments are those of one of the recipes, not of both."""
    (tmp_path / "base.yaml").write_text("lr: 1e-3\nepochs: 7\nmodel_kwargs:\n  overlap: false\n")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub/own.yaml"
    path.write_text("base: ../base.yaml\nepochs: 9\nmodel_kwargs:\n  window_tokens: zeros\n")
    args = parse("--config", path, "--lr", "2e-3")
    assert args == parse() | dict(lr=2e-3, epochs=9, model_kwargs=dict(window_tokens="zeros"), config=str(path))


def test_the_recipes_of_the_ablations_end_in_the_published_network():
    rows = [parse("--config", path) for path in sorted((ROOT / "recipes/ablations").glob("[1-4]*.yaml"))]
    published = parse("--config", ROOT / "recipes/sepvit_tiny_imagenet.yaml")
    assert [len(row["model_kwargs"]) for row in rows] == [3, 2, 1, 0]
    assert all(row | dict(model_kwargs={}, config="") == published | dict(config="") for row in rows)


MISTAKES = {
    "base: nowhere.yaml": "base nowhere.yaml: cannot be read",
    "base: recipe.yaml": "base recipe.yaml: base: .*cannot inherit another recipe",
    "epochs: 3\nlearning_rate: 1": "learning_rate: unknown setting",
    "model: SepViT_Tiny\noutput-dri: x": "output-dri: .*did you mean --output_dir?",
    "config: x.yaml": "config: unknown setting",
    "no_dist_eval: true": "no_dist_eval: unknown setting",
    "# a comment\nlr: fast": "argument --lr: .*fast",
    "epochs: 3.5": "argument --epochs: .*3.5",
    "epochs: 0": "argument --epochs: 0 is out of range",
    "lr: .inf": "argument --lr: .*.inf",
    "lr: inf": "argument --lr: inf is not a finite number",
    "lr: [1, 2]": "lr: takes a single value",
    "output_dir: {a: b}": "output_dir: takes a single value",
    "lr:": "argument --lr",
    "lr: null": "argument --lr: .*null",
    "model_ema: 1": "model_ema: takes true or false",
    "model_ema: [true]": "model_ema: takes true or false",
    "scale: 0.5": "argument --scale: expected 2 arguments",
    "scale: [0.5]": "argument --scale: expected 2 arguments",
    "scale: [0.1, 0.5, 0.9]": "0.9: unknown setting",
    "amp: bf16": "argument --amp: .*bf16.*float16",
    "lr: 1\nseed: 1\nlr: 2": "lr: set twice",
    "dist-eval: true\ndist_eval: false": "dist_eval: set twice",
    "lr: 1: 2": "not YAML .*line 1",
    "lr: 1\n\tseed: 2": "not YAML .*line 2",
    "- lr": "contains no settings",
    "": "contains no settings",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named_with_the_recipe_and_the_setting(text, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    line = refusal(main.run, "main", ["--config", path], capsys)
    assert re.match(f"main.py: --config {path}: {MISTAKES[text]}", line)


def test_files_that_are_no_recipes(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    for name, words in (("latin.yaml", "utf-8"), ("nowhere.yaml", "No such file"), (".", "Is a directory")):
        assert words in refusal(main.run, "main", ["--config", tmp_path / name], capsys)


def test_every_setting_survives_a_recipe(tmp_path):
    """Including texts that YAML would read as another type."""
    settings = vars(main.build_parser().parse_args([])) | dict(
        lr_noise=[0.1, 0.9],
        opt_betas=[0.9, 0.999],
        cutmix_minmax=[0.2, 0.8],
        amp="off",
        aa="",
        output_dir="off",
        data_path="1e3",
        data_set="null",
        num_classes=5,
        opt_eps=1e-12,
        model_ema=True,
        seed=0,
        train_split="a: b # c",
    )
    write_recipe(tmp_path / "args.yaml", settings, "x")
    args = parse("--config", tmp_path / "args.yaml")
    assert args.pop("config") == str(tmp_path / "args.yaml")
    settings.pop("config")
    settings["scale"], settings["ratio"] = list(settings["scale"]), list(settings["ratio"])
    assert args == settings


def test_a_run_is_repeated_from_its_args_yaml(few_digits, tmp_path, capsys):
    """Bit for bit."""
    recipe = f"model: {SMALLEST[1]}\ninput_size: 32\nbatch_size: 16\nepochs: 2\nnum_workers: 0\nmodel_ema: true\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "lr: 5e-3\nmixup: 0.3\n")
    first, second = (["--output_dir", str(tmp_path / name)] for name in ("first", "second"))
    start = ["--config", str(tmp_path / "recipe.yaml"), "--data-path", str(few_digits), "--seed", "7"]
    assert main.run([*start, *first]) == 0
    assert yaml.safe_load((tmp_path / "first/args.yaml").read_text())["mixup"] == 0.3
    again = ["--config", str(tmp_path / "first/args.yaml")]
    assert main.run([*again, *second]) == 0
    first, second = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("first", "second"))
    assert sorted(place.partition(":")[0] for place in differences(first, second)) == [
        "/args/config",
        "/args/output_dir",
    ]
    assert read_log(tmp_path / "first") == read_log(tmp_path / "second")
    assert "first: already contains a run" in refusal(main.run, "main", again, capsys)


def test_readme_has_the_published_results():
    """Top-1, throughput and latency match the paper, and the settings match the recipes."""
    rows = [
        [cell.strip("`* ") for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if line.startswith("| `SepViT_")
    ]
    paper = {
        "SepViT_Lite": ("72.3 ¹", "–", "–"),
        "SepViT_Tiny": ("82.7", "729", "24.5"),
        "SepViT_Small": ("83.6", "471", "34.9"),
        "SepViT_Base": ("84.2", "302", "46.6"),
    }
    assert {row[0]: tuple(row[3:6]) for row in rows} == paper
    for model, *_, drop_path, weight_decay, warmup_epochs in rows:
        args = parse("--config", ROOT / f"recipes/{model.lower()}_imagenet.yaml")
        assert float(drop_path.rstrip(" ²")) == args["drop_path"]
        assert (float(weight_decay), int(warmup_epochs)) == (args["weight_decay"], args["warmup_epochs"])


def test_readme_names_a_command_for_each_variant():
    for variant in ("lite", "tiny", "small", "base"):
        assert f"--config recipes/sepvit_{variant}_imagenet.yaml" in README
    assert (
        "--model SepViT_Base --batch-size 128 --data-path imagenet --dist-eval --drop-path 0.5 --weight-decay 0.1"
        in README
    )
    assert all((path.parent.name if "ablations" in path.parts else path.name) in README for path in RECIPES)
