"""Users' mistakes: one line that names the thing and the way out, exit status 2, nothing half-written."""

import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, SMALL, Code, command
from PIL import Image

import main
from tools import check_setup


@pytest.fixture(scope="module")
def files(tmp_path_factory, few_digits):
    """Checkpoints and data folders to stumble over."""
    root = tmp_path_factory.mktemp("bad")
    lite = timm.create_model("SepViT_Lite", img_size=32, num_classes=3)
    torch.save({"model": lite.state_dict()}, root / "lite.pth")
    (root / "truncated.pth").write_bytes((root / "lite.pth").read_bytes()[:5000])
    (root / "text.pth").write_text("train a model first")
    (root / "csv.pth").write_text("epoch,loss\n0,1.5\n")
    torch.save({"model": {}}, root / "empty.pth")
    torch.save([1, 2], root / "list.pth")
    torch.save({"epoch": 3}, root / "no_weights.pth")
    torch.save({"model": lite.state_dict(), "args": Code(root / "ran")}, root / "malicious.pth")
    (root / "malicious_pickle.pth").write_bytes(pickle.dumps(Code(root / "ran")))
    incomplete = lite.state_dict()
    del incomplete["blocks.2.0.norm1.weight"]
    torch.save(incomplete, root / "incomplete.pth")
    torch.save(timm.create_model("SepViT_Small", img_size=32, num_classes=3).state_dict(), root / "small.pth")
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), root / "resnet.pth")
    torch.save(timm.create_model("SepViT_Lite", img_size=32, num_classes=9).state_dict(), root / "nine.pth")
    torch.save(timm.create_model("SepViT_Lite", img_size=96, num_classes=3).state_dict(), root / "size96.pth")
    for name in ("no_images", "no_val", "no_classes", "other_classes"):
        (root / name / "train/0").mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / name / "train/0/a.png")
    (root / "no_images/train/1").mkdir()
    (root / "no_images/val").symlink_to(few_digits / "val")
    (root / "no_classes/val").mkdir()
    (root / "other_classes/val/7").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "other_classes/val/7/a.png")
    (root / "empty").mkdir()
    (root / "broken_tar").mkdir()
    (root / "broken_tar/val.tar").write_text("no archive")
    (root / "broken_inat").mkdir()
    for name in ("categories", "train2018", "val2018"):
        (root / f"broken_inat/{name}.json").write_text("[]")
    (root / "a_file").write_text("")
    return root


