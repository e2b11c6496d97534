"""Users' mistakes: one line that names the problem and the way out, exit status 2, and no partial output."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL, SMALLEST, Code, command, refusal
from PIL import Image
from safetensors.torch import save_file

import engine
import main
from datasets import build_transform
from sepvit import keep_settings
from sepvit_lib.common import saved_settings
from sepvit_lib.common.errors import UserError
from sepvit_lib.run import checkpoints


@pytest.fixture(scope="module")
def files(tmp_path_factory, few_digits):
    """Invalid checkpoints and data folders."""
    root = tmp_path_factory.mktemp("bad")
    lite = timm.create_model("SepViT_Lite", img_size=32, num_classes=3).state_dict()

    def changed(entries: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The weights with other entries, or without some."""
        return keep_settings(((k, v) for k, v in {**lite, **entries}.items() if v is not None), lite)

    torch.save({"model": lite}, root / "lite.pth")
    whole = (root / "lite.pth").read_bytes()
    for name, content in (
        ("truncated", whole[:5000]),
        ("text", b"train a model first"),
        ("page", b"<!DOCTYPE html>\n<html><body>Not found</body></html>"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("malicious_pickle", pickle.dumps(Code(root / "ran"))),
    ):
        (root / f"{name}.pth").write_bytes(content)
    save_file(lite, root / "lite.safetensors")
    (root / "cut.safetensors").write_bytes((root / "lite.safetensors").read_bytes()[:-100])
    for name, checkpoint in (
        ("list", [1, 2]),
        ("no_weights", {"epoch": 3}),
        ("malicious", {"model": lite, "args": Code(root / "ran")}),
        ("incomplete", changed({"blocks.2.0.norm1.weight": None})),
        ("small", timm.create_model("SepViT_Small", img_size=32, num_classes=3).state_dict()),
        ("resnet", timm.create_model("resnet18", num_classes=3).state_dict()),
        ("nine", timm.create_model("SepViT_Lite", img_size=32, num_classes=9).state_dict()),
        ("size96", timm.create_model("SepViT_Lite", img_size=96, num_classes=3).state_dict()),
        ("nan", changed({"head.bias": torch.full((3,), torch.nan)})),
        ("inf", changed({"head.bias": torch.tensor([1, torch.inf, 0])})),
    ):
        torch.save(checkpoint, root / f"{name}.pth")
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


EVAL, TUNE = "--eval --resume {root}", "--finetune {root}"
TEACHER = "--distillation-type hard --teacher-model SepViT_Lite --teacher-path {root}"
MISTAKES = {  # the arguments, and what the line names
    "web page as a checkpoint": (f"{EVAL}/page.pth", "--resume {root}/page.pth", "an HTML page"),
    "git-lfs pointer": (f"{TUNE}/pointer.pth", "--finetune {root}/pointer.pth", "git lfs pull"),
    "truncated safetensors": (f"{EVAL}/cut.safetensors", "cut.safetensors: not a checkpoint, or a damaged one"),
    "http address": ("--resume http://localhost/x.pth", "http://localhost/x.pth: no such file"),
    "evaluation of non-finite weights": (f"{EVAL}/nan.pth", "head.bias has non-finite values (3 of 3)"),
    "resuming from non-finite weights": ("--resume {root}/inf.pth", "head.bias has non-finite values (1 of 3"),
    "non-finite teacher": (f"{TEACHER}/nan.pth", "--teacher-path {root}/nan.pth: head.bias has non-finite"),
    "evaluation with another number of classes": (f"{EVAL}/nine.pth", "9 classes instead of 3"),
    "teacher with another number of classes": (f"{TEACHER}/nine.pth", "9 classes instead of 3", "use a teacher"),
    "evaluation with --finetune": ("--eval --finetune {root}/lite.pth", "--resume"),
    "teacher without distillation": ("--teacher-path {root}/lite.pth", "--distillation-type"),
    "infinite learning rate": ("--lr inf", "--lr", "inf is not a finite number"),
    "reversed cutmix range": ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax 0.8 0.2", "must come first"),
    "timeout out of range": ("--timeout 1e300", "--timeout", "1e300 is out of range"),
    "plateau schedule without decay": ("--sched plateau --decay-rate 1", "--sched plateau", "< 1.0"),
    "reversed scale range": ("--scale 1 0.08", "--scale 1 0.08", "must come first"),
    "reversed milestones": ("--sched multistep --decay-milestones 9 3", "--decay-milestones 9 3"),
    "crops of size zero": ("--scale 0 0", "--scale", "0 is out of range"),
    "augmentation section that timm ignores": ("--aa rand-mx", "--aa rand-mx", "no section mx"),
    "number of classes for class folders": ("--num-classes 5", "--num-classes 5", "has 3 classes"),
    "misspelled setting": ("--output_dri x", "--output_dri: unknown", "did you mean --output_dir?"),
    "step larger than the data set": ("--accum-steps 4", "--batch-size 16 × --accum-steps 4", "48 training images"),
    "missing recipe": ("--config {root}/nowhere.yaml", "--config {root}/nowhere.yaml", "No such file"),
    "unknown model": ("--model SepViT_Huge", "--model SepViT_Huge", "SepViT_Tiny"),
    "missing data folder": ("--data-path {root}/nowhere", "--data-path", "nowhere", "no such folder"),
    "empty data folder": ("--data-path {root}/empty", "{root}/empty", "train/ and val/"),
    "no validation folder": ("--data-path {root}/no_val", "no val/ folder"),
    "no class folders": ("--data-path {root}/no_classes", "no_classes/val", "class folder"),
    "class folder without images": ("--data-path {root}/no_images", "folders 1", ".jpeg, ", ".png"),
    "different classes in validation": ("--data-path {root}/other_classes", "2 names differ", "7, 0"),
    "unknown data set": ("--data-set MNIST", "--data-set MNIST", "IMNET"),
    "missing CIFAR-100": ("--data-set CIFAR", "CIFAR-100"),
    "missing iNaturalist": ("--data-set INAT", "categories.json"),
    "missing webdataset": ("--data-set wds/x --num-classes 3", "--data-set wds/x"),
    "missing checkpoint": ("--resume {root}/nowhere.pth", "--resume {root}/nowhere.pth: no such file"),
    "truncated checkpoint": ("--resume {root}/truncated.pth", "--resume {root}/truncated.pth", "damaged"),
    "text file as a checkpoint": ("--resume {root}/text.pth", "text.pth", "not a checkpoint"),
    "list as a checkpoint": ("--resume {root}/list.pth", "but a list"),
    "checkpoint without weights": ("--resume {root}/no_weights.pth", "contains no model weights"),
    "code in a checkpoint": ("--resume {root}/malicious.pth", "refused", "could run code"),
    "code in a teacher": (f"{TEACHER}/malicious.pth", "--teacher-path", "refused"),
    "code in a pickle": (f"{TUNE}/malicious_pickle.pth", "--finetune", "malicious_pickle.pth"),
    "another variant": ("--resume {root}/small.pth", "contains SepViT_Small, not SepViT_Lite", "--model"),
    "another architecture": ("--resume {root}/resnet.pth", "contains no SepViT weights (expected SepViT_Lite)"),
    "incomplete checkpoint": ("--resume {root}/incomplete.pth", "1 entries are missing", "2.0.norm1.weight"),
    "another number of classes": ("--resume {root}/nine.pth", "head.weight is (9, 256)", "--finetune"),
    "another image size": ("--resume {root}/size96.pth", "--input-size 32", "--finetune"),
    "resume and finetune": (f"--resume {{root}}/lite.pth {TUNE}/lite.pth", "--finetune: mutually exclusive"),
    "batch larger than the data set": ("--batch-size 50", "--batch-size 50", "48 training images"),
    "too few images to repeat": ("--repeated-aug", "0 of the 48 training images", "--no-repeated-aug"),
    "odd batch with mixup": ("--batch-size 7", "--batch-size 7", "--mixup 0 --cutmix 0"),
    "negative learning rate": ("--lr -1e-3", "--lr", "-1e-3", "at least 0"),
    "negative workers": ("--num_workers -1", "--num_workers", "-1"),
    "zero batch": ("--batch-size 0", "--batch-size", "at least 1"),
    "text instead of a number": ("--epochs many", "--epochs", "many"),
    "drop path rate above one": ("--drop-path 1.5", "--drop-path", "at most 1"),
    "unknown optimiser": ("--opt adamv", "--opt adamv"),
    "betas of one": ("--opt-betas 1 1", "--opt adamw: does not accept these settings"),
    "optimiser that cannot be built": ("--opt fusedadam", "--opt fusedadam"),
    "model that lacks these settings": ("--model vgg11 --drop-path 0.1", "--drop-path 0.1", "vgg11"),
    "no epoch left": ("--start_epoch 5", "--epochs 1"),
    "number of processes without ranks": ("--world_size 8", "--world_size 8", "torchrun"),
    "unknown reader": ("--data-set foo/bar", "--data-set foo/bar", "wds/…"),
    "missing shards": ("--data-set wds/x --num-classes 3 --val-split v-{{0..1}}.tar|9", "2 of 2 shards", "v-0.tar"),
    "broken archive": ("--data-path {root}/broken_tar", "val.tar", "not an archive"),
    "unwritable folder for evaluation": ("--eval --output_dir /proc/x", "--output_dir /proc/x"),
    "invalid iNaturalist annotations": ("--data-path {root}/broken_inat --data-set INAT", "annotations"),
    "unknown device": ("--device tpu", "--device tpu", "cuda, mps or cpu"),
    "unavailable device": ("--device mps", "--device mps", "cpu"),
    "unknown augmentation": ("--aa rand-x9", "--aa rand-x9"),
    "distillation without a teacher": ("--distillation-type soft", "--teacher-path"),
    "unwritable output folder": ("--output_dir {root}/a_file/run", "--output_dir", "cannot be written"),
    "resume from a folder": ("--resume {root}", "--resume {root}: no such file"),
    "failed download": ("--resume https://127.0.0.1:9/x.pth", "127.0.0.1:9/x.pth", "failed"),
}


def run(*arguments: object) -> int:
    """Run main.py in this process."""
    return main.run(list(map(str, arguments)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, files, few_digits, tmp_path, capsys, monkeypatch):
    arguments, *named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(files / "hub"))
    arguments = [argument.format(root=files) for argument in arguments.split()]
    line = refusal(main.run, "main", [*SMALL, "--data-path", few_digits, *arguments], capsys)
    for text in named:
        assert text.format(root=files) in line
    assert os.listdir(tmp_path) == []
    assert not list(files.glob("hub/**/*.pth"))
    assert not (files / "ran").exists()


def test_mistake_as_a_command(files, few_digits):
    """Two processes print it once."""
    settings = [*SMALLEST, "--data-path", few_digits, "--device", "cpu", "--output_dir", files / "a_file/run"]
    for processes in (0, 2):
        result = command(*settings, "--batch-size", 8, processes=processes)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.count("main.py: --output_dir") == 1


@pytest.fixture(scope="module")
def run_folder(few_digits, tmp_path_factory):
    """The output folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(*SMALLEST, "--data-path", few_digits, "--output_dir", folder) == 0
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--auto-resume"),
        ("--resume {run}/checkpoint.pth", "nothing left to train"),
        ("--resume {tmp}/other.pth --epochs 2", "already contains a run"),
        ("--resume {run}/checkpoint.pth --epochs 2 --opt sgd", "adamw, not --opt sgd"),
        ("--resume {run}/checkpoint.pth --epochs 2 --opt lamb", "adamw, not --opt lamb"),
    ],
)
def test_a_folder_with_a_run_is_not_overwritten(flags, words, run_folder, few_digits, tmp_path, capsys):
    (tmp_path / "other.pth").write_bytes((run_folder / "checkpoint.pth").read_bytes())
    before = {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    flags = flags.format(run=run_folder, tmp=tmp_path).split()
    settings = [*SMALLEST, "--data-path", few_digits, "--output_dir", run_folder, *flags]
    assert words in refusal(main.run, "main", settings, capsys)
    assert {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()} == before


# ------------------------------------------------------------------------------------------------------- accepted input


def parsed(flags: str) -> argparse.Namespace:
    return main.build_parser().parse_args(flags.split())


def test_alternative_spellings_of_settings():
    args = parsed("--batch_size 4 --output-dir=x --num-workers 1 --start-epoch 2 --dr 0.5")
    assert (args.batch_size, args.output_dir, args.num_workers) == (4, "x", 1)
    assert (args.start_epoch, args.decay_rate) == (2, 0.5)


def test_flags_of_deit_and_of_the_published_code_are_accepted():
    """Including --local-rank, which torch.distributed.launch passes without --use_env."""
    args = parsed("--model-ema --no-model-ema --model-ema-force-cpu --local-rank=1 --opt AdamW")
    assert (args.model_ema, args.model_ema_force_cpu, args.opt) == (False, True, "adamw")
    main.check_settings(args)


def test_tilde_after_an_equals_sign_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("output_dir", "data_path", "resume", "finetune", "teacher_path", "config")
    args = vars(parsed(" ".join(f"--{name}=~/x" for name in names)))
    assert {args[name] for name in names} == {"/home/me/x"}


def test_timm_augmentations():
    names = "rand-m9-mstd0.5-inc1 rand-m9-n3-p0.5-mmax12-tweights augmix-m5-w4-d2-b1-a1.0 original-mstd0.5 v0r 3a"
    for name in [*names.split(), ""]:
        build_transform(True, main.transform_settings(parsed(f"--aa={name}")))


def test_settings_of_another_kind_in_a_checkpoint():
    """Other programs keep other things under `args`."""
    assert all(saved_settings.settings_in({"args": settings}) == {} for settings in (None, "text", [1], {}))


def finetune(model, weights: dict, folder: Path) -> None:
    """Load weights as `--finetune` does."""
    what = f"--finetune {folder / 'weights.pth'}"
    torch.save(weights, folder / "weights.pth")
    checkpoint = checkpoints.read_checkpoint(str(folder / "weights.pth"), what)
    main.load_from(model, checkpoint, what, prefer_ema=True, new_classifier=True)


def test_weights_that_timm_renames_are_checked(tmp_path):
    """An old Swin checkpoint names its classifier `head.weight`. timm renames it when it resizes."""
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3)
    weights = model.state_dict()
    for kind in ("weight", "bias"):
        weights[f"head.{kind}"] = weights.pop(f"head.fc.{kind}")
    weights["head.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"head\.fc\.weight has non-finite values"):
        finetune(model, weights, tmp_path)


@pytest.mark.parametrize("name", ["lite.safetensors", "renamed.pth"])
def test_safetensors_are_recognised_by_name_and_by_content(name, files, tmp_path):
    (tmp_path / name).write_bytes((files / "lite.safetensors").read_bytes())
    expected = torch.load(files / "lite.pth", weights_only=True)["model"]
    weights = checkpoints.weights_of(checkpoints.read_checkpoint(str(tmp_path / name), name), name)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averaged_weights_alone_are_accepted(key):
    weights = {"weight": torch.ones(2)}
    assert checkpoints.weights_of({key: weights}, "x") == weights
    assert not checkpoints.has_both_weights({key: weights})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_networks_are_finetuned_at_another_size(name, tmp_path, capsys):
    """By timm's own resampling, which is reported."""
    source = timm.create_model(name, img_size=64, num_classes=9).state_dict()
    model = timm.create_model(name, img_size=128, num_classes=3)
    finetune(model, source, tmp_path)
    printed = capsys.readouterr().out
    assert "different image size or form: resampled" in printed
    assert "different number of classes: randomly initialised 2" in printed
    same = [key for key, value in model.state_dict().items() if key in source and torch.equal(value, source[key])]
    assert len(same) > 0.8 * len(source)


def test_weights_of_another_timm_network_are_refused(tmp_path):
    """Although timm's own resampling raises an undocumented error for them."""
    small = timm.create_model("swin_small_patch4_window7_224", img_size=64).state_dict()
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3)
    with pytest.raises(UserError, match=r"different architecture: \d+ are unexpected \(layers\.2\.blocks\."):
        finetune(model, small, tmp_path)


