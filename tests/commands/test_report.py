"""main.py --report: figures, the page, its files, what it says about them, and when it is written."""

import csv
import importlib.util
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALLEST, link_digits, refusal, succeed
from PIL import Image
from scipy.special import softmax
from sklearn import metrics as expected
from torch.utils.data import ChainDataset

import main
import predict
from sepvit_lib.report import metrics
from sepvit_lib.report.html import Page, add_classes, add_confusions

CPU = ["--device", "cpu", "--num_workers", "0"]
TRAINED = [*SMALLEST, *CPU, *"--epochs 3 --warmup-epochs 0 --lr 0.1".split()]


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """Labels of four classes, of which the last does not occur, and overconfident logits."""
    random = np.random.default_rng(0)
    labels = random.choice(3, 300, p=[0.7, 0.2, 0.1])
    logits = random.normal(size=(300, 4))
    logits[np.arange(300), labels] += 1.5
    logits[:, 3] -= 9
    return labels, 3 * logits


def test_summary_is_scikit_learns(made):
    labels, predicted = made[0], made[1].argmax(axis=1)
    values = metrics.summary(labels, predicted, 4, np.ones(300))
    assert values["accuracy"] == pytest.approx(expected.accuracy_score(labels, predicted))
    assert values["balanced accuracy"] == pytest.approx(expected.balanced_accuracy_score(labels, predicted))
    assert values["macro F1"] == pytest.approx(expected.f1_score(labels, predicted, average="macro"))
    times = np.random.default_rng(1).integers(3, size=300)
    drawn = np.repeat(np.arange(300), times)
    weighted = metrics.summary(labels, predicted, 4, times)
    assert weighted == pytest.approx(metrics.summary(labels[drawn], predicted[drawn], 4, np.ones(len(drawn))))


def test_classes_are_scikit_learns(made):
    labels, probabilities = made[0], softmax(made[1], axis=1)
    one_hot, predicted = np.eye(4, dtype=bool)[labels], np.eye(4, dtype=bool)[probabilities.argmax(axis=1)]
    found = metrics.per_class(one_hot, predicted, probabilities).T
    areas = expected.average_precision_score(one_hot[:, :3], probabilities[:, :3], average=None)
    report = expected.classification_report(labels, probabilities.argmax(axis=1), output_dict=True, zero_division=0)
    for label in range(3):
        wanted = [report[str(label)][name] for name in ("precision", "recall", "f1-score")]
        assert found[label] == pytest.approx([*wanted, areas[label]])
    assert np.isnan(found[3]).all()


def test_intervals_are_of_resampled_images():
    """Of a share p of n images, the bootstrap's standard error is √(p (1 − p) / n)."""
    correct = np.repeat([1.0, 0.0], [240, 160])
    low, high = metrics.intervals(lambda times: {"share": (times * correct).sum() / times.sum()}, 400)["share"]
    error = np.sqrt(0.6 * 0.4 / 400)
    assert low == pytest.approx(0.6 - 1.96 * error, abs=0.005)
    assert high == pytest.approx(0.6 + 1.96 * error, abs=0.005)


def test_groups_are_resampled_whole():
    """The images of a group are equal, so the interval is that of 40 images, not of 400."""
    correct, groups = np.repeat([1.0, 0.0], [240, 160]), [str(number // 10) for number in range(400)]

    def share(times: np.ndarray) -> dict[str, float]:
        assert all(len(set(times[start : start + 10])) == 1 for start in range(0, 400, 10))
        return {"share": float((times * correct).sum() / times.sum())}

    low, high = metrics.intervals(share, 400, groups)["share"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.6 * 0.4 / 40), rel=0.1)


def test_calibration_error_by_hand():
    """Two bins: 3 images of 0.9, of which 2 are correct, and 1 correct image of 0.6."""
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.6, 0.4]])
    error, bins = metrics.reliability(np.array([0, 1, 1, 0]), probabilities)
    assert error == pytest.approx((3 * abs(0.9 - 2 / 3) + abs(0.6 - 1)) / 4)
    np.testing.assert_allclose(bins, [[0.6, 1, 1], [0.9, 2 / 3, 3]])
    assert metrics.reliability(np.array([0]), np.array([[1.0, 0.0]]))[0] == 0  # the last bin contains 1


def test_the_temperature_has_the_lowest_log_loss(made):
    labels, logits = made
    found = metrics.best_temperature(labels, logits)
    losses = {
        t: expected.log_loss(labels, softmax(logits / t, axis=1), labels=range(4)) for t in np.arange(0.5, 9, 0.1)
    }
    assert found == pytest.approx(min(losses, key=losses.get), abs=0.1)
    assert found > 1.5  # overconfident
    assert metrics.best_temperature(logits.argmax(axis=1), logits) is None  # all correct: the lower, the better


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