MISTAKES = {
    "unknown model": (["--model", "SepViT_Huge"], ["--model SepViT_Huge", "SepViT_Tiny"]),
    "missing data folder": (["--data-path", "{root}/nowhere"], ["--data-path", "nowhere", "no such folder"]),
    "empty data folder": (["--data-path", "{root}/empty"], ["{root}/empty", "train/ and val/"]),
    "no validation folder": (["--data-path", "{root}/no_val"], ["no val/ folder"]),
    "no class folders": (["--data-path", "{root}/no_classes"], ["no_classes/val", "class folder"]),
    "class folder without images": (["--data-path", "{root}/no_images"], ["no_images/train", "1"]),
    "other classes in validation": (["--data-path", "{root}/other_classes"], ["2 classes", "0, 7"]),
    "unknown data set": (["--data-set", "MNIST"], ["--data-set MNIST", "IMNET"]),
    "no cifar": (["--data-set", "CIFAR"], ["CIFAR-100"]),
    "no inat": (["--data-set", "INAT"], ["categories.json"]),
    "no webdataset": (["--data-set", "wds/x", "--num-classes", "3"], ["--data-set wds/x"]),
    "missing checkpoint": (["--resume", "{root}/nowhere.pth"], ["--resume {root}/nowhere.pth: no such file"]),
    "truncated checkpoint": (["--resume", "{root}/truncated.pth"], ["truncated.pth", "truncated"]),
    "text for a checkpoint": (["--resume", "{root}/text.pth"], ["text.pth", "not a checkpoint"]),
    "table for a checkpoint": (["--resume", "{root}/csv.pth"], ["csv.pth", "not a checkpoint"]),
    "list for a checkpoint": (["--resume", "{root}/list.pth"], ["holds a list"]),
    "checkpoint without weights": (["--resume", "{root}/no_weights.pth"], ["holds no model weights"]),
    "empty weights": (["--resume", "{root}/empty.pth"], ["holds no model weights"]),
    "code in a checkpoint": (["--resume", "{root}/malicious.pth"], ["refused", "could run code"]),
    "code in a pickle": (["--finetune", "{root}/malicious_pickle.pth"], ["--finetune", "malicious_pickle.pth"]),
    "folder for a checkpoint": (["--resume", "{root}/empty"], ["no such file"]),
    "another variant": (["--resume", "{root}/small.pth"], ["holds SepViT_Small, not SepViT_Lite", "--model"]),
    "another architecture": (["--resume", "{root}/resnet.pth"], ["holds no SepViT"]),
    "incomplete checkpoint": (["--resume", "{root}/incomplete.pth"], ["1 entries are missing", "2.0.norm1.weight"]),
    "another number of classes": (["--resume", "{root}/nine.pth"], ["head.weight is (9, 256)", "--finetune"]),
    "another image size": (["--resume", "{root}/size96.pth"], ["--input-size 32", "--finetune"]),
    "variant to finetune": (["--finetune", "{root}/small.pth"], ["holds SepViT_Small"]),
    "resume and finetune": (["--resume", "{root}/lite.pth", "--finetune", "{root}/lite.pth"], ["choose one"]),
    "batch larger than the data set": (["--batch-size", "50"], ["--batch-size 50", "48 training images"]),
    "repeated augmentation of too few": (["--repeated-aug"], ["--no-repeated-aug"]),
    "odd batch with mixup": (["--batch-size", "7"], ["--batch-size 7", "--mixup 0 --cutmix 0"]),
    "negative learning rate": (["--lr", "-1e-3"], ["--lr", "-1e-3", "at least 0"]),
    "negative workers": (["--num_workers", "-1"], ["--num_workers", "-1"]),
    "zero batch": (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    "text for a number": (["--epochs", "many"], ["--epochs", "many"]),
    "rate above one": (["--drop-path", "1.5"], ["--drop-path", "at most 1"]),
    "unknown setting": (["--larning-rate", "1"], ["--larning-rate"]),
    "unknown optimiser": (["--opt", "adamv"], ["--opt adamv"]),
    "one beta": (["--opt-betas", "0.9"], ["--opt-betas 0.9", "two numbers"]),
    "betas of one": (["--opt-betas", "1", "1"], ["--opt-betas 1.0 1.0"]),
    "optimiser that cannot be built": (["--opt", "fusedadam"], ["--opt fusedadam"]),
    "model without these settings": (["--model", "vgg11"], ["--model vgg11"]),
    "no epoch left": (["--start_epoch", "5"], ["--epochs 1"]),
    "number of processes without their numbers": (["--world_size", "8"], ["--world_size 8", "torchrun"]),
    "unknown reader": (["--data-set", "foo/bar"], ["--data-set foo/bar", "wds/…"]),
    "missing shards": (["--data-set", "wds/x", "--num-classes", "3", "--val-split", "v-{{0..1}}.tar|9"],
                       ["2 of 2 shards", "v-0.tar"]),
    "broken archive": (["--data-path", "{root}/broken_tar"], ["val.tar", "no archive"]),
    "unwritable folder for an evaluation": (["--eval", "--output_dir", "/proc/x"], ["--output_dir /proc/x"]),
    "iNaturalist's annotations broken": (["--data-path", "{root}/broken_inat", "--data-set", "INAT"], ["annotations"]),
    "unknown device": (["--device", "tpu"], ["--device tpu", "cuda, mps or cpu"]),
    "device that is not there": (["--device", "mps"], ["--device mps", "cpu"]),
    "unknown augmentation": (["--aa", "rand-x9"], ["--aa rand-x9"]),
    "no teacher": (["--distillation-type", "soft"], ["--teacher-path"]),
    "missing teacher": (["--distillation-type", "hard", "--teacher-path", "{root}/t.pth"], ["--teacher-path", "t.pth"]),
    "unwritable output folder": (["--output_dir", "{root}/a_file/run"], ["--output_dir", "cannot be written"]),
    "output on a read-only file system": (["--output_dir", "/proc/run"], ["--output_dir /proc/run"]),
    "resume from a folder": (["--resume", "{root}"], ["--resume {root}: no such file"]),
    "resume below a file": (["--resume", "{root}/a_file/x.pth"], ["--resume {root}/a_file/x.pth: no such file"]),
    "download that fails": (["--resume", "https://127.0.0.1:9/x.pth"], ["127.0.0.1:9/x.pth", "failed"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, files, few_digits, tmp_path, capsys, monkeypatch):
    arguments, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    base = [*map(str, SMALL), "--data-path", str(few_digits)]
    status = main.run(base + [argument.format(root=files) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 2
    lines = [line for line in error.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert len(lines) == 1, error
    for text in expected:
        assert text.format(root=files) in lines[0]
    assert os.listdir(tmp_path) == []
    assert not (files / "ran").exists()


@pytest.mark.parametrize("mistake", ["truncated checkpoint", "negative learning rate", "unwritable output folder"])
def test_mistake_as_a_command(mistake, files, few_digits):
    arguments, _ = MISTAKES[mistake]
    result = command(*SMALL, "--data-path", few_digits, *(argument.format(root=files) for argument in arguments))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("main.py: ")
    assert result.stderr.count("\n") == 1


def test_every_process_refuses(files, few_digits):
    result = command(*SMALL, "--data-path", few_digits, "--output_dir", files / "a_file/run", "--batch-size", 8,
                     "--device", "cpu", processes=2, timeout=120)  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("main.py: --output_dir") == 1


def test_a_folder_with_a_run_is_not_overwritten(few_digits, tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_text("precious")
    status = main.run([*map(str, SMALL), "--data-path", str(few_digits), "--output_dir", str(tmp_path)])
    assert status == 2
    assert "--auto-resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pth").read_text() == "precious"


def test_another_runs_folder_is_not_written_by_a_resumed_one(few_digits, tmp_path, capsys):
    base = [*map(str, SMALL), "--data-path", str(few_digits)]
    for name in ("a", "b"):
        assert main.run([*base, "--output_dir", str(tmp_path / name)]) == 0
    before = (tmp_path / "b/checkpoint.pth").read_bytes()
    resume = ["--resume", str(tmp_path / "a/checkpoint.pth"), "--epochs", "2"]
    assert main.run([*base, *resume, "--output_dir", str(tmp_path / "b")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "b/checkpoint.pth").read_bytes() == before


def test_a_finished_run_is_not_resumed(few_digits, tmp_path, capsys):
    arguments = [*map(str, SMALL), "--data-path", str(few_digits), "--output_dir", str(tmp_path / "run")]
    assert main.run(arguments) == 0
    capsys.readouterr()
    assert main.run([*arguments, "--resume", str(tmp_path / "run/checkpoint.pth")]) == 2
    assert "there is none left to train" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(few_digits, tmp_path, capsys):
    arguments = [*map(str, SMALL), "--data-path", str(few_digits), "--output_dir", str(tmp_path / "run")]
    assert (
        main.run([*arguments, "--lr", "1e30", "--warmup-epochs", "0", "--clip-grad", "0", "--max-bad-steps", "2"]) == 2
    )
    assert "--max-bad-steps 2: so many steps in a row were not finite" in capsys.readouterr().err


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 13), (4, 0)])
def test_unsuitable_pythons_are_named(version, monkeypatch):
    monkeypatch.setattr(check_setup.sys, "version_info", (*version, 1))
    assert f"Python {version[0]}.{version[1]}" in check_setup.problem(needs_compiler=False)
    assert "\n" not in check_setup.problem(needs_compiler=False)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_suitable_pythons_pass(version, monkeypatch):
    monkeypatch.setattr(check_setup.sys, "version_info", (*version, 1))
    assert check_setup.problem(needs_compiler=False) is None


def test_make_names_an_unsuitable_python_before_installing(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Python 3.9 does not suit' >&2; exit 2\n")
    fake.chmod(0o755)
    result = subprocess.run(
        ["make", "install", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "3.9 does not suit" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_compiler_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "tools/check_setup.py", "--compiler"],
        capture_output=True, text=True, env={"PATH": str(tmp_path), "CXX": "no-such-compiler"},
    )  # fmt: skip
    assert result.returncode == 2
    assert "no C++ compiler" in result.stderr