def test_weights_that_become_infinite_are_not_saved(few_digits, tmp_path, capsys):
    """The gradients are finite, but the updated weights are not."""
    flags = "--opt momentum --momentum 0 --lr 3e38 --weight-decay 3e38 --batch-size 48 --warmup-epochs 0"
    arguments = [*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / "run", *flags.split()]
    assert run(*arguments, "--sched", "constant") == 2
    assert "the weights are no longer finite and are not saved" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_an_epoch_of_skipped_steps_is_a_failure(few_digits, tmp_path, monkeypatch, capsys):
    forward = engine.DistillationLoss.forward
    monkeypatch.setattr(engine.DistillationLoss, "forward", lambda *inputs: forward(*inputs) * torch.nan)
    assert run(*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / "run") == 2
    assert "epoch 0: loss or gradients were non-finite in every step" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_non_finite_outputs_are_a_failure(files, few_digits, tmp_path, capsys):
    weights = torch.load(files / "lite.pth", weights_only=True)["model"]
    weights["norm.weight"] *= 1e6  # with the next line, enough for any random weights
    weights["head.weight"] *= 1e38
    torch.save(weights, tmp_path / "large.pth")
    assert run(*SMALL, "--data-path", few_digits, "--eval", "--resume", tmp_path / "large.pth") == 2
    assert "the network's outputs are not finite; try --amp off" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- other runs' checkpoints