class Checked(HTMLParser):
    """Collects the text and the addresses of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words = ""
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data):
        self.words += data


def self_contained(page: Path) -> str:
    """Text of a page, which must not refer to anything outside it."""
    checked = Checked(page)
    assert all(address.startswith(("data:image/", "#")) for address in checked.addresses)
    assert not re.search(r"https?:|@import|url\((?!#)", page.read_text())
    return checked.words


def test_texts_are_escaped_and_files_are_complete(tmp_path):
    page = Page("a <b>", "c & \udcff")
    page.table("t", [("name", "value"), ("<i>", 1.23456789), ("\udcff", float("nan")), (None, 2)])
    page.pictures("p", [(Image.new("RGB", (8, 4), "red"), ["<u>", "x"])])
    page.write(tmp_path / "report/page.html", "--out")
    text = self_contained(tmp_path / "report/page.html")
    assert all(part in text for part in ("a <b>", "<i>", "1.2", "<u>"))
    assert (tmp_path / "report/t.csv").read_bytes() == b"name,value\n<i>,1.23457\n\xff,\n,2\n"
    with Image.open(tmp_path / "report/p/01.jpg") as picture:
        assert picture.size[0] == 2 * picture.size[1]
        assert picture.size[1] >= 160
    assert set(contents(tmp_path / "report")) == {"page.html", "t.csv", "p/01.jpg"}


# ----------------------------------------------------------------------------------------------------------------------
# Reports of runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_of_two(digits, tmp_path_factory) -> Path:
    """Two classes, of which the second is rarer."""
    root = link_digits(digits, tmp_path_factory.mktemp("two"), "01", train=16, val=9)
    for path in sorted((root / "val/1").iterdir())[:4]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def trained(digits_of_two, tmp_path_factory) -> Path:
    """A run with a report at its end."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert run(*TRAINED, "--data-path", digits_of_two, "--output_dir", out, "--report") == 0
    return out


def evaluate(data: Path, out: Path, *flags: object) -> dict:
    """Evaluate with a report. Returns its figures."""
    assert run(*SMALLEST, *CPU, "--data-path", data, "--eval", "--report", "--output_dir", out, *flags) == 0
    return json.loads((out / "report/report.json").read_text())


def test_training_ends_with_a_report_of_the_best_checkpoint(trained):
    text = self_contained(trained / "report/report.html")
    figures = json.loads((trained / "report/report.json").read_text())
    best = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    assert figures["checkpoint"] == f"{trained / 'checkpoint_best.pth'}, epoch {best['epoch']}"
    assert 100 * figures["accuracy"] == pytest.approx(best["best_value"])
    assert "The epoch (--watch top1) was chosen on these images" in text
    assert {"training_1.png", "training_2.png", "training_3.png", "confusion_matrix.png"} <= set(
        contents(trained / "report")
    )


def test_figures_and_files_agree(trained):
    report = trained / "report"
    figures, images = json.loads((report / "report.json").read_text()), lines_of(report / "images.csv")
    assert len(images) == figures["images"] == 14
    labels, predicted = ([image[name] for image in images] for name in ("label", "prediction"))
    assert all(image["image"].startswith(f"{image['label']}/") for image in images)
    assert [int(image["correct"]) for image in images] == [a == b for a, b in zip(labels, predicted)]
    probabilities = np.array([[float(image[name]) for name in "01"] for image in images])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [float(image["probability"]) for image in images] == pytest.approx(probabilities.max(axis=1))
    assert figures["accuracy"] == pytest.approx(expected.accuracy_score(labels, predicted))
    assert figures["baseline"] == pytest.approx(9 / 14)
    assert figures["positive_class"] == "1"
    rare = [label == "1" for label in labels]
    assert figures["roc_area"] == pytest.approx(expected.roc_auc_score(rare, probabilities[:, 1]), abs=1e-4)
    area = expected.average_precision_score(rare, probabilities[:, 1])
    assert figures["average_precision"] == pytest.approx(area, abs=1e-4)
    classes = lines_of(report / "classes.csv")
    assert [(line["class"], line["training images"], line["images"]) for line in classes] == [
        ("0", "16", "9"),
        ("1", "16", "5"),
    ]
    assert float(classes[1]["average precision (%)"]) == pytest.approx(100 * area, abs=1e-2)
    wrong = [image for image in images if image["correct"] == "0"]
    assert sum(int(line["images"]) for line in lines_of(report / "confusions.csv")) == len(wrong)
    assert len([*report.glob("mistakes/*.jpg")]) == min(12, len(wrong))
    low, high = figures["intervals"]["accuracy"]
    assert 0 <= low <= figures["accuracy"] <= high <= 1
    settings = {line["setting"]: line for line in lines_of(report / "settings.csv")}
    assert (settings["--epochs"]["training"], settings["--eval"]["evaluation"]) == ("3", "true")


