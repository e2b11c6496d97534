"""Users' mistakes: one line that names the problem and the way out, exit status 2, and no partial output."""

import gzip
import os
import pickle
from pathlib import Path

import numpy
import pytest
import timm
import torch
from conftest import SMALL, SMALLEST, Code, command, free_port, link_digits, refusal
from PIL import Image
from safetensors.torch import save_file

import engine
import main
from datasets import build_transform
from sepvit_lib.training import checkpoints
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.output import read_log


@pytest.fixture(scope="module")
def files(tmp_path_factory, few_digits):
    """Invalid checkpoints and data folders."""
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
    write_foreign_files(root, lite)
    for name in ("no_images", "no_val", "no_classes", "other_classes"):
        for label in "01":
            (root / name / "train" / label).mkdir(parents=True)
            Image.new("L", (8, 8)).save(root / name / "train" / label / "a.png")
    (root / "no_images/train/1/a.png").unlink()
    (root / "no_images/val").symlink_to(few_digits / "val")
    (root / "no_classes/val").mkdir()
    for label in "17":
        (root / "other_classes/val" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / "other_classes/val" / label / "a.png")
    (root / "empty").mkdir()
    (root / "broken_tar").mkdir()
    (root / "broken_tar/val.tar").write_text("no archive")
    (root / "broken_inat").mkdir()
    for name in ("categories", "train2018", "val2018"):
        (root / f"broken_inat/{name}.json").write_text("[]")
    (root / "a_file").write_text("")
    return root


def write_foreign_files(root: Path, lite: torch.nn.Module) -> None:
    """Write files mistaken for checkpoints, and checkpoints whose tensors cannot be loaded."""
    whole = (root / "lite.pth").read_bytes()
    (root / "page.pth").write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>")
    (root / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (root / "gzip.pth").write_bytes(gzip.compress(whole))
    (root / "nothing.pth").write_bytes(b"")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), root / "script.pth")
    numpy.savez(root / "arrays.npz", weight=numpy.ones(3))
    save_file(lite.state_dict(), root / "lite.safetensors")
    (root / "cut.safetensors").write_bytes((root / "lite.safetensors").read_bytes()[:-100])
    os.mkfifo(root / "pipe.pth")
    for name, tensor in (
        ("sparse", torch.ones(3).to_sparse()),
        ("meta", torch.ones(3, device="meta")),
        ("nan", torch.full((3,), torch.nan)),
        ("inf", torch.tensor([1, torch.inf, 0])),
    ):
        torch.save({**lite.state_dict(), "head.bias": tensor}, root / f"{name}.pth")


