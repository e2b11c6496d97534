"""Imbalanced data: weights of classes in the loss, and classes drawn equally often."""

import csv
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALLEST, differences, read_log, refusal, succeed
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score

import main
import predict
from engine import ClassScores, WeightedLoss
from samplers import TrainBatchSampler

CPU = ["--device", "cpu", "--num_workers", "0"]
COUNTS = (14, 5, 2)


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


@pytest.fixture
def rare(few_digits, tmp_path) -> Path:
    """Digits of which one is rare."""
    for label, count in enumerate(COUNTS):
        (tmp_path / "rare/train" / str(label)).mkdir(parents=True)
        for path in sorted((few_digits / f"train/{label}").iterdir())[:count]:
            (tmp_path / "rare/train" / str(label) / path.name).symlink_to(path.resolve())
    (tmp_path / "rare/val").symlink_to(few_digits / "val")
    return tmp_path / "rare"


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def criterion_of(rare: Path, *flags: object, soft: bool = False):
    args = main.build_parser().parse_args(list(map(str, [*SMALLEST, *CPU, "--data-path", rare, *flags])))
    train = main.build_data(args, is_train=True)
    return main.build_criterion(args, torch.nn.Linear(1, 1), train, main.preprocessing_from(args), soft)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_losses_are_weighted_by_the_class(smoothing, rare, tmp_path):
    """w = N / (K · n); the sum is divided by the number of images, not by the weights."""
    criterion = criterion_of(rare, "--class-weights", "balanced", "--smoothing", smoothing)
    weights = torch.tensor([sum(COUNTS) / (3 * count) for count in COUNTS])
    torch.manual_seed(0)
    outputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
    images = torch.zeros(8, 3, 4, 4)
    torch.testing.assert_close(criterion(images, outputs, targets), (losses * weights[targets]).sum() / 8)
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({str(label): float(weight) for label, weight in enumerate(weights)}))
    given_weights = criterion_of(rare, "--class-weights", path, "--smoothing", smoothing)
    torch.testing.assert_close(given_weights(images, outputs, targets), criterion(images, outputs, targets))


def test_losses_of_mixed_images(rare):
    """The weight of a mixed image is the mean of its classes' weights; of hard targets, it is that of labels."""
    soft = criterion_of(rare, "--class-weights", "balanced", "--smoothing", 0.1, soft=True)
    plain = criterion_of(rare, "--class-weights", "balanced", "--smoothing", 0, soft=True)
    hard = criterion_of(rare, "--class-weights", "balanced", "--smoothing", 0)
    outputs, targets, images = torch.randn(8, 3), torch.randint(3, (8,)), torch.zeros(8, 3, 4, 4)
    one_hot = F.one_hot(targets, 3).float()
    torch.testing.assert_close(plain(images, outputs, one_hot), hard(images, outputs, targets))
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    smoothed = 0.9 * mixed + 0.1 / 3  # as timm's Mixup makes them
    expected = (mixed @ soft.base.weights) * F.cross_entropy(outputs, smoothed, reduction="none")
    torch.testing.assert_close(soft(images, outputs, smoothed), expected.mean())
    bce = criterion_of(rare, "--class-weights", "balanced", "--bce-loss", "--smoothing", 0)
    losses = F.binary_cross_entropy_with_logits(outputs, one_hot, reduction="none").mean(1)
    torch.testing.assert_close(bce(images, outputs, targets), (losses * bce.base.weights[targets]).mean())


