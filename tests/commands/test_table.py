"""Images in a CSV file, and splits: what is read, which images are for validation, and mistakes, each with its line."""

import csv
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import SMALLEST, differences, read_log, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import main
from sepvit_lib.pipeline import duplicates
from sepvit_lib.pipeline.splits import validation_part
from tools import export

CPU = ["--device", "cpu", "--num_workers", "0"]


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


@pytest.fixture
def images(few_digits, tmp_path) -> Path:
    """All digits in one folder, and a table of them: name, digit, split and the writer."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows: list[list[str]] = []
    for path in sorted(few_digits.glob("*/*/*")):
        split, label = path.parts[-3:-1]
        name = f"{split}-{label}-{path.name}"
        (folder / name).symlink_to(path.resolve())
        rows.append([name, label, split, f"writer{len(rows) % 9}"])
    write(folder / "table.csv", [["path", "label", "split", "group"], *rows])
    return folder


def write(path: Path, rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8", end: str = "\n") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(rows)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def found(table: Path, *flags: object, is_train: bool = True):
    args = main.build_parser().parse_args(["--data-set", f"csv/{table}", *map(str, flags)])
    return main.find_images(args, is_train)


def sizes(table: Path, *flags: object) -> tuple[int, int]:
    return len(found(table, *flags)), len(found(table, *flags, is_train=False))


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def test_a_table_trains_like_the_folders_of_its_images(images, few_digits, tmp_path):
    """The same images, in the same order, and so the same weights; evaluated and resumed likewise."""
    order = sorted(rows_of(images / "table.csv")[1:], key=lambda row: (row[1], row[0]))
    write(images / "table.csv", [["path", "label", "split", "group"], *order])
    shared = [*SMALLEST, *CPU, "--epochs", 2, "--checkpoint-every", 1, "--keep-checkpoints", 99, "--auto-resume"]
    table = ["--data-set", f"csv/{images / 'table.csv'}"]
    assert run(*shared, *table, "--output_dir", tmp_path / "table") == 0
    assert run(*shared, "--data-path", few_digits, "--output_dir", tmp_path / "folders") == 0
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "table/checkpoint-00000001.pth", resumed)
    assert run(*shared, *table, "--output_dir", resumed) == 0
    one, two, three = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"]
        for name in ("table", "folders", "resumed")
    )
    assert differences(one, two) == differences(one, three) == []
    assert run(*shared[:-1], *table, "--eval", "--resume", resumed / "checkpoint.pth") == 0
    assert torch.load(resumed / "checkpoint.pth", weights_only=True)["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("delimiter", "encoding", "end"), [(",", "utf-8", "\n"), (";", "utf-8-sig", "\r\n"), ("\t", "utf-8", "\r\n")]
)
def test_dialects(delimiter, encoding, end, images):
    """Byte order marks, semicolons, tabs, quotes, spaces and Windows's line ends."""
    rows = rows_of(images / "table.csv")
    rows[0] = ["file name", " class", "fold", "group"]
    for row in rows[1:]:
        row[1] = f'digit {row[1]}; "{delimiter}" '
        row[2] = dict(train="Training", val="validation")[row[2]]
    other = images.parent / "other.tsv"
    write(other, rows, delimiter, encoding, end)
    columns = ["--path-column", "file name", "--label-column", "class", "--split-column", "fold"]
    data = found(other, *columns, "--data-path", images)
    assert len(data) == 48
    assert data.classes == [f'digit {digit}; "{delimiter}"' for digit in "012"]
    assert len(found(other, *columns, "--data-path", images, is_train=False)) == 21


def test_other_splits_and_ignored_classes(images):
    rows = rows_of(images / "table.csv")
    for row in rows[1:10]:
        row[2] = "test"
    write(images / "table.csv", rows)
    assert sizes(images / "table.csv", "--val-split", "test") == (48 - 9, 9)
    data = found(images / "table.csv", "--ignore-classes", "1")
    assert data.classes == ["0", "2"]
    assert set(data.dataset.labels()) == {0, 1}
    assert not any("-1-" in path for path, _ in data.dataset.samples)


