"""tools/compare.py on real runs: the numbers of its table, which runs share a row, the picture, and mistakes."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALLEST, read_log, refusal
from matplotlib.colors import to_rgb
from PIL import Image

import main
from sepvit_lib.run.output import draw_curves
from tools import compare

SETTINGS = {
    "first": "--lr 0.2",
    "second": "--lr 0.2 --seed 1",
    "other": "--lr 0.5 --print-freq 7",
}
NUMBERS = ["best top-1 (%)", "std of best", "last top-1 (%)", "std of last"]
COLUMNS = [*NUMBERS, "name", "runs", "best epoch", "epochs done"]


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory) -> Path:
    """A folder with three runs of three epochs: two seeds, and a different learning rate."""
    root = tmp_path_factory.mktemp("compare")
    for name, flags in SETTINGS.items():
        arguments = f"--data-path {few_digits} --device cpu --epochs 3 --warmup-epochs 0 --output_dir {root / name}"
        assert main.run([*SMALLEST, *arguments.split(), *flags.split()]) == 0
    return root


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """The logs of the runs, to edit."""
    for name in SETTINGS:
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(trained / name / "log.txt", tmp_path / "runs" / name)
    return tmp_path / "runs"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change each line of a log."""
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for entry in entries:
        change(entry)
    (folder / "log.txt").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


def printed(capsys, *arguments: object) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert compare.run(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def table(capsys, *arguments: object) -> list[dict[str, str]]:
    """The rows that the command prints as CSV."""
    return list(csv.DictReader(io.StringIO(printed(capsys, *arguments, "--format", "csv"))))


def settings_in(row: dict[str, str]) -> dict[str, str]:
    """The settings of a row: all columns but those that every table may have."""
    return {name: value for name, value in row.items() if name not in COLUMNS}


def numbers(row: dict[str, str]) -> list[float]:
    """Means and standard deviations of a row; NaN for those that it lacks."""
    return [float(row.get(name) or "nan") for name in NUMBERS]


def test_numbers_are_those_of_the_logs(trained, capsys):
    both, other = table(capsys, *(trained / name for name in SETTINGS))
    top1 = {name: [entry["test_acc1"] for entry in read_log(trained / name)] for name in SETTINGS}
    best, last = ([choose(top1[name]) for name in ("first", "second")] for choose in (max, lambda values: values[-1]))
    expected = [np.mean(best), np.std(best, ddof=1), np.mean(last), np.std(last, ddof=1)]
    assert numbers(both) == pytest.approx(expected, abs=5e-4)
    np.testing.assert_allclose(numbers(other), [max(top1["other"]), np.nan, top1["other"][-1], np.nan], atol=5e-4)
    epochs = {name: str(values.index(max(values))) for name, values in top1.items()}
    assert set(both["best epoch"].split()) == {epochs["first"], epochs["second"]}
    assert other["best epoch"] == epochs["other"]
    assert [row["epochs done"] for row in (both, other)] == ["3", "3"]
    assert [row["runs"] for row in (both, other)] == ["2", "1"]
    assert [settings_in(row) for row in (both, other)] == [{"lr": "0.2", "seed": "0 1"}, {"lr": "0.5", "seed": "0"}]
    assert all(name in both["name"] for name in ("first", "second"))
    assert other["name"] == "other"


def test_formats_have_the_same_cells(runs, tmp_path, capsys):
    odd = runs / "a|b, c"
    (runs / "other").rename(odd)
    rows = table(capsys, runs / "first", odd)
    assert rows[1]["name"] == odd.name
    assert list(rows[0]) == [name for name in rows[0] if any(row[name] for row in rows)]  # no empty column
    text = printed(capsys, runs / "first", odd).splitlines()
    markdown = printed(capsys, runs / "first", odd, "--format", "markdown").splitlines()
    assert len(text) == 3
    assert len(markdown) == 4
    assert all(line.startswith("| ") for line in (*markdown[:1], *markdown[2:]))
    for row, line, marked in zip(rows, text[1:], markdown[2:]):
        cells = [cell.strip() for cell in marked.strip("|").replace("\\|", "\0").split("|")]
        assert [cell.replace("\0", "|") for cell in cells] == list(row.values())
        assert all(line[text[0].index(name) :].startswith(value) for name, value in row.items())


def test_files(trained, tmp_path, capsys):
    folders, out = [trained / name for name in SETTINGS], tmp_path / "new" / "out"
    for _ in range(2):  # files of an earlier call are replaced
        assert printed(capsys, *folders, "--out", out) == printed(capsys, *folders)
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md", "compare.png"]
    assert (out / "compare.csv").read_text() == printed(capsys, *folders, "--format", "csv")
    assert (out / "compare.md").read_text() == printed(capsys, *folders, "--format", "markdown")
    picture = Image.open(out / "compare.png")
    assert picture.format == "PNG"
    assert 1000 < picture.width < 3000
    assert 300 < picture.height < 1500
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ("C0", "C1"):  # of the curves of both rows, in three panels and the legend
        assert (abs(pixels / 255 - to_rgb(colour)).max(1) < 0.02).sum() > 1000
    assert not (abs(pixels / 255 - to_rgb("C2")).max(1) < 0.02).any()


def test_curves_are_the_mean_and_the_range():
    losses = [4, 2, 1], [8, 4]
    logs = [[dict(epoch=epoch, train_loss=loss) for epoch, loss in enumerate(values)] for values in losses]
    logs[1].append(dict(epoch=2))  # without a value
    figure = draw_curves({"two": logs, "one": logs[:1]}, {"loss": {"train_loss": ""}, "top-1": {"test_acc1": ""}})
    loss, top1 = figure.axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[0, 6], [1, 3]], [[0, 4], [1, 2], [2, 1]]]
    corners = loss.collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(corner) for corner in corners} == {(0, 4), (0, 8), (1, 2), (1, 4)}
    assert not top1.lines
    assert [text.get_text() for text in figure.legends[0].texts] == ["two", "one"]