def test_the_most_confident_mistakes_come_first(trained, digits_of_two, tmp_path):
    """With the outputs of the two classes exchanged, nearly all images are mistakes."""
    checkpoint = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    for name in ("head.weight", "head.bias"):
        checkpoint["model"][name] = -checkpoint["model"][name]
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    evaluate(digits_of_two, tmp_path / "out", "--resume", tmp_path / "checkpoint.pth")
    images = lines_of(tmp_path / "out/report/images.csv")
    wrong = sorted((float(image["probability"]), image["image"]) for image in images if image["correct"] == "0")[::-1]
    text = Checked(tmp_path / "out/report/report.html").words
    positions = [text.index(name) for _, name in wrong[:12]]
    assert positions == sorted(positions)
    for number, picture in enumerate(sorted((tmp_path / "out/report/mistakes").iterdir())):
        with Image.open(picture) as shown:
            left, right = shown.crop((0, 0, 160, 160)), shown.crop((160, 0, 320, 160))
            assert shown.size == (320, 160)  # beside it, what the network attends to
        with Image.open(digits_of_two / "val" / wrong[number][1]) as source:
            original = source.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(left, dtype=float) - np.asarray(original)).mean() < 40
        assert np.ptp(np.asarray(right, dtype=int), axis=-1).max() > 40  # in colour


def test_auto_resume_of_a_complete_run_writes_a_missing_report(trained, digits_of_two, capsys):
    before = contents(trained / "report")
    command = [*TRAINED, "--data-path", digits_of_two, "--output_dir", trained, "--auto-resume"]
    (trained / "report/report.html").unlink()
    assert run(*command) == 0
    assert not (trained / "report/report.html").exists()
    assert run(*command, "--report") == 0
    after = contents(trained / "report")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"settings.csv", "report.html"}  # --auto-resume
    capsys.readouterr()
    assert run(*command, "--report") == 0
    assert "validation" not in capsys.readouterr().out  # nothing left to do