def test_equal_weights_are_no_weights():
    outputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    loss = WeightedLoss(lambda *both: F.cross_entropy(*both, reduction="none"), [1.0, 1.0, 1.0])
    torch.testing.assert_close(loss(outputs, targets), F.cross_entropy(outputs, targets))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"0": 1, "1": 2}', "2"),
        ('{"0": 1, "1": 2, "2": 0}', "2"),
        ('{"0": 1, "1": 2, "2": 1, "9": 1}', "4 numbers"),
        ("[1, 2, 3]", "JSON"),
        ("0,1", "JSON"),
        (None, "cannot be read"),
    ],
)
def test_mistakes(content, words, rare, tmp_path, capsys):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    arguments = [*SMALLEST, *CPU, "--data-path", rare, "--class-weights", path, "--output_dir", tmp_path / "run"]
    line = refusal(main.run, "main", arguments, capsys)
    assert f"--class-weights {path}" in line
    assert words in line
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Sampler
# ----------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_classes_are_drawn_equally_often(labels, batch_size, accum_steps, processes, epoch):
    """In a whole epoch, on any number of processes; and the samples of a class equally often."""

    def batches(count: int, accum: int) -> list[list[tuple[int, int]]]:
        found = []
        for rank in range(count):
            sampler = TrainBatchSampler(labels, batch_size, accum, count, rank, seed=1, labels=labels)
            sampler.set_epoch(epoch)
            found.append([[(sample.position, sample.index) for sample in batch] for batch in sampler])
        return [[pair for batch in step for pair in batch] for step in zip(*found)]

    sampler = TrainBatchSampler(labels, batch_size, labels=labels)
    sampler.set_epoch(epoch)
    order = sampler.order().tolist()
    assert len(order) == len(labels)
    of_class = Counter(labels[index] for index in order)
    assert max(of_class.values()) - min(of_class.values(), default=0) <= 1
    for label, total in of_class.items():
        members = [index for index, other in enumerate(labels) if other == label]
        drawn = Counter(index for index in order if labels[index] == label)
        assert set(drawn.values()) <= {total // len(members), -(-total // len(members))}
    one, several = batches(1, accum_steps * processes), batches(processes, accum_steps)
    assert sorted(pair for step in one for pair in step) == sorted(pair for step in several for pair in step)


def test_counts_are_logged_and_runs_resume(rare, tmp_path, capsys):
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--epochs", 2, "--checkpoint-every", 1]
    shared += ["--keep-checkpoints", 99, "--auto-resume", "--class-weights", "balanced", "--sampler", "balanced"]
    assert run(*shared, "--output_dir", tmp_path / "whole") == 0
    entries = [entry for entry in read_log(tmp_path / "whole") if "train_loss" in entry]
    assert all(sum(entry["class_counts"]) == 20 for entry in entries)
    assert all(min(entry["class_counts"]) >= 6 for entry in entries)
    assert all(len(entry["class_counts"]) == 3 for entry in entries)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000003.pth", resumed)
    assert run(*shared, "--output_dir", resumed) == 0
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("whole", "resumed"))
    assert differences(one, two) == []
    capsys.readouterr()
    for flag, value in (("--class-weights", ""), ("--sampler", "random")):
        assert flag in refusal(main.run, "main", [*shared, "--output_dir", resumed, f"{flag}={value}"], capsys)


def test_a_changed_file_of_weights_is_noticed(rare, tmp_path, capsys):
    """But not the same weights written differently, and not if the checkpoint is older than the check."""
    path, resumed = tmp_path / "weights.json", tmp_path / "resumed"
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--epochs", 2, "--keep-checkpoints", 99]
    shared += ["--auto-resume", "--class-weights", path]
    path.write_text('{"0": 1, "1": 2, "2": 5}')
    assert run(*shared, "--output_dir", tmp_path / "whole") == 0
    assert run("--config", tmp_path / "whole/args.yaml", "--output_dir", tmp_path / "whole") == 0  # still a recipe
    first = min((tmp_path / "whole").glob("checkpoint-*.pth"))
    resumed.mkdir()
    shutil.copy(first, resumed)
    path.write_text('{"0": 1, "1": 2, "2": 6}')
    capsys.readouterr()
    line = refusal(main.run, "main", [*shared, "--output_dir", resumed], capsys)
    assert "different settings: class_weights.2 6.0 (was 5.0); restore" in line
    path.write_text('{"2": 5.0, "1": 2, "0": 1}')
    assert run(*shared, "--output_dir", resumed) == 0
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("whole", "resumed"))
    assert differences(one["model"], two["model"]) == []
    old = torch.load(first, weights_only=True)
    old["args"] = {name: value for name, value in old["args"].items() if "class_weights." not in name}
    assert len(old["args"]) == len(one["args"]) - 3
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / first.name)
    assert run(*shared, "--output_dir", tmp_path / "old") == 0