EVAL = ["--eval", "--resume"]
TEACHER = ["--distillation-type", "hard", "--teacher-model", "SepViT_Lite", "--teacher-path"]
MISTAKES = {
    "web page as a checkpoint": ([*EVAL, "{root}/page.pth"], ["--resume {root}/page.pth", "an HTML page"]),
    "git-lfs pointer": (["--finetune", "{root}/pointer.pth"], ["--finetune {root}/pointer.pth", "git lfs pull"]),
    "compressed checkpoint": ([*TEACHER, "{root}/gzip.pth"], ["--teacher-path {root}/gzip.pth", "gzip; unpack it"]),
    "empty checkpoint": ([*EVAL, "{root}/nothing.pth"], ["an empty file"]),
    "TorchScript": ([*EVAL, "{root}/script.pth"], ["a TorchScript model; save its weights", "state_dict()"]),
    "NumPy archive": ([*EVAL, "{root}/arrays.npz"], ["NumPy's arrays"]),
    "truncated safetensors": ([*EVAL, "{root}/cut.safetensors"], ["cut.safetensors: damaged"]),
    "pipe as a checkpoint": ([*EVAL, "{root}/pipe.pth"], ["{root}/pipe.pth: a pipe or a device, not a file"]),
    "http address": (["--resume", "http://localhost/x.pth"], ["http://localhost/x.pth: takes a path or an https"]),
    "sparse tensor": ([*EVAL, "{root}/sparse.pth"], ["sparse.pth: head.bias is sparse; save it as an ordinary"]),
    "meta tensor": ([*EVAL, "{root}/meta.pth"], ["meta.pth: head.bias has no values"]),
    "evaluation of non-finite weights": ([*EVAL, "{root}/nan.pth"], ["head.bias is not finite (3 of 3 values)"]),
    "resuming from non-finite weights": (["--resume", "{root}/inf.pth"], ["head.bias is not finite (1 of 3"]),
    "non-finite teacher": ([*TEACHER, "{root}/nan.pth"], ["--teacher-path {root}/nan.pth: head.bias is not"]),
    "evaluation with another number of classes": (
        [*EVAL, "{root}/nine.pth"],
        ["9 classes instead of 3", "evaluate it on images of its own classes"],
    ),
    "teacher with another number of classes": (
        [*TEACHER, "{root}/nine.pth"],
        ["9 classes instead of 3", "use a teacher"],
    ),
    "evaluation with --finetune": (["--eval", "--finetune", "{root}/lite.pth"], ["--resume"]),
    "teacher without distillation": (["--teacher-path", "{root}/lite.pth"], ["--distillation-type soft or hard"]),
    "infinite learning rate": (["--lr", "inf"], ["--lr", "inf is not a finite number"]),
    "second-order optimiser": (["--opt", "adahessian"], ["--opt adahessian", "second derivatives"]),
    "reversed cutmix range": (["--cutmix-minmax", "0.8", "0.2"], ["--cutmix-minmax 0.8 0.2", "smaller number first"]),
    "cutmix range of one size": (["--cutmix-minmax", "0.5", "0.51"], ["--cutmix-minmax 0.5 0.51", "--input-size 32"]),
    "infinite timeout": (["--timeout", "inf"], ["--timeout", "inf is not a finite number"]),
    "timeout out of range": (["--timeout", "1e300"], ["--timeout", "1e300 is out of range"]),
    "plateau schedule without decay": (["--sched", "plateau", "--decay-rate", "1"], ["--decay-rate 1", "less than 1"]),
    "reversed scale range": (["--scale", "1", "0.08"], ["--scale 1 0.08", "smaller number first"]),
    "reversed ratio range": (["--ratio", "1.33", "0.75"], ["--ratio 1.33 0.75", "smaller number first"]),
    "crops of size zero": (["--scale", "0", "0"], ["--scale", "0 is out of range"]),
    "augmentation section that timm ignores": (["--aa", "rand-mx"], ["--aa rand-mx", "no section mx"]),
    "empty augmentation section": (["--aa", "rand-m9-"], ["--aa rand-m9-", "no section -"]),
    "number of classes for class folders": (["--num-classes", "5"], ["--num-classes 5", "has 3 classes"]),
    "misspelled setting": (["--output_dri", "x"], ["--output_dri: unknown", "did you mean --output_dir?"]),
    "step larger than the data set": (
        ["--accum-steps", "4"],
        ["--batch-size 16 × --accum-steps 4: a step takes 64 images, more than the 48 training images"],
    ),
    "unknown kind of rendezvous address": (["--dist_url", "http://node0"], ["http://node0: unknown", "tcp://"]),
    "missing recipe": (["--config", "{root}/nowhere.yaml"], ["--config {root}/nowhere.yaml", "No such file"]),
    "unknown model": (["--model", "SepViT_Huge"], ["--model SepViT_Huge", "SepViT_Tiny"]),
    "missing data folder": (["--data-path", "{root}/nowhere"], ["--data-path", "nowhere", "no such folder"]),
    "empty data folder": (["--data-path", "{root}/empty"], ["{root}/empty", "train/ and val/"]),
    "no validation folder": (["--data-path", "{root}/no_val"], ["no val/ folder"]),
    "no class folders": (["--data-path", "{root}/no_classes"], ["no_classes/val", "class folder"]),
    "class folder without images": (["--data-path", "{root}/no_images"], ["folders 1", ".jpeg, ", ".png"]),
    "different classes in validation": (["--data-path", "{root}/other_classes"], ["2 names differ", "7, 0"]),
    "unknown data set": (["--data-set", "MNIST"], ["--data-set MNIST", "IMNET"]),
    "missing CIFAR-100": (["--data-set", "CIFAR"], ["CIFAR-100"]),
    "missing iNaturalist": (["--data-set", "INAT"], ["categories.json"]),
    "missing webdataset": (["--data-set", "wds/x", "--num-classes", "3"], ["--data-set wds/x"]),
    "missing checkpoint": (["--resume", "{root}/nowhere.pth"], ["--resume {root}/nowhere.pth: no such file"]),
    "truncated checkpoint": (["--resume", "{root}/truncated.pth"], ["truncated.pth", "truncated"]),
    "text file as a checkpoint": (["--resume", "{root}/text.pth"], ["text.pth", "not a checkpoint"]),
    "CSV file as a checkpoint": (["--resume", "{root}/csv.pth"], ["csv.pth", "not a checkpoint"]),
    "list as a checkpoint": (["--resume", "{root}/list.pth"], ["holds a list"]),
    "checkpoint without weights": (["--resume", "{root}/no_weights.pth"], ["holds no model weights"]),
    "empty weights": (["--resume", "{root}/empty.pth"], ["holds no model weights"]),
    "code in a checkpoint": (["--resume", "{root}/malicious.pth"], ["refused", "could run code"]),
    "code in a pickle": (["--finetune", "{root}/malicious_pickle.pth"], ["--finetune", "malicious_pickle.pth"]),
    "folder as a checkpoint": (["--resume", "{root}/empty"], ["no such file"]),
    "another variant": (["--resume", "{root}/small.pth"], ["contains SepViT_Small, not SepViT_Lite", "--model"]),
    "another architecture": (["--resume", "{root}/resnet.pth"], ["contains no SepViT weights (expected SepViT_Lite)"]),
    "incomplete checkpoint": (["--resume", "{root}/incomplete.pth"], ["1 entries are missing", "2.0.norm1.weight"]),
    "another number of classes": (["--resume", "{root}/nine.pth"], ["head.weight is (9, 256)", "--finetune"]),
    "another image size": (["--resume", "{root}/size96.pth"], ["--input-size 32", "--finetune"]),
    "finetuning another variant": (["--finetune", "{root}/small.pth"], ["contains SepViT_Small"]),
    "resume and finetune": (["--resume", "{root}/lite.pth", "--finetune", "{root}/lite.pth"], ["choose one"]),
    "batch larger than the data set": (["--batch-size", "50"], ["--batch-size 50", "48 training images"]),
    "too few images to repeat": (["--repeated-aug"], ["0 of the 48 training images", "--no-repeated-aug"]),
    "odd batch with mixup": (["--batch-size", "7"], ["--batch-size 7", "--mixup 0 --cutmix 0"]),
    "negative learning rate": (["--lr", "-1e-3"], ["--lr", "-1e-3", "at least 0"]),
    "negative workers": (["--num_workers", "-1"], ["--num_workers", "-1"]),
    "zero batch": (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    "text instead of a number": (["--epochs", "many"], ["--epochs", "many"]),
    "drop path rate above one": (["--drop-path", "1.5"], ["--drop-path", "at most 1"]),
    "unknown setting": (["--larning-rate", "1"], ["--larning-rate"]),
    "unknown optimiser": (["--opt", "adamv"], ["--opt adamv"]),
    "one beta": (["--opt-betas", "0.9"], ["--opt-betas 0.9", "two numbers"]),
    "betas of one": (["--opt-betas", "1", "1"], ["--opt-betas 1.0 1.0"]),
    "optimiser that cannot be built": (["--opt", "fusedadam"], ["--opt fusedadam"]),
    "model that lacks these settings": (["--model", "vgg11", "--drop-path", "0.1"], ["--drop-path 0.1", "vgg11"]),
    "no epoch left": (["--start_epoch", "5"], ["--epochs 1"]),
    "number of processes without ranks": (["--world_size", "8"], ["--world_size 8", "torchrun"]),
    "unknown reader": (["--data-set", "foo/bar"], ["--data-set foo/bar", "wds/…"]),
    "missing shards": (
        ["--data-set", "wds/x", "--num-classes", "3", "--val-split", "v-{{0..1}}.tar|9"],
        ["2 of 2 shards", "v-0.tar"],
    ),
    "broken archive": (["--data-path", "{root}/broken_tar"], ["val.tar", "not an archive"]),
    "unwritable folder for evaluation": (["--eval", "--output_dir", "/proc/x"], ["--output_dir /proc/x"]),
    "invalid iNaturalist annotations": (["--data-path", "{root}/broken_inat", "--data-set", "INAT"], ["annotations"]),
    "unknown device": (["--device", "tpu"], ["--device tpu", "cuda, mps or cpu"]),
    "unavailable device": (["--device", "mps"], ["--device mps", "cpu"]),
    "unknown augmentation": (["--aa", "rand-x9"], ["--aa rand-x9"]),
    "distillation without a teacher": (["--distillation-type", "soft"], ["--teacher-path"]),
    "missing teacher": (["--distillation-type", "hard", "--teacher-path", "{root}/t.pth"], ["--teacher-path", "t.pth"]),
    "unwritable output folder": (["--output_dir", "{root}/a_file/run"], ["--output_dir", "cannot be written"]),
    "output on a read-only file system": (["--output_dir", "/proc/run"], ["--output_dir /proc/run"]),
    "resume from a folder": (["--resume", "{root}"], ["--resume {root}: no such file"]),
    "checkpoint below a file": (["--resume", "{root}/a_file/x.pth"], ["--resume {root}/a_file/x.pth: no such file"]),
    "failed download": (["--resume", "https://127.0.0.1:9/x.pth"], ["127.0.0.1:9/x.pth", "failed"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, files, few_digits, tmp_path, capsys, monkeypatch):
    arguments, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: None)  # no pauses between download attempts
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    if "--dist_url" in arguments:
        monkeypatch.setenv("RANK", "0")
    base = [*map(str, SMALL), "--data-path", str(few_digits)]
    line = refusal(main.run, "main", base + [argument.format(root=files) for argument in arguments], capsys)
    for text in expected:
        assert text.format(root=files) in line
    assert os.listdir(tmp_path) == []
    assert not (files / "ran").exists()


@pytest.mark.parametrize("mistake", ["truncated checkpoint", "negative learning rate", "unwritable output folder"])
def test_mistake_as_a_command(mistake, files, few_digits):
    arguments, _ = MISTAKES[mistake]
    result = command(*SMALLEST, "--data-path", few_digits, *(argument.format(root=files) for argument in arguments))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("main.py: ")
    assert result.stderr.count("\n") == 1


def test_two_processes_print_a_mistake_once(files, few_digits):
    result = command(
        *SMALLEST,
        "--data-path",
        few_digits,
        "--output_dir",
        files / "a_file/run",
        "--batch-size",
        8,
        "--device",
        "cpu",
        processes=2,
    )
    assert result.returncode != 0
    assert result.stderr.count("main.py: --output_dir") == 1


def test_a_folder_with_a_run_is_not_overwritten(few_digits, tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_text("precious")
    status = main.run([*map(str, SMALLEST), "--data-path", str(few_digits), "--output_dir", str(tmp_path)])
    assert status == 2
    assert "--auto-resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pth").read_text() == "precious"


def test_a_resumed_run_does_not_write_to_another_runs_folder(few_digits, tmp_path, capsys):
    base = [*map(str, SMALLEST), "--data-path", str(few_digits)]
    for name in ("a", "b"):
        assert main.run([*base, "--output_dir", str(tmp_path / name)]) == 0
    before = (tmp_path / "b/checkpoint.pth").read_bytes()
    resume = ["--resume", str(tmp_path / "a/checkpoint.pth"), "--epochs", "2"]
    assert main.run([*base, *resume, "--output_dir", str(tmp_path / "b")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "b/checkpoint.pth").read_bytes() == before


def test_a_finished_run_is_not_resumed(few_digits, tmp_path, capsys):
    arguments = [*map(str, SMALLEST), "--data-path", str(few_digits), "--output_dir", str(tmp_path / "run")]
    assert main.run(arguments) == 0
    capsys.readouterr()
    assert main.run([*arguments, "--resume", str(tmp_path / "run/checkpoint.pth")]) == 2
    assert "nothing left to train" in capsys.readouterr().err


def test_losses_that_stay_non_finite_end_the_run(few_digits, tmp_path, capsys):
    arguments = [*map(str, SMALLEST), "--data-path", str(few_digits), "--output_dir", str(tmp_path / "run")]
    assert (
        main.run([*arguments, "--lr", "1e30", "--warmup-epochs", "0", "--clip-grad", "0", "--max-bad-steps", "2"]) == 2
    )
    assert "--max-bad-steps 2: that many steps in a row were not finite" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- accepted input


def test_alternative_spellings_of_settings():
    arguments = ["--batch_size", "4", "--output-dir=x", "--num-workers", "1", "--start-epoch", "2", "--dr", "0.5"]
    args = main.build_parser().parse_args(arguments)
    assert (args.batch_size, args.output_dir, args.num_workers) == (4, "x", 1)
    assert (args.start_epoch, args.decay_rate) == (2, 0.5)


def test_flags_of_deit_and_of_the_published_code_are_accepted():
    """Including --local-rank, which torch.distributed.launch passes without --use_env."""
    arguments = ["--model-ema", "--no-model-ema", "--model-ema-force-cpu", "--local-rank=1", "--opt", "AdamW"]
    args = main.build_parser().parse_args(arguments)
    assert (args.model_ema, args.model_ema_force_cpu, args.opt) == (False, True, "adamw")
    main.check_settings(args)


def test_tilde_after_an_equals_sign_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = [
        f"--{name}=~/x" for name in ("output_dir", "data-path", "resume", "finetune", "teacher-path", "config")
    ]
    args = main.build_parser().parse_args(arguments)
    assert {args.output_dir, args.data_path, args.resume, args.finetune, args.teacher_path, args.config} == {
        "/home/me/x"
    }


@pytest.mark.parametrize(
    "name",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-n3-p0.5-mmax12-tweights",
        "augmix-m5-w4-d2-b1-a1.0",
        "original-mstd0.5",
        "v0r",
        "3a",
        "",
    ],
)
def test_timm_augmentations(name):
    args = main.build_parser().parse_args([f"--aa={name}"])
    build_transform(True, main.transform_settings(args))


@pytest.mark.parametrize("settings", [None, "text", [1], {}])
@pytest.mark.parametrize("flags", [["--eval", "--resume"], ["--finetune"]])
def test_settings_of_another_kind_in_a_checkpoint(settings, flags, files, few_digits, tmp_path):
    """Other programs keep other things under `args`."""
    weights = torch.load(files / "lite.pth", weights_only=True)["model"]
    torch.save({"model": weights, "args": settings}, tmp_path / "other.pth")
    arguments = [*map(str, SMALL), "--batch-size", "48", "--data-path", str(few_digits)]
    arguments += ["--output_dir", str(tmp_path / "run")]
    assert main.run([*arguments, *flags, str(tmp_path / "other.pth")]) == 0


def finetune(model, path: str) -> None:
    """Load weights as `--finetune` does."""
    what = f"--finetune {path}"
    checkpoint = checkpoints.read_checkpoint(path, what)
    main.load_from(model, checkpoint, what, prefer_ema=True, new_classifier=True)


def test_weights_that_timm_renames_are_checked(tmp_path):
    """An old Swin checkpoint names its classifier `head.weight`. timm renames it when it resizes."""
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3)
    weights = model.state_dict()
    for kind in ("weight", "bias"):
        weights[f"head.{kind}"] = weights.pop(f"head.fc.{kind}")
    weights["head.weight"][0, 0] = torch.nan
    torch.save(weights, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"head\.fc\.weight is not finite"):
        finetune(model, str(tmp_path / "old.pth"))


@pytest.mark.parametrize("name", ["lite.safetensors", "renamed.pth"])
@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_safetensors_are_recognised_by_name_and_by_content(flag, name, files, tmp_path):
    (tmp_path / name).write_bytes((files / "lite.safetensors").read_bytes())
    expected = torch.load(files / "lite.pth", weights_only=True)["model"]
    weights = checkpoints.weights_of(checkpoints.read_checkpoint(str(tmp_path / name), f"{flag} {name}"), flag)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averaged_weights_alone_are_accepted(key, files, few_digits, tmp_path, capsys):
    weights = torch.load(files / "lite.pth", weights_only=True)["model"]
    torch.save({key: weights}, tmp_path / "averaged.pth")
    arguments = [*map(str, SMALL), "--data-path", str(few_digits), "--eval", "--resume", str(tmp_path / "averaged.pth")]
    assert main.run(arguments) == 0
    assert capsys.readouterr().out.count("validation: top-1") == 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_networks_are_finetuned_at_another_size(name, few_digits, tmp_path, capsys):
    """By timm's own resampling, which is reported."""
    torch.save(timm.create_model(name, img_size=64, num_classes=9).state_dict(), tmp_path / "64.pth")
    args = main.build_parser().parse_args(["--finetune", str(tmp_path / "64.pth")])
    model = timm.create_model(name, img_size=128, num_classes=3)
    finetune(model, args.finetune)
    printed = capsys.readouterr().out
    assert "of another image size or form: resampled" in printed
    assert "another number of classes: randomly initialised 2" in printed
    source = torch.load(tmp_path / "64.pth", weights_only=True)
    same = [key for key, value in model.state_dict().items() if key in source and torch.equal(value, source[key])]
    assert len(same) > 0.8 * len(source)


def test_weights_of_another_timm_network_are_refused(few_digits, tmp_path, capsys):
    """Although timm's own resampling raises an undocumented error for them."""
    torch.save(timm.create_model("swin_small_patch4_window7_224", img_size=64).state_dict(), tmp_path / "small.pth")
    args = main.build_parser().parse_args(["--finetune", str(tmp_path / "small.pth")])
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3)
    with pytest.raises(UserError, match=r"another architecture: \d+ are unexpected \(layers\.2\.blocks\."):
        finetune(model, args.finetune)