def test_epochs_without_validation(runs, tmp_path, capsys):
    names = [name for name in read_log(runs / "first")[1] if name.startswith("test_")]
    kept = read_log(runs / "first")[1]["test_acc1"]

    def drop(which: set[int]) -> Callable[[dict[str, Any]], object]:
        return lambda entry: entry.get("epoch") in which and [entry.pop(name) for name in names]

    edit(runs / "first", drop({0, 2}))
    edit(runs / "other", drop({0, 1, 2}))
    first, other = table(capsys, runs / "first", runs / "other", "--out", tmp_path / "out")
    np.testing.assert_allclose(numbers(first), [kept, np.nan, kept, np.nan], atol=5e-4)
    assert first["best epoch"] == "1"
    assert first["epochs done"] == other["epochs done"] == "3"
    assert np.isnan(numbers(other)).all()
    both, _ = table(capsys, *(runs / name for name in SETTINGS))
    assert both["runs"] == "2"
    edit(runs / "second", drop({0, 1, 2}))
    alone, _ = table(capsys, *(runs / name for name in SETTINGS))
    np.testing.assert_allclose(numbers(alone), numbers(first), atol=5e-4)
    (row,) = table(capsys, runs / "other", "--out", tmp_path / "out")
    assert not {"best top-1 (%)", "last top-1 (%)", "best epoch"} & row.keys()


def test_resumed_runs(runs, capsys):
    """The last settings count, and the first number of processes, from which the size of the steps follows."""
    first, *epochs = (runs / "first/log.txt").read_text().splitlines()
    start = json.loads(first)
    resumed = {**start, "settings": {**start["settings"], "lr": 0.25}, "processes": 4}
    lines = [first, epochs[0], json.dumps({"event": "stopped"}), json.dumps(resumed), *epochs[1:]]
    (runs / "first/log.txt").write_text("\n".join(lines) + "\n")
    rows = table(capsys, runs / "first", runs / "other")
    assert [settings_in(row) for row in rows] == [{"lr": "0.25"}, {"lr": "0.5"}]
    assert [row["epochs done"] for row in rows] == ["3", "3"]