def test_streams_have_no_labels_to_balance(tmp_path, capsys):
    from test_data import write_tar

    write_tar(tmp_path / "a-0.tar", {"0.png": b"", "0.cls": b"0"})
    arguments = [*SMALLEST, *CPU, "--data-set", "wds/x", "--data-path", tmp_path, "--num-classes", 2]
    arguments += ["--train-split", "a-0.tar|1", "--val-split", "a-0.tar|1", "--output_dir", tmp_path / "run"]
    for flag in ("--sampler", "--class-weights"):
        assert f"{flag} balanced" in refusal(main.run, "main", [*arguments, flag, "balanced"], capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics and early stopping
# ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_metrics_are_those_of_scikit_learn(pairs):
    images, predictions = zip(*pairs)
    scores = ClassScores(6, torch.device("cpu"))
    scores.add(F.one_hot(torch.tensor(predictions), 6).float(), torch.tensor(images))
    found = scores.metrics(is_split=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that do not occur
        expected = balanced_accuracy_score(images, predictions), f1_score(images, predictions, average="macro")
    assert [found["balanced_accuracy"], found["f1"]] == pytest.approx([100 * value for value in expected])


def epochs_of(folder: Path) -> list[dict]:
    return [entry for entry in read_log(folder) if "train_loss" in entry]


@pytest.mark.parametrize("processes", [1, 2])
def test_metrics_of_a_run(processes, rare, tmp_path):
    """From the confusion of the validation images, also if processes share them."""
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--lr", 1, "--warmup-epochs", 0, "--dist-eval"]
    succeed(*shared, "--output_dir", tmp_path / "run", processes=processes)
    predicted = tmp_path / "predicted.csv"
    arguments = [str(rare / "val"), "--resume", str(tmp_path / "run/checkpoint.pth"), "--device", "cpu", "--topk", "1"]
    assert predict.run([*arguments, "--csv", str(predicted)]) == 0
    with predicted.open(newline="") as file:
        pairs = [(Path(row["image"]).parent.name, row["class"]) for row in csv.DictReader(file)]
    labels, predictions = zip(*pairs)
    entry = epochs_of(tmp_path / "run")[-1]
    assert entry["test_balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
    assert entry["test_f1"] == pytest.approx(100 * f1_score(labels, predictions, average="macro"))


@pytest.mark.parametrize("watch", ["top1", "loss", "balanced-accuracy", "f1"])
def test_the_watched_metric_chooses_the_best_checkpoint(watch, rare, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--lr", 0.5, "--warmup-epochs", 0]
    assert run(*shared, "--epochs", 4, "--watch", watch, "--output_dir", tmp_path / "run") == 0
    values = [entry[f"test_{main.WATCHED[watch]}"] for entry in epochs_of(tmp_path / "run")]
    best = values.index(min(values) if watch == "loss" else max(values))
    assert torch.load(tmp_path / "run/checkpoint_best.pth", weights_only=True)["epoch"] == best


def test_runs_stop_early_and_resume(rare, tmp_path, capsys):
    """Without progress, after as many epochs as asked for; and at the same epoch if resumed."""
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--lr", 0, "--min-lr", 0, "--warmup-epochs", 0]
    shared += ["--epochs", 9, "--early-stop", 3, "--keep-checkpoints", 99, "--auto-resume", "--weight-decay", 0]
    assert run(*shared, "--output_dir", tmp_path / "whole") == 0
    assert "--early-stop 3" in capsys.readouterr().out
    assert [entry["epoch"] for entry in epochs_of(tmp_path / "whole")] == [0, 1, 2, 3]
    assert (tmp_path / "whole/curves.png").exists()
    assert run(*shared, "--output_dir", tmp_path / "whole") == 0
    assert "complete" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    second = sorted((tmp_path / "whole").glob("checkpoint-*.pth"))[1]
    shutil.copy(second, resumed)
    assert run(*shared, "--output_dir", resumed) == 0
    assert [entry["epoch"] for entry in epochs_of(resumed)] == [2, 3]
    capsys.readouterr()
    done = [*shared[:-3], "--resume", tmp_path / "whole/checkpoint.pth", "--weight-decay", 0]
    assert "--early-stop 3" in refusal(main.run, "main", [*done, "--output_dir", tmp_path / "again"], capsys)


def test_an_early_end_is_validated(rare, tmp_path):
    """Also between the epochs of --val-interval; and with --start_epoch."""
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--lr", 0, "--min-lr", 0, "--warmup-epochs", 0]
    shared += ["--epochs", 9, "--weight-decay", 0, "--val-interval", 2, "--early-stop", 3]
    assert run(*shared, "--output_dir", tmp_path / "run") == 0
    validated = ["test_acc1" in entry for entry in epochs_of(tmp_path / "run")]
    assert validated == [False, True, False, True, True]
    assert run(*shared, "--start_epoch", 5, "--output_dir", tmp_path / "later") == 0
    assert [entry["epoch"] for entry in epochs_of(tmp_path / "later")] == [5, 6, 7, 8]


def test_another_metric_starts_afresh_on_resuming(rare, tmp_path):
    shared = [*SMALLEST, *CPU, "--data-path", rare, "--batch-size", 2, "--lr", 0.5, "--warmup-epochs", 0]
    assert run(*shared, "--epochs", 2, "--output_dir", tmp_path / "one") == 0
    resumed = [*shared, "--epochs", 4, "--resume", tmp_path / "one/checkpoint.pth", "--watch", "loss"]
    assert run(*resumed, "--output_dir", tmp_path / "two") == 0
    values = [entry["test_loss"] for entry in epochs_of(tmp_path / "two")]
    best = torch.load(tmp_path / "two/checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 2 + values.index(min(values))