def test_weights_that_become_infinite_are_not_saved(few_digits, tmp_path, capsys):
    """The gradients are finite, but the updated weights are not."""
    arguments = [
        *map(str, SMALLEST),
        "--data-path",
        str(few_digits),
        "--output_dir",
        str(tmp_path / "run"),
        "--opt",
        "momentum",
        "--momentum",
        "0",
        "--lr",
        "3e38",
        "--weight-decay",
        "3e38",
        "--batch-size",
        "48",
        "--warmup-epochs",
        "0",
        "--sched",
        "constant",
    ]
    assert main.run(arguments) == 2
    assert "the weights are no longer finite and are not saved" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_an_epoch_of_skipped_steps_is_a_failure(few_digits, tmp_path, monkeypatch, capsys):
    forward = engine.DistillationLoss.forward
    monkeypatch.setattr(engine.DistillationLoss, "forward", lambda *inputs: forward(*inputs) * torch.nan)
    arguments = [*map(str, SMALLEST), "--data-path", str(few_digits), "--output_dir", str(tmp_path / "run")]
    assert main.run(arguments) == 2
    assert "epoch 0: loss or gradients were not finite in any step" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_non_finite_outputs_are_a_failure(files, few_digits, tmp_path, capsys):
    weights = torch.load(files / "lite.pth", weights_only=True)["model"]
    weights["norm.weight"] *= 1e6  # with the next line, enough for any random weights
    weights["head.weight"] *= 1e38
    torch.save(weights, tmp_path / "large.pth")
    arguments = [*map(str, SMALL), "--data-path", str(few_digits), "--eval", "--resume", str(tmp_path / "large.pth")]
    assert main.run(arguments) == 2
    assert "the network's outputs are not finite; try --amp off" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- other runs' checkpoints


