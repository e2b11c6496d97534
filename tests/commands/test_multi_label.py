"""Images with several labels, and with weights: what is read, losses, metrics, runs, and every command after them."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALLEST, differences, read_log, refusal, succeed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, log_loss

import main
import predict
from engine import multi_label_metrics
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.pipeline.splits import validation_part
from tools import compare, export, visualize
from tools.page.predictors import ClassifierPredictor

CPU = ["--device", "cpu", "--num_workers", "0"]
LABELS = ("even", "round", "straight")
OF_DIGIT = {"0": "even|round", "1": "straight", "2": " round |even"}


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(few_digits, tmp_path_factory) -> Path:
    """A table of digits with labels in a cell, in several rows, and without labels; and a weight for each image."""
    rows = [["path", "label", "split", "weight"]]
    for path in sorted(few_digits.glob("*/*/*")):
        split, digit = path.parts[-3:-1]
        name, weight = str(path.relative_to(few_digits)), str(1 + len(rows) % 3)
        if digit == "2" and len(rows) % 2:
            rows += [[name, label, split, weight] for label in ("round", "even")]
        else:
            rows.append([name, OF_DIGIT[digit] if len(rows) % 5 else "", split, weight])
    folder = tmp_path_factory.mktemp("table")
    for part in few_digits.iterdir():
        (folder / part.name).symlink_to(part)
    return write(folder / "table.csv", rows)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory) -> Path:
    """The output folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(*settings(table), "--output_dir", folder) == 0
    return folder


def settings(table: Path, *flags: object) -> list[object]:
    shared = [*SMALLEST, *CPU, "--data-set", f"csv/{table}", "--multi-label", "--epochs", 2, "--checkpoint-every", 1]
    return [*shared, "--keep-checkpoints", 99, "--auto-resume", *flags]


def found(table: Path, *flags: object, is_train: bool = True):
    args = main.build_parser().parse_args(list(map(str, [*settings(table), *flags])))
    return main.build_data(args, is_train)


def criterion_of(table: Path, *flags: object, soft: bool = False):
    args = main.build_parser().parse_args(list(map(str, [*settings(table), *flags])))
    train = main.build_data(args, is_train=True)
    return main.build_criterion(args, torch.nn.Linear(1, 1), train, main.preprocessing_from(args), soft)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def test_labels_of_a_cell_and_of_several_rows(table):
    data = found(table)
    labels = dict(zip(map(data.dataset.name, range(len(data))), data.dataset.labels()))
    assert data.classes == list(LABELS)
    assert len(labels) == 48
    assert {label for path, label in labels.items() if "/0/" in path or "/2/" in path} == {(0, 1), ()}
    assert {label for path, label in labels.items() if "/1/" in path} == {(2,), ()}
    counts = data.label_counts()
    assert counts == {n: sum(n in label for label in labels.values()) for n in range(3)}


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (["a.png,x,train,1", "a.png,y,val,1"], ["--multi-label"], "lines 2 and 3: a.png is train and val"),
        (["a.png,x,train,1", ",y,val,1"], ["--multi-label"], "line 3: no path"),
        (["a.png,x,train,1", "b.png,y,val,heavy"], [], "line 3: weight heavy"),
        (["a.png,x,train,1", "b.png,y,train,"], [], "line 3: weight missing"),
        (["a.png,x,train,1", "b.png,y,val,-1"], [], "line 3: weight -1"),
        (["a.png,x,train,1", "a.png,y,val,1"], [], "a.png is x and y"),
        (["a.png,,train,1"], [], "line 2: no label"),
    ],
)
def test_mistakes_name_their_lines(rows, flags, words, tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["path,label,split,weight", *rows]))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    arguments = [*SMALLEST, *CPU, "--data-set", f"csv/{path}", *flags, "--output_dir", tmp_path / "run"]
    assert words in refusal(main.run, "main", arguments, capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "--watch top1",
        "--watch balanced-accuracy",
        "--sampler balanced",
        "--distillation-type hard --teacher-path teacher.pth",
        "--data-set IMNET",
    ],
)
def test_settings_for_a_single_label_are_refused(flags, table, tmp_path, capsys):
    line = refusal(main.run, "main", [*settings(table), *flags.split(), "--output_dir", tmp_path / "run"], capsys)
    assert "--multi-label" in line
    assert flags.split(" --teacher")[0] in line