def test_processes_write_the_same_report(trained, digits_of_two, tmp_path):
    """Up to the last bits of the logits, which depend on the batches."""
    shared = [*SMALLEST, *CPU, "--data-path", digits_of_two, "--eval", "--report"]
    shared += ["--resume", trained / "checkpoint_best.pth", "--batch-size", 2]
    succeed(*shared, "--output_dir", tmp_path / "one")
    succeed(*shared, "--dist-eval", "--output_dir", tmp_path / "two", processes=2)
    folders = [tmp_path / name / "report" for name in ("one", "two")]
    assert contents(folders[0]).keys() == contents(folders[1]).keys()
    for one, two in zip(*(lines_of(folder / "images.csv") for folder in folders)):
        assert {name: one[name] for name in ("image", "label", "prediction")}.items() <= two.items()
        assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=1e-4)
    one, two = (json.loads((folder / "report.json").read_text()) for folder in folders)
    assert one["intervals"] == two["intervals"]
    assert one["calibration_error"] == pytest.approx(two["calibration_error"], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What is known about the images
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(digits_of_two, tmp_path) -> Path:
    """A table with groups, of images in one folder."""
    rows = ["path,label,group"]
    for number, path in enumerate(sorted(digits_of_two.glob("train/*/*"))):
        rows.append(f"{path},{path.parent.name},g{number // 4}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path / "table.csv"


def test_groups_and_the_split(table, tmp_path):
    data = ["--data-set", f"csv/{table}", "--val-fraction", 0.3]
    assert run(*SMALLEST, *CPU, *data, "--output_dir", tmp_path / "run", "--report", "--batch-size", 4) == 0
    figures = json.loads((tmp_path / "run/report/report.json").read_text())
    images = lines_of(tmp_path / "run/report/images.csv")
    groups = {image["group"] for image in images}
    assert figures["bootstrap"] == f"whole groups of images ({len(groups)} groups)"
    assert len(images) == 4 * len(groups)
    of = dict(line.split(",")[::2] for line in table.read_text().splitlines()[1:])
    assert all(of[os.path.normpath(table.parent / image["image"])] == image["group"] for image in images)
    assert figures["split"].startswith("--val-fraction 0.3 --split-seed 0, ")
    assert figures["training images"] == str(32 - len(images))
    checkpoint = ["--resume", tmp_path / "run/checkpoint.pth", "--batch-size", 4]
    other = evaluate(tmp_path, tmp_path / "other", *data, "--split-seed", 1, *checkpoint)
    assert "some may be training images" in other["notes"][0]
    assert not other["training images"].isdigit()
    assert other["duplicates of training images"] == "not checked"
    everything = evaluate(tmp_path, tmp_path / "all", "--data-set", f"csv/{table}", "--val-split", "all", *checkpoint)
    assert everything["images"] == 32
    assert "some may be training images" in everything["notes"][0]


def test_duplicates_and_averaged_weights_are_said(digits, tmp_path):
    root = link_digits(digits, tmp_path / "data", "01", train=16, val=4)
    copied = next((root / "train/0").iterdir())
    (root / "val/0/copy.png").write_bytes(copied.read_bytes())
    out = tmp_path / "run"
    assert run(*SMALLEST, *CPU, "--data-path", root, "--model-ema", "--output_dir", out, "--report") == 0
    figures = json.loads((out / "report/report.json").read_text())
    assert any(note.startswith("1 of the images are also training images") for note in figures["notes"])
    assert any("not of its averaged weights" in note for note in figures["notes"])
    assert figures["duplicates of training images"] == f"{root / 'val/0/copy.png'} = {copied}"
    (root / "train").rename(tmp_path / "away")
    checkpoint = ["--resume", out / "checkpoint.pth"]
    moved = evaluate(root, tmp_path / "moved", *checkpoint)
    assert moved["training images"].startswith("unknown")
    assert moved["accuracy"] == pytest.approx(json.loads((tmp_path / "moved/eval.json").read_text())["test_acc1"] / 100)


def test_many_classes_stay_readable():
    from sepvit_lib.report import classification

    random = np.random.default_rng(0)
    labels, logits = random.integers(200, size=2000), random.normal(size=(2000, 200))
    logits[np.arange(2000), labels] += 2
    data = type("Data", (), dict(classes=[f"class {n}" for n in range(200)], num_classes=200, dataset=None))
    page, outputs = Page("", ""), classification.Outputs([*zip(logits, labels.tolist())], data)
    columns, predicted = classification.class_columns(outputs, None), logits.argmax(axis=1)
    add_classes(page, columns, "F1 (%)")
    add_confusions(page, expected.confusion_matrix(labels, predicted), outputs.classes, "images")
    classification._add_images(page, outputs, SimpleNamespace(val=SimpleNamespace(dataset=ChainDataset([]))))
    table, confusions = (part for part in page._parts if "<table>" in part)
    lowest = expected.f1_score(labels, predicted, average=None).argmin()
    assert table.count("<tr>") == confusions.count("<tr>") == 21
    assert f"class {lowest}<" in table
    assert len(page.files["classes.csv"].splitlines()) == 201
    assert "confusion_matrix.png" not in page.files
    assert page.files["images.csv"].splitlines()[0] == b"image,label,prediction,probability,correct"


# ----------------------------------------------------------------------------------------------------------------------
# Temperature, and mistakes
# ----------------------------------------------------------------------------------------------------------------------


def test_predict_divides_logits_by_the_temperature(trained, digits_of_two, capsys):
    image = next((digits_of_two / "val/0").iterdir())
    values = []
    for temperature in ("1", "2.5"):
        arguments = [image, "--resume", trained / "checkpoint.pth", "--json", "-", *CPU, "--temperature", temperature]
        assert predict.run(list(map(str, arguments))) == 0
        entries = json.loads(capsys.readouterr().out)[0]["predictions"]
        values.append([entry["probability"] for entry in sorted(entries, key=lambda entry: entry["class"])])
    logits = torch.tensor(values[0], dtype=torch.float64).log()
    assert values[1] == pytest.approx(F.softmax(logits / 2.5, dim=0).tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", ["0", "-1", "nan"])
def test_temperatures_are_positive(temperature, capsys):
    arguments = ["x.png", "--resume", "x.pth", "--temperature", temperature]
    assert "--temperature" in refusal(predict.run, "predict", arguments, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval"], "set --output_dir"),
        (["--distillation-type", "feature", "--distillation-alpha", "1", "--teacher-path", "x"], "needs labelled"),
    ],
)
def test_refusals(flags, words, digits_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(
        main.run, "main", [*SMALLEST, *CPU, "--data-path", digits_of_two, "--report", *flags], capsys
    )
    assert [*tmp_path.iterdir()] == []


def test_a_missing_package_is_named_before_training(digits_of_two, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    arguments = [*SMALLEST, *CPU, "--data-path", digits_of_two, "--report", "--output_dir", tmp_path / "run"]
    assert "--report: needs sklearn: pip install '.[report]'" in refusal(main.run, "main", arguments, capsys)
    assert not (tmp_path / "run").exists()