@pytest.fixture(scope="module")
def run_folder(few_digits, tmp_path_factory):
    """The output folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main.run([*map(str, SMALL), "--data-path", str(few_digits), "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("opt", ["sgd", "lion", "muon", "lamb", "rmsprop", "adafactor"])
def test_state_of_another_optimiser_is_refused(opt, run_folder, few_digits, tmp_path, capsys):
    arguments = [
        *map(str, SMALL),
        "--data-path",
        str(few_digits),
        "--output_dir",
        str(tmp_path / "run"),
        "--epochs",
        "2",
    ]
    assert main.run([*arguments, "--resume", str(run_folder / "checkpoint.pth"), "--opt", opt]) == 2
    assert f"its optimiser is adamw, not --opt {opt}; use that, or --finetune" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("before", [["--weight-decay", "0.05"], ["--weight-decay", "0"], ["--decay-window-tokens"]])
@pytest.mark.parametrize("after", [["--weight-decay", "0.3"], ["--weight-decay", "0"], ["--decay-window-tokens"]])
def test_weight_decay_may_change(before, after):
    """Each parameter keeps its moments, whatever group of the optimiser it is in."""
    built = []
    for flags in (before, after):
        args = main.build_parser().parse_args([*map(str, SMALLEST), "--device", "cpu", *flags])
        torch.manual_seed(0)
        model = main.build_model(args, 3, main.build_precision(args, torch.device("cpu")))
        built.append((model, main.build_training(args, model, main.build_precision(args, torch.device("cpu")), 1)))
    (old, training), (new, resumed) = built
    for parameter in old.parameters():
        parameter.grad = torch.randn_like(parameter)
    training.optimizer.step()
    checkpoints.load_optimizer(resumed.optimizer, new, training.optimizer.state_dict())
    for (name, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(training.optimizer.state[p]["exp_avg"], resumed.optimizer.state[q]["exp_avg"]), name
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} <= {0.0, 0.05, 0.3}


def test_window_tokens_decay_on_request():
    args = main.build_parser().parse_args([*map(str, SMALLEST), "--device", "cpu", "--decay-window-tokens"])
    precision = main.build_precision(args, torch.device("cpu"))
    model = main.build_model(args, 3, precision)
    training = main.build_training(args, model, precision, 1)
    decayed = {p for group in training.optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert {name for name, p in model.named_parameters() if p in decayed} == {
        name for name, p in model.named_parameters() if p.ndim > 1
    }


def test_auto_resume_names_the_differences(run_folder, digits, few_digits, tmp_path, capsys):
    """And the flag that resumes with other settings."""
    arguments = [*map(str, SMALL), "--output_dir", str(run_folder), "--auto-resume"]
    assert main.run([*arguments, "--data-path", str(few_digits), "--epochs", "5"]) == 2
    error = capsys.readouterr().err
    assert "--epochs 5 (was 1)" in error
    assert f"or resume with these by --resume {run_folder}/checkpoint-00000003.pth" in error
    others = link_digits(digits, tmp_path, "012", train=20, val=5)
    assert main.run([*arguments, "--data-path", str(others)]) == 2
    error = capsys.readouterr().err
    assert "60 training images (were 48), 15 validation images (were 21)" in error
    assert "{" not in error


def test_checkpoints_are_checked_without_pytorchs_own_reader(files, monkeypatch):
    """It is private, so a later PyTorch may remove it."""
    monkeypatch.delattr(torch._C, "PyTorchFileReader", raising=False)
    assert checkpoints.damage(files / "lite.pth") is None


def test_a_log_line_that_is_not_an_object_is_refused(tmp_path):
    for line in ("3", "null", "[]"):
        (tmp_path / "log.txt").write_text(f'{{"epoch": 0}}\n{line}\n')
        with pytest.raises(UserError, match=r"log\.txt: not a run's log"):
            read_log(tmp_path / "log.txt")


def test_ordinary_runs_print_no_warnings(few_digits, tmp_path):
    """On two processes, neither DDP (about strides) nor timm's plateau schedule warns."""
    result = command(
        *SMALLEST,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        "--sched",
        "plateau",
        "--batch-size",
        8,
        "--device",
        "cpu",
        processes=2,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