def test_a_missing_flag_is_noticed(table, tmp_path, capsys):
    arguments = [*SMALLEST, *CPU, "--data-set", f"csv/{table}", "--watch", "map", "--output_dir", tmp_path / "run"]
    assert "--watch map" in refusal(main.run, "main", arguments, capsys)
    path = tmp_path / "one.csv"
    path.write_text("path,label,split\n0.png,a|b,train\n1.png,c,train\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    main.find_images(main.build_parser().parse_args(["--data-set", f"csv/{path}"]), is_train=True)
    assert "--multi-label" in capsys.readouterr().out.replace("`multi_label`", "--multi-label")


def test_ignored_classes_are_dropped_and_images_with_others_stay(table):
    data = found(table, "--ignore-classes", "even", "straight")
    assert data.classes == ["round"]
    assert set(data.dataset.labels()) == {(0,), ()}  # images without any label stay
    whole = found(table).dataset.labels()
    assert len(data) == sum(label == () or 1 in label for label in whole)


@given(
    st.lists(st.tuples(st.sets(st.integers(0, 3), max_size=3), st.integers(0, 15)), min_size=1, max_size=60),
    st.floats(0.05, 0.9),
)
def test_splits_are_stratified_by_all_labels(images, fraction):
    labels, groups = [tuple(sorted(own)) for own, _ in images], [f"group {group}" for _, group in images]
    is_val = validation_part(labels, groups, fraction, seed=0)
    assert len({(group, val) for group, val in zip(groups, is_val)}) == len(set(groups))
    of_group = {g: {n for own, other in zip(labels, groups) if other == g for n in own or (-1,)} for g in set(groups)}
    chosen = {group for group, val in zip(groups, is_val) if val}
    for number in {number for own in labels for number in own}:
        members = [val for own, val in zip(labels, is_val) if number in own]
        in_groups = {group for own, group in zip(labels, groups) if number in own}
        assert len(in_groups) > 1 or not any(members)  # a class in a single group stays in training
        assert not all(members)
        left = Counter(n for g, own in of_group.items() if g not in chosen for n in own)
        movable = [g for g in in_groups if all(left[n] > 1 for n in of_group[g])]
        assert any(members) or not movable  # else it has validation images


def test_the_split_can_be_given_back(table, tmp_path):
    """With its labels, weights and fingerprint."""
    rows = [[*row[:2], row[3]] for row in csv.reader(table.open())]
    whole = write(table.parent / "whole.csv", rows)
    flags = ["--val-fraction", 0.3, "--mixup", 0, "--cutmix", 0]
    assert run(*settings(whole, *flags), "--epochs", 1, "--output_dir", tmp_path / "run") == 0
    split = tmp_path / "run/split.csv"
    for is_train in (True, False):
        one = found(whole, "--val-fraction", 0.3, is_train=is_train).dataset
        two = found(split, "--data-path", table.parent, is_train=is_train).dataset
        pairs = [
            {images.inner_name(i): (label, *images.weights[i : i + 1]) for i, label in enumerate(images.labels())}
            for images in (one, two)
        ]
        assert pairs[0] == pairs[1]
        assert len(pairs[0]) == len(one)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(table):
    """Logits, and targets with weights in the last column."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.cat(
        [(torch.rand(8, 3, generator=generator) > 0.5).float(), torch.rand(8, 1, generator=generator)], 1
    )
    return torch.zeros(8, 3, 4, 4), torch.randn(8, 3, generator=generator), targets


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_loss_of_several_labels(smoothing, table, batch):
    """Binary cross entropy of each label, smoothed towards 0.5; times the image's weight; the mean over images."""
    images, outputs, targets = batch
    loss = criterion_of(table, "--smoothing", smoothing)(images, outputs, targets)
    smoothed = targets[:, :3] * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(outputs, smoothed, reduction="none").mean(1)
    torch.testing.assert_close(loss, (losses * targets[:, 3]).mean())
    unweighted = criterion_of(table, "--smoothing", smoothing, "--weight-column", "")
    torch.testing.assert_close(unweighted(images, outputs, targets[:, :3]), losses.mean())


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_class_weights_of_several_labels(smoothing, table, batch):
    """A class's weight multiplies the loss of its images, and not that of images without it."""
    images, outputs, targets = batch
    loss = criterion_of(table, "--smoothing", smoothing, "--class-weights", "balanced", "--weight-column", "")
    counts = found(table).label_counts()
    weights = torch.tensor([sum(counts.values()) / (3 * counts[number]) for number in range(3)])
    smoothed = targets[:, :3] * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(outputs, smoothed, reduction="none")
    expected = torch.where(targets[:, :3] > 0, weights * losses, losses).mean()
    torch.testing.assert_close(loss(images, outputs, targets[:, :3]), expected)


@pytest.mark.parametrize("flags", [[], ["--bce-loss"], ["--class-weights", "balanced"]])
def test_weights_of_images_with_a_single_label(flags, table, tmp_path, batch):
    """The mean over the images of weight times loss, with smoothing as without weights; also of mixed images."""
    rows = [[*row[:1], row[1] or "none", *row[2:]] for row in csv.reader(table.open())]
    single = write(table.parent / "single.csv", [row for row in rows if row[1] not in ("even", "round")])
    flags = [*flags, "--no-multi-label", "--smoothing", 0.1]
    images, _, _ = batch
    names = found(single, *flags).classes
    outputs, labels, weights = torch.randn(8, len(names)), torch.arange(8) % len(names), torch.rand(8)
    one_hot = F.one_hot(labels, len(names)).float()
    loss = criterion_of(single, *flags)(images, outputs, torch.cat([one_hot, weights[:, None]], 1))
    plain = criterion_of(single, *flags, "--weight-column", "")
    losses = torch.stack([plain(images[:1], outputs[i : i + 1], labels[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(loss, (weights * losses).mean())
    weighted = found(single, *flags)
    mixup = main.build_mixup(main.build_parser().parse_args(list(map(str, settings(single, *flags)))), weighted)
    assert mixup is not None
    both = torch.cat([one_hot, weights[:, None]], 1)
    np.random.seed(0)
    _, mixed = mixup(torch.rand(8, 3, 8, 8), both)
    share = ((mixed - both.flip(0)) / (both - both.flip(0))).nan_to_num(nan=-1)[:, -1]
    torch.testing.assert_close(mixed, share[:, None] * both + (1 - share[:, None]) * both.flip(0))


@given(
    st.lists(st.tuples(st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.sets(st.integers(0, 2))), min_size=2)
)
def test_metrics_are_those_of_scikit_learn(images):
    """Also for equal scores, classes that do not occur, and images without labels."""
    logits = torch.tensor([[value + 0.5 for value in values] for values, _ in images])
    targets = torch.tensor([[float(number in own) for number in range(3)] for _, own in images])
    if not targets.any():
        targets[0, 0] = 1
    metrics = multi_label_metrics(list(zip(logits.numpy(), targets.tolist())))
    assert metrics["images"] == len(images)
    occurs = [number for number in range(3) if targets[:, number].any()]
    truth, scores = targets.numpy(), logits.numpy()
    average = [average_precision_score(truth[:, number], scores[:, number]) for number in occurs]
    assert metrics["map"] == pytest.approx(100 * np.mean(average))
    predicted = scores > 0
    seen = [number for number in range(3) if truth[:, number].any() or predicted[:, number].any()]
    macro = np.mean([f1_score(truth[:, number], predicted[:, number]) for number in seen])
    assert metrics["f1"] == pytest.approx(100 * macro)
    assert metrics["micro_f1"] == pytest.approx(100 * f1_score(truth.ravel(), predicted.ravel()))
    probabilities = torch.tensor(scores).double().sigmoid().numpy().ravel()
    assert metrics["loss"] == pytest.approx(log_loss(truth.ravel(), probabilities, labels=[0, 1]))


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def test_runs_log_their_metrics_and_resume(trained, table, tmp_path, capsys):
    """With mixing and weights, bit for bit; the best epoch is that of the highest mAP."""
    entries = [entry for entry in read_log(trained) if "train_loss" in entry]
    assert all({"test_loss", "test_map", "test_f1", "test_micro_f1"} <= entry.keys() for entry in entries)
    best = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    assert best["best_value"] == best["best_accuracy"] == max(entry["test_map"] for entry in entries)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(trained / "checkpoint-00000001.pth", resumed)
    assert run(*settings(table), "--output_dir", resumed) == 0
    one, two = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (trained, resumed))
    assert differences(one, two) == []
    capsys.readouterr()
    for flags in (["--no-multi-label"], ["--weight-column", ""]):  # the weights are part of the images' fingerprint
        arguments = [*settings(table), *flags, "--output_dir", resumed]
        assert refusal(main.run, "main", arguments, capsys)


def test_evaluation_knows_what_the_checkpoint_was_trained_for(trained, table, tmp_path):
    """Also on two processes, which split the images."""
    last = [entry for entry in read_log(trained) if "train_loss" in entry][-1]
    arguments = ["--eval", "--resume", trained / "checkpoint.pth", *SMALLEST, *CPU, "--data-set", f"csv/{table}"]
    assert run(*arguments, "--output_dir", tmp_path / "one") == 0
    succeed(
        *arguments, "--dist-eval", "--output_dir", tmp_path / "two", processes=2, script="tests/fixtures/small_main.py"
    )
    for name in ("one", "two"):
        metrics = json.loads((tmp_path / name / "eval.json").read_text())
        assert metrics == pytest.approx({key: last[key] for key in metrics})
        assert "test_acc1" not in metrics


def test_the_report(trained, table, image, tmp_path, capsys):
    """Its figures are those of the evaluation and of scikit-learn; its thresholds work."""
    arguments = ["--eval", "--resume", trained / "checkpoint.pth", *SMALLEST, *CPU, "--data-set", f"csv/{table}"]
    assert run(*arguments, "--report", "--output_dir", tmp_path) == 0
    metrics = json.loads((tmp_path / "eval.json").read_text())
    report = json.loads((tmp_path / "report/report.json").read_text())
    for name, key in (("mAP", "test_map"), ("macro F1", "test_f1"), ("micro F1", "test_micro_f1")):
        assert 100 * report[name] == pytest.approx(metrics[key])
        low, high = report["intervals"][name]
        assert low <= report[name] <= high
    rows = list(csv.DictReader((tmp_path / "report/images.csv").open()))
    assert len(rows) == report["images"] == 21
    truth = np.array([[name in row["labels"].split("|") for name in LABELS] for row in rows])
    scores = np.array([[float(row[name]) for name in LABELS] for row in rows])
    assert all(row["prediction"] == "|".join(n for n in LABELS if float(row[n]) >= 0.5) for row in rows)
    assert 100 * average_precision_score(truth, scores) == pytest.approx(metrics["test_map"], abs=0.01)
    assert report["exact match"] == pytest.approx(((scores >= 0.5) == truth).all(axis=1).mean())
    classes = {row["class"]: row for row in csv.DictReader((tmp_path / "report/classes.csv").open())}
    thresholds = json.loads((tmp_path / "report/thresholds.json").read_text())
    for number, name in enumerate(LABELS):
        best = f1_score(truth[:, number], scores[:, number] >= thresholds[name] - 1e-5)
        assert float(classes[name]["F1 with it (%)"]) == pytest.approx(100 * best, abs=0.01)
        assert all(f1_score(truth[:, number], scores[:, number] >= other) <= best for other in scores[:, number])
    assert (tmp_path / "report/mistakes/01.jpg").is_file()
    path = tmp_path / "report/thresholds.json"
    predictions(capsys, image, "--resume", trained / "checkpoint.pth", "--threshold", path)


def test_a_single_class_that_may_be_absent(table, tmp_path):
    """The report has the metrics of the images that have it."""
    flags = ["--ignore-classes", "even", "round", "--epochs", 1, "--mixup", 0, "--cutmix", 0, "--report"]
    assert run(*settings(table, *flags), "--output_dir", tmp_path / "run") == 0
    rows = list(csv.DictReader((tmp_path / "run/report/images.csv").open()))
    metrics = next(csv.DictReader((tmp_path / "run/report/classes.csv").open()))
    assert int(metrics["images"]) == sum(row["labels"] == "straight" for row in rows) < len(rows)
    hits = sum(row["labels"] == row["prediction"] == "straight" for row in rows)
    assert float(metrics["recall (%)"]) == pytest.approx(100 * hits / int(metrics["images"]), abs=0.01)


def test_evaluation_refuses_other_kinds_of_labels(table, trained, tmp_path, capsys):
    single = [*SMALLEST, *CPU, "--eval", "--data-set", f"csv/{table}", "--multi-label"]
    assert "--multi-label" in refusal(main.run, "main", [*single, "--resume", old_style(trained, tmp_path)], capsys)
    folders = [*SMALLEST, *CPU, "--eval", "--data-path", table.parent, "--resume", trained / "checkpoint.pth"]
    assert "--multi-label" in refusal(main.run, "main", folders, capsys)


def old_style(trained: Path, folder: Path) -> Path:
    """The same checkpoint, of a run with one label per image."""
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    checkpoint["args"]["multi_label"] = False
    torch.save(checkpoint, folder / "single.pth")
    return folder / "single.pth"


def test_features_of_a_frozen_network(table, trained, tmp_path):
    flags = ["--finetune", trained / "checkpoint.pth", "--freeze-stages", 4, "--no-aug", "--mixup", 0, "--cutmix", 0]
    assert run(*settings(table, *flags), "--output_dir", tmp_path / "kept") == 0
    assert {"test_map"} <= [entry for entry in read_log(tmp_path / "kept") if "train_loss" in entry][-1].keys()


def test_compare_shows_the_mean_average_precision(trained, capsys):
    assert compare.run([str(trained), "--format", "csv"]) == 0
    header, row = capsys.readouterr().out.splitlines()[:2]
    values = dict(zip(header.split(","), row.split(",")))
    best = max(entry["test_map"] for entry in read_log(trained) if "train_loss" in entry)
    assert float(values["best mAP (%)"]) == pytest.approx(best, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# After training
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(few_digits) -> Path:
    return min((few_digits / "val/0").iterdir())


def predictions(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert predict.run([*map(str, arguments), "--json", "-", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_predictions_are_independent_probabilities(trained, image, tmp_path, capsys):
    checkpoint = trained / "checkpoint.pth"
    classifier = load_classifier(str(checkpoint))
    logits = classifier.logits([classifier.prepare(Image.open(image).convert("RGB"))])[0]
    expected = dict(zip(LABELS, logits.sigmoid().tolist()))
    result = predictions(capsys, image, "--resume", checkpoint)
    assert {row["class"]: row["probability"] for row in result["predictions"]} == pytest.approx(expected, abs=1e-5)
    assert set(result["labels"]) == {name for name, value in expected.items() if value >= 0.5}
    middle = sorted(expected.values())[1]
    chosen = predictions(capsys, image, "--resume", checkpoint, "--threshold", middle - 1e-6, "--topk", 1)
    assert len(chosen["labels"]) == len(chosen["predictions"]) == 2  # labels are listed even beyond --topk
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(
        json.dumps({name: value + (0.01 if name == "even" else -0.01) for name, value in expected.items()})
    )
    own = predictions(capsys, image, "--resume", checkpoint, "--threshold", thresholds)
    assert set(own["labels"]) == {"round", "straight"}
    table = tmp_path / "labels.csv"
    assert predict.run(list(map(str, [image, "--resume", checkpoint, "--threshold", thresholds, "--csv", table]))) == 0
    is_label = {row["class"]: row["is_label"] for row in csv.DictReader(table.open())}
    assert is_label == dict(even="0", round="1", straight="1")
    assert sum(line.startswith("* ") for line in capsys.readouterr().out.splitlines()) == 2


def test_mistaken_thresholds(trained, trained_digits, image, tmp_path, capsys):
    path = tmp_path / "thresholds.json"
    path.write_text('{"even": 0.5}')
    for checkpoint, value in (
        (trained / "checkpoint.pth", path),
        (trained / "checkpoint.pth", "none.json"),
        (trained / "checkpoint.pth", "1.5"),
        (trained_digits / "checkpoint.pth", "0.5"),
    ):
        line = refusal(predict.run, "predict", [image, "--resume", checkpoint, "--threshold", value], capsys)
        assert "--threshold" in line


@pytest.mark.parametrize("form", ["safetensors", "torchscript"])
def test_exported_files_have_several_labels(form, trained, table, image, tmp_path, capsys):
    flags = ["--formats", form, "--rounds", 1, "--data-path", table.parent, "--data-set", f"csv/{table}"]
    assert export.run(list(map(str, ["--resume", trained / "checkpoint.pth", "--out", tmp_path / "out", *flags]))) == 0
    assert "sample F1" in capsys.readouterr().out
    exported = next(path for path in (tmp_path / "out").iterdir() if path.name != "exports.md")
    expected = predictions(capsys, image, "--resume", trained / "checkpoint.pth")
    result = predictions(capsys, image, "--resume", exported)
    assert result["labels"] == expected["labels"]
    probabilities = [{row["class"]: row["probability"] for row in one["predictions"]} for one in (result, expected)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_the_page_names_all_labels(trained, image):
    classifier = load_classifier(str(trained / "checkpoint.pth"))
    answer = ClassifierPredictor(classifier).predict(Image.open(image).convert("RGB"))
    labels = [row.name for row in answer.rows if row.share >= 0.5]
    assert answer.summary == (", ".join(labels) or "no label")
    assert sum(row.share for row in answer.rows) != pytest.approx(1, abs=1e-3)


def test_visualize_prints_the_probability_of_a_label(trained, image, tmp_path, capsys):
    probabilities = predictions(capsys, image, "--resume", trained / "checkpoint.pth")["predictions"]
    arguments = [image, "--resume", trained / "checkpoint.pth", "--out", tmp_path / "figures", "--figures", "features"]
    assert visualize.run(list(map(str, arguments))) == 0
    assert f"({100 * probabilities[0]['probability']:.1f} %)" in capsys.readouterr().out