def test_tables_of_other_programs(images):
    """An unnamed index, blank lines, splits in capitals; and a table without splits is evaluated as a whole."""
    rows = rows_of(images / "table.csv")
    lines = [",".join(["" if number == 0 else str(number), *row]) for number, row in enumerate(rows)]
    (images / "table.csv").write_text("\n\n".join(lines).replace("train,", "Train,", 9))
    assert sizes(images / "table.csv") == (48, 21)
    assert sizes(images / "table.csv", "--split-column", "", "--group-column", "", "--val-fraction", 0.25) == (51, 18)
    write(images / "test.csv", [row[:2] for row in rows])
    assert len(found(images / "test.csv", "--val-split", "all", is_train=False)) == 69


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_splits_are_the_same_wherever_the_images_are(kind, few_digits, tmp_path, monkeypatch):
    """The names of the images decide, not the spelling of --data-path; each image keeps its label."""
    parts = []
    for place in ("here", "elsewhere/deeper"):
        root = tmp_path / place
        root.mkdir(parents=True)
        if kind == "folder":
            (root / "train").symlink_to(few_digits / "train")
        else:
            with tarfile.open(root / "train.tar", "w", dereference=True) as archive:
                archive.add(few_digits / "train", "train")
        monkeypatch.chdir(root.parent)
        flags = ["--val-fraction", "0.25", "--ignore-classes", "0"]
        for path in (root, root.name):
            args = main.build_parser().parse_args(["--data-path", str(path), *flags])
            train, val = (main.find_images(args, is_train).dataset for is_train in (True, False))
            assert (len(train), len(val)) == (24, 8)
            parts.append([train.inner_name(index) for index in range(24)])
            for index in range(24):
                content, label = train.encoded(index)
                name = train.inner_name(index).removeprefix("train/")
                assert content == (few_digits / "train" / name).read_bytes()
                assert train.classes[label] == Path(name).parent.name
    assert parts[0] == parts[1] == parts[2] == parts[3]


def test_other_data_sets_refuse_these_settings(few_digits, tmp_path, capsys):
    for flags in (["--val-fraction", 0.2], ["--ignore-classes", "apple"]):
        for source in (["--data-set", "CIFAR"], ["--data-set", "wds/x"], ["--data-path", few_digits]):
            if flags[0] == "--ignore-classes" and "--data-path" in source:
                continue
            arguments = [*SMALLEST, *CPU, *source, *flags, "--output_dir", tmp_path / "run"]
            assert flags[0] in refusal(main.run, "main", arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_export_finds_the_images_of_the_run(images, tmp_path):
    rows = rows_of(images / "table.csv")
    write(images / "whole.csv", [[row[0], row[1], row[3]] for row in rows])
    table = ["--data-set", f"csv/{images / 'whole.csv'}"]
    folder = tmp_path / "run"
    split = ["--val-fraction", 0.25, "--ignore-classes", "1", "--mixup", 0, "--cutmix", 0]
    assert run(*SMALLEST, *CPU, *table, *split, "--output_dir", folder) == 0
    arguments = ["--resume", folder / "checkpoint.pth", *table, "--data-path", images, "--formats", "safetensors"]
    arguments += ["--out", tmp_path / "out", "--rounds", 1]
    assert export.run(list(map(str, arguments))) == 0


def test_missing_files_are_unreadable_images(images, tmp_path):
    """As many as --on-bad-image allows are replaced in training; in validation, they end the run."""
    rows = rows_of(images / "table.csv")
    rows[-1][0] = "none.png"
    rows[-1][2] = "train"
    write(images / "table.csv", rows)
    shared = [*SMALLEST, *CPU, "--data-set", f"csv/{images / 'table.csv'}", "--output_dir"]
    assert run(*shared, tmp_path / "run") == 0
    assert read_log(tmp_path / "run")[-1]["unreadable_images"] == 1
    assert run(*shared, tmp_path / "strict", "--on-bad-image", "fail") == 2


def edited(rows: list[list[str]], what: str) -> list[list[str]]:
    if what == "no label column":
        return [[row[0], *row[2:]] for row in rows]
    if what == "empty label":
        rows[5][1] = " "
    if what == "empty path":
        rows[5][0] = ""
    if what == "two labels":
        rows.append([rows[3][0], "9", "train", "x"])
    if what == "two splits":
        rows.append([*rows[3][:2], "val", rows[3][3]])
    if what == "too many values":
        rows[5].append("x")
    if what == "no split":
        return [[row[0], row[1], "", row[3]] if number else row for number, row in enumerate(rows)]
    if what == "wrong folder":
        return [[f"elsewhere/{row[0]}", *row[1:]] if number else row for number, row in enumerate(rows)]
    return rows


@pytest.mark.parametrize(
    ("what", "flags", "words"),
    [
        ("no label column", "", ["--label-column"]),
        ("empty label", "", ["line 6", "label"]),
        ("empty path", "", ["line 6", "path"]),
        ("two labels", "", ["lines 4 and 71"]),
        ("two splits", "", ["lines 4 and 71", "train and val"]),
        ("too many values", "", ["line 6"]),
        ("", "--group-column patient", ["--group-column", "patient"]),
        ("no split", "", ["--val-fraction"]),
        ("wrong folder", "", ["--data-path"]),
        ("", "--val-fraction 0.2", ["--val-fraction 0.2", "--split-column"]),
        ("", "--ignore-classes 7", ["--ignore-classes 7"]),
        ("", "--ignore-classes 0 1", ["a single class"]),
        ("", "--val-split test", ["split test"]),
        ("no file", "", ["cannot be read"]),
        ("no text", "", ["UTF-8"]),
    ],
)
def test_mistakes(what, flags, words, images, tmp_path, capsys):
    table = images / "table.csv"
    write(table, edited(rows_of(table), what))
    if what == "no file":
        table.unlink()
    if what == "no text":
        table.write_bytes(b"path,label\n\xff\xfe,1\n")
    arguments = [*SMALLEST, *CPU, "--data-set", f"csv/{table}", "--output_dir", tmp_path / "run", *flags.split()]
    line = refusal(main.run, "main", arguments, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_duplicates_are_named(images, tmp_path, capsys, monkeypatch):
    """Validation images that are a training image: the same file, or the same pixels in another format."""
    rows = rows_of(images / "table.csv")
    first = next(row for row in rows[1:] if row[2] == "train")
    with Image.open(images / first[0]) as image:
        image.save(images / "copy.bmp")
    shutil.copy(images / first[0], images / "same.png")
    write(images / "table.csv", [*rows, *([name, first[1], "val", "x"] for name in ("copy.bmp", "same.png"))])
    shared = [*SMALLEST, *CPU, "--data-set", f"csv/{images / 'table.csv'}"]

    def warned(name: str, *flags: str) -> list[str]:
        capsys.readouterr()
        assert run(*shared, *flags, "--output_dir", tmp_path / name) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "also training images" in line]

    (line,) = warned("run")
    assert line.startswith("WARNING: 2 of 23 ")
    assert f"{images}/copy.bmp = {images}/{first[0]}" in line
    assert f"{images}/same.png" in line
    assert warned("run", "--auto-resume") == []  # it was said when the run started
    assert warned("off", "--no-check-duplicates") == []
    monkeypatch.setattr(main, "MAX_IMAGES", 0)
    assert warned("large") == []
    assert warned("large, too", "--check-duplicates") == [line]
    monkeypatch.setattr(duplicates, "FEW", 0)  # with loader workers
    train, val = (found(images / "table.csv", is_train=is_train).dataset for is_train in (True, False))
    assert len(duplicates.find_duplicates(train, val, 2)) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=200),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_splits_keep_groups_and_classes(images, fraction, seed):
    """Groups stay whole, every class has a training image, and the order of the images does not matter."""
    labels, groups = [label for label, _ in images], [str(group) for _, group in images]
    chosen = validation_part(labels, groups, fraction, seed)
    sides = defaultdict(set)
    for group, is_val in zip(groups, chosen):
        sides[group].add(is_val)
    assert all(len(side) == 1 for side in sides.values())
    assert {label for label, is_val in zip(labels, chosen) if not is_val} == set(labels)
    assert validation_part(labels[::-1], groups[::-1], fraction, seed) == chosen[::-1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.floats(0.05, 0.5), st.integers(0, 5))