def change_setting(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entry: "settings" in entry and entry["settings"].update(changes)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda entry: "data" in entry and entry["data"]["val"].update(fingerprint="0"), "data"),
        (lambda entry: "data" in entry and entry.update(processes=8), "processes"),
        (change_setting(model_kwargs={"pointwise": False}), "model_kwargs"),
        (change_setting(seed=0), ""),
    ],
    ids=["data", "processes", "arguments", "repetition"],
)
def test_runs_that_stay_apart(change, column, runs, capsys):
    """What differs in more than the seed, and what does not even differ in that."""
    edit(runs / "second", change)
    rows = table(capsys, runs / "first", runs / "second")
    assert [row["name"] for row in rows] == ["first", "second"]
    assert settings_in(rows[0]).keys() - {"seed"} == ({column} if column else set())


def test_settings_without_effect_are_not_listed(runs, capsys):
    edit(runs / "second", change_setting(output_dir="x", num_workers=5, timeout=1.0, device="cuda", seed=7))
    (row,) = table(capsys, runs / "first", runs / "second")
    assert settings_in(row) == {"seed": "0 7"}


def test_logs_of_older_code(runs, capsys):
    """A log without a setting that exists now, and the published code's, which has none."""
    edit(runs / "second", lambda entry: "settings" in entry and entry["settings"].pop("clip_mode"))
    (row,) = table(capsys, runs / "first", runs / "second")
    assert row["runs"] == "2"
    (runs / "first/log.txt").write_text("".join(f"{json.dumps(entry)}\n" for entry in read_log(runs / "first")))
    rows = table(capsys, runs / "first", runs / "second")
    assert [row["runs"] for row in rows] == ["1", "1"]


def test_names(runs, capsys):
    """They are relative to the folder that contains all runs."""
    (runs / "first").rename(runs / "seed-1")
    (runs / "second").rename(runs / "seed-12")
    shutil.move(runs / "other", runs.parent / "other")
    both, other = table(capsys, runs / "seed-1", runs / "seed-12", runs.parent / "other")
    assert both["name"] == "runs/seed-{1,12}"
    assert other["name"] == "other"


def test_a_least_top1(runs, capsys):
    folders = [str(runs / name) for name in SETTINGS]
    last = min(read_log(Path(folder))[-1]["test_acc1"] for folder in folders)
    assert compare.run([*folders, "--min-top1", str(last - 0.01)]) == 0
    assert compare.run([*folders, "--min-top1", str(last + 0.01)]) == 1
    assert "--min-top1" in capsys.readouterr().err


MISTAKES = {
    "no run": ("", "RUN"),
    "missing folder": ("{runs}/nope", "{runs}/nope"),
    "folder without a log": ("{runs}/first {runs}", "RUN {runs}: "),
    "file for a folder": ("{runs}/first/log.txt", "RUN {runs}/first/log.txt: "),
    "text for a log": ("{runs}/first {runs}/text", "{runs}/text/log.txt"),
    "numbers for a log": ("{runs}/first {runs}/number", "{runs}/number/log.txt"),
    "no finished epoch": ("{runs}/first {runs}/started", "RUN {runs}/started: "),
    "a folder twice": ("{runs}/first {runs}/other {runs}/../runs/first", "RUN {runs}/../runs/first: "),
    "a link to the same folder": ("{runs}/first {runs}/link", "RUN {runs}/link: "),
    "unknown format": ("{runs}/first --format html", "--format"),
    "unwritable folder": ("{runs}/first --out {runs}/first/log.txt", "--out {runs}/first/log.txt: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, runs, capsys):
    first = (runs / "first/log.txt").read_text()
    for name, log in {"text": "epoch 1: loss 0.5\n", "number": "5\n", "started": first.splitlines()[0]}.items():
        (runs / name).mkdir()
        (runs / name / "log.txt").write_text(log)
    (runs / "link").symlink_to(runs / "first")
    arguments, expected = (text.format(runs=runs) for text in MISTAKES[mistake])
    assert expected in refusal(compare.run, "compare", arguments.split(), capsys)
    assert (runs / "first/log.txt").read_text() == first
