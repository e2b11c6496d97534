"""Frozen stages, features computed once, and distillation by timm's tasks: as in a training loop written by hand."""

import shutil
from pathlib import Path

import pytest
import small_model
import timm
import torch
import torch.nn.functional as F
from conftest import SMALLEST, differences, read_log, refusal, succeed
from torch import nn

import main
from engine import TaskLoss
from sepvit_lib.pipeline.preprocessing import Preprocessing

CPU = ["--device", "cpu", "--num_workers", 0]
VIT = "test_vit"  # timm's smallest, in timm's default preprocessing: mean and std 0.5


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Weights of a network without a classifier, as those of self-supervised networks."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pth"
    torch.save(timm.create_model(VIT, num_classes=0, img_size=32).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """Weights of a classifier of three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "classifier.pth"
    torch.save(timm.create_model(small_model.MODEL, num_classes=3, img_size=32).state_dict(), path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Frozen stages
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4])
def test_frozen_stages(count, few_digits, classifier, tmp_path):
    """They keep their weights and stay in evaluation mode; all other parameters are trained."""
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--warmup-epochs", 0, "--lr", 0.1]
    folder = tmp_path / "run"
    assert run(*shared, "--finetune", classifier, "--freeze-stages", count, "--output_dir", folder) == 0
    before, after = torch.load(classifier, weights_only=True), weights(folder)
    stages = ("patch_embeds", "pos_block", "blocks")
    frozen = {n for n in before if n.split(".")[0] in stages and int(n.split(".")[1]) < count}
    frozen |= {n for n in before if n.startswith("norm") and count == 4}
    same = {n for n in before if torch.equal(before[n], after[n])}
    unused = {n for n in before if "win_tokens" in n}  # zeros at first, with tiny gradients
    assert frozen <= same
    assert not same - frozen - unused
    assert read_log(folder)[-1]["n_parameters"] == sum(before[n].numel() for n in before.keys() - frozen)
    args = main.build_parser().parse_args([*map(str, SMALLEST), "--freeze-stages", str(count), "--drop", "0.5"])
    network = main.build_model(args, 3, main.build_precision(args, torch.device("cpu"))).train()
    images = torch.randn(2, 3, 32, 32)
    first, second = network.forward_stages(images), network.forward_stages(images)
    assert [torch.equal(a, b) for a, b in zip(first, second)] == [i < count for i in range(4)]


def test_features_are_computed_once(few_digits, classifier, tmp_path, capsys, monkeypatch):
    """Training on them is training on the images, and resumes bit for bit."""
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--finetune", classifier, "--epochs", 3, "--warmup-epochs", 0]
    shared += ["--lr", 1, "--mixup", 0, "--cutmix", 0, "--no-aug", "--freeze-stages", 4, "--model-ema"]
    shared += ["--checkpoint-every", 1, "--keep-checkpoints", 99, "--auto-resume", "--output_dir"]
    assert run(*shared, tmp_path / "kept") == 0
    assert "48 images" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "kept/checkpoint-00000004.pth", resumed)
    assert run(*shared, resumed) == 0
    assert "48 images" in capsys.readouterr().out
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("kept", "resumed"))
    assert [difference for difference in differences(one, two) if "output_dir" not in difference] == []
    monkeypatch.setattr(main, "MAX_BYTES", 0)
    assert run(*shared, tmp_path / "images") == 0
    assert "48 images" not in capsys.readouterr().out
    kept, images = weights(tmp_path / "kept"), weights(tmp_path / "images")
    assert not torch.equal(kept["head.weight"], torch.load(classifier, weights_only=True)["head.weight"])
    for name in kept:
        torch.testing.assert_close(kept[name], images[name], rtol=1e-4, atol=1e-5)


def test_features_of_several_processes(few_digits, classifier, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--finetune", classifier, "--epochs", 2, "--warmup-epochs", 0]
    shared += ["--lr", 1, "--mixup", 0, "--cutmix", 0, "--no-aug", "--freeze-stages", 4, "--output_dir"]
    succeed(*shared, tmp_path / "two", "--batch-size", 8, processes=2)
    succeed(*shared, tmp_path / "one", "--batch-size", 8, "--accum-steps", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_the_learning_rate_of_the_head():
    args = main.build_parser().parse_args(
        [*map(str, SMALLEST), "--head-lr-scale", "10", "--layer-decay", "0.5", "--warmup-epochs", "0"]
    )
    precision = main.build_precision(args, torch.device("cpu"))
    model = main.build_model(args, 3, precision)
    training = main.build_training(args, model, precision, 1)
    rate = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    base = 5e-4 * args.batch_size / 512
    assert rate[id(model.head.weight)] == rate[id(model.head.bias)] == pytest.approx(10 * base)
    assert rate[id(model.norm.weight)] == pytest.approx(0.5 * base)


# ----------------------------------------------------------------------------------------------------------------------
# Distillation
# ----------------------------------------------------------------------------------------------------------------------


def parts_of(few_digits: Path, *flags: object):
    """The parts of a run, and normalised images of its validation set."""
    args = main.build_parser().parse_args([*map(str, [*SMALLEST, *CPU, "--data-path", few_digits, *flags])])
    args, preprocessing = main.adopt_settings(args, None, "")
    precision = main.build_precision(args, torch.device("cpu"))
    train, val = main.build_data(args, True), main.build_data(args, False)
    torch.manual_seed(0)
    model = main.build_model(args, 3, precision)
    parts = main.build_parts(args, model, train, val, preprocessing, precision, 1)
    return parts, next(iter(parts.val_loader))


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_losses_of_tasks(kind, few_digits, teacher, classifier):
    """KL divergence of logits, mean squared error of pooled features; each network in its own normalisation."""
    path, name = (teacher, VIT) if kind == "feature" else (classifier, small_model.MODEL)
    flags = ["--distillation-type", kind, "--teacher-model", name, "--teacher-path", path]
    flags += ["--distillation-alpha", 0.3, "--mixup", 0, "--cutmix", 0, "--smoothing", 0, "--mean", 0.4, "--std", 0.2]
    flags += ["--distillation-tau", 2] if kind == "logit" else []
    parts, (images, targets) = parts_of(few_digits, *flags)
    student, criterion = parts.training.model, parts.criterion
    assert isinstance(criterion, TaskLoss)
    loss = criterion(images, parts.training.wrapped.eval()(images), targets)
    network = timm.create_model(name, img_size=32, num_classes=0 if kind == "feature" else 3).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    own = Preprocessing.of_weights({}, name, 32)
    pixels = images * 0.2 + 0.4
    given = (pixels - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(3, 1, 1)
    with torch.no_grad():
        theirs = network(given)
    logits = student(images)
    if kind == "logit":
        p, q = (theirs / 2).softmax(1), (logits / 2).softmax(1)
        expected = (p * (p.log() - q.log())).sum() / len(images) * 2**2
    else:
        projection = parts.training.projection
        assert isinstance(projection, nn.Linear)
        features = student.forward_head(student.forward_features(images), pre_logits=True)
        expected = F.mse_loss(projection(features), theirs)
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, targets) + 0.3 * expected)


@pytest.mark.parametrize("kind", ["logit", "feature", "token-soft"])
def test_runs_with_tasks_resume_bit_for_bit(kind, few_digits, teacher, classifier, tmp_path, capsys):
    """Also the layer that projects features; and a different kind is refused."""
    path, name = (teacher, VIT) if kind == "feature" else (classifier, small_model.MODEL)
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--epochs", 2, "--checkpoint-every", 1, "--model-ema"]
    if kind == "token-soft":
        shared[1] = "deit_tiny_distilled_patch16_224"
    shared += ["--keep-checkpoints", 99, "--teacher-model", name, "--teacher-path", path, "--auto-resume"]
    flags = ["--distillation-type", kind, "--layer-decay", 0.9, "--output_dir"]
    assert run(*shared, *flags, tmp_path / "whole") == 0
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000001.pth", resumed)
    assert run(*shared, *flags, resumed) == 0
    one, two = (torch.load(tmp_path / f / "checkpoint.pth", weights_only=True) for f in ("whole", "resumed"))
    assert ("projection" in one) == (kind == "feature")
    for part in ("model", "model_ema", "optimizer", "projection"):
        assert differences(one.get(part), two.get(part)) == []
    capsys.readouterr()
    other = [*shared, "--distillation-type", "soft", "--output_dir", resumed]
    assert "--distillation-type" in refusal(main.run, "main", other, capsys)


def test_features_without_labels(few_digits, teacher, tmp_path, capsys):
    """From a folder of images without classes, and without a validation set; then fine-tuned on labelled images."""
    train = tmp_path / "data/train"
    train.mkdir(parents=True)
    for number, image in enumerate(few_digits.glob("train/*/*")):
        (train / f"{number}{image.suffix}").symlink_to(image.resolve())
    shared = [*SMALLEST, *CPU, "--epochs", 2, "--warmup-epochs", 0, "--opt-eps", 1e-3]
    flags = ["--distillation-type", "feature", "--teacher-model", VIT, "--teacher-path", teacher]
    alone = [*shared, *flags, "--data-path", tmp_path / "data", "--lr", 0.1]
    folder = tmp_path / "run"
    assert run(*alone, "--distillation-alpha", 1, "--output_dir", folder) == 0
    losses = [entry["train_loss"] for entry in read_log(folder) if "train_loss" in entry]
    assert losses[1] < losses[0]
    assert not any("test_acc1" in entry for entry in read_log(folder))
    assert not (folder / "checkpoint_best.pth").exists()
    tuned = [*shared, "--data-path", few_digits, "--finetune", folder / "checkpoint.pth", "--lr", 0]
    assert run(*tuned, "--output_dir", tmp_path / "tuned") == 0
    name = "blocks.3.0.mlp.fc1.weight"
    torch.testing.assert_close(weights(tmp_path / "tuned")[name], weights(folder)[name])
    capsys.readouterr()
    assert "--data-path" in refusal(main.run, "main", [*alone, "--distillation-alpha", 0.5], capsys)


def test_channels_last_and_the_fast_loader_on_features(few_digits, classifier, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--finetune", classifier, "--channels-last"]
    shared += ["--mixup", 0, "--cutmix", 0, "--no-aug", "--freeze-stages", 4, "--output_dir"]
    assert run(*shared, tmp_path / "fast", "--loader", "fast") == 0
    succeed(*shared, tmp_path / "two", "--batch-size", 8, processes=2)
    one, two = weights(tmp_path / "fast"), weights(tmp_path / "two")
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_frozen_random_weights_are_warned_of(few_digits, classifier, tmp_path, capsys):
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--freeze-stages", 4]
    assert run(*shared, "--output_dir", tmp_path / "random") == 0
    assert "WARNING: --freeze-stages 4" in capsys.readouterr().out
    larger = ["--finetune", classifier, "--input-size", 256, "--output_dir", tmp_path / "larger", "--batch-size", 48]
    assert run(*shared, *larger) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: --finetune")]
    assert len(warned) == 1
    assert "win_tokens" in warned[0]


@pytest.mark.parametrize("scales", [(1, 10), (10, 2)])
def test_a_resumed_run_takes_the_scale_of_the_command(scales, few_digits, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--epochs", 3, "--warmup-epochs", 0]
    assert run(*shared, "--head-lr-scale", scales[0], "--output_dir", tmp_path / "one") == 0
    first = min((tmp_path / "one").glob("checkpoint-*.pth"))
    resumed = [*shared, "--resume", first, "--head-lr-scale", scales[1], "--epochs", 4]
    assert run(*resumed, "--output_dir", tmp_path / "two") == 0
    groups = torch.load(tmp_path / "two/checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1.0, float(scales[1])}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--distillation-type feature --distillation-alpha 1 --sched plateau", "--sched plateau"),
        ("--distillation-type token-soft", "--distillation-type token-soft"),
        ("--freeze-stages 5", "--freeze-stages 5"),
        ("--freeze-stages 1 --model test_resnet", "--freeze-stages 1"),
    ],
)
def test_mistakes(flags, words, few_digits, classifier, tmp_path, capsys):
    arguments = [*SMALLEST, *CPU, "--data-path", few_digits, "--output_dir", tmp_path / "run", *flags.split()]
    if "distillation" in flags:
        arguments += ["--teacher-model", small_model.MODEL, "--teacher-path", classifier]
    assert words in refusal(main.run, "main", arguments, capsys)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------------------------


def test_validation_every_few_epochs(few_digits, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", few_digits, "--epochs", 5, "--val-interval", 2, "--sched", "plateau"]
    shared += ["--keep-checkpoints", 9, "--auto-resume", "--output_dir"]
    assert run(*shared, tmp_path / "whole") == 0
    entries = [entry for entry in read_log(tmp_path / "whole") if "train_loss" in entry]
    assert ["test_acc1" in entry for entry in entries] == [False, True, False, True, True]
    best = torch.load(tmp_path / "whole/checkpoint_best.pth", weights_only=True)
    assert best["epoch"] in (1, 3, 4)
    assert (tmp_path / "whole/curves.png").exists()
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000009.pth", resumed)  # the third epoch, which was not validated
    assert run(*shared, resumed) == 0
    assert differences(weights(tmp_path / "whole"), weights(resumed)) == []