def test_splits_are_stratified(labels, fraction, seed):
    """Without groups, each class has its share, rounded; a class with one image is for training."""
    chosen = validation_part(labels, [f"image {number}" for number in range(len(labels))], fraction, seed)
    parts = Counter(label for label, is_val in zip(labels, chosen) if is_val)
    for label, count in Counter(labels).items():
        assert parts[label] == (min(count - 1, max(1, round(fraction * count))) if count > 1 else 0)


def test_a_split_is_written_and_given_back(images, few_digits, tmp_path, capsys):
    """Of a table with groups, and of class folders without val/: the run on split.csv has the same images."""
    rows = rows_of(images / "table.csv")
    write(images / "whole.csv", [[row[0], row[1], row[3]] for row in rows])
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders/train").symlink_to(few_digits / "train")
    own = ["--data-set", f"csv/{images / 'whole.csv'}"]
    cases = {"table": own, "folders": ["--data-path", tmp_path / "folders"]}
    roots = {"table": images, "folders": tmp_path / "folders/train"}
    for name, source in cases.items():
        split = ["--val-fraction", 0.25, "--split-seed", 3]
        assert run(*SMALLEST, *CPU, *source, *split, "--output_dir", tmp_path / name) == 0
        table = tmp_path / name / "split.csv"
        again = ["--data-set", f"csv/{table}", "--data-path", roots[name]]
        assert run(*SMALLEST, *CPU, *again, "--output_dir", tmp_path / f"{name} again") == 0
        paths = (tmp_path / folder / "checkpoint.pth" for folder in (name, f"{name} again"))
        first, second = (torch.load(path, weights_only=True)["data"] for path in paths)
        assert first == second
        capsys.readouterr()
        changed = [*SMALLEST, *CPU, *source, *split, "--split-seed", 4, "--output_dir", tmp_path / name]
        assert "--split-seed 4" in refusal(main.run, "main", [*changed, "--auto-resume"], capsys)
    written = {row[0]: row[2] for row in rows_of(tmp_path / "table/split.csv")[1:]}
    groups = defaultdict(set)
    for row in rows[1:]:
        groups[row[3]].add(written[row[0]])
    assert all(len(splits) == 1 for splits in groups.values())
    assert {"train", "val"} == set(written.values())