def build(flags):
    """The smallest network, and what its training takes."""
    args = parsed(f"{' '.join(SMALLEST)} --device cpu {flags}")
    precision = main.build_precision(args, torch.device("cpu"))
    torch.manual_seed(0)
    model = main.build_model(args, 3, precision)
    return model, main.build_training(args, model, precision, 1)


@pytest.mark.parametrize("before", ["--weight-decay 0.05", "--weight-decay 0", "--decay-window-tokens"])
@pytest.mark.parametrize("after", ["--weight-decay 0.3", "--weight-decay 0", "--decay-window-tokens"])
def test_weight_decay_may_change(before, after):
    """Each parameter keeps its moments, whatever group of the optimiser it is in."""
    (old, training), (new, resumed) = map(build, (before, after))
    for parameter in old.parameters():
        parameter.grad = torch.randn_like(parameter)
    training.optimizer.step()
    checkpoints.load_optimizer(resumed.optimizer, new, training.optimizer.state_dict())
    for (name, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(training.optimizer.state[p]["exp_avg"], resumed.optimizer.state[q]["exp_avg"]), name
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} <= {0.0, 0.05, 0.3}


def test_window_tokens_decay_on_request():
    model, training = build("--decay-window-tokens")
    decayed = {p for group in training.optimizer.param_groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert all((p in decayed) == (p.ndim > 1) for p in model.parameters())


def test_ordinary_runs_print_no_warnings(few_digits, tmp_path):
    """On two processes, neither DDP (about strides) nor timm's plateau schedule warns."""
    flags = "--sched plateau --batch-size 8 --device cpu".split()
    result = command(*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / "run", *flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
