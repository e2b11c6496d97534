"""Evaluation under the corruptions of ImageNet-C: the corrupted images, the results and their files, and refusals."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, SMALLEST, refusal, succeed
from PIL import Image

import main
from sepvit_lib.common.tables import as_text
from sepvit_lib.pipeline.corruptions import corrupt, corruption_table, top1_by_corruption
from sepvit_lib.run.output import draw_corruptions

imagecorruptions = pytest.importorskip("imagecorruptions")
NAMES = imagecorruptions.get_corruption_names("all")
TRIED = ("gaussian_noise", "glass_blur")  # the commands of this module use only these, of 19


@pytest.fixture
def _two(monkeypatch):
    monkeypatch.setattr(imagecorruptions, "get_corruption_names", lambda subset: list(TRIED))


def photograph(height: int = 32, width: int = 32) -> Image.Image:
    """A smooth image in colour, with edges."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    stripes = 0.3 * (np.sin(20 * rows) > 0)
    pixels = np.stack([0.2 + 0.4 * rows + stripes, 0.5 * columns + stripes, 0.6 - 0.4 * rows * columns], axis=-1)
    return Image.fromarray((255 * pixels).astype(np.uint8))


def error_of(name: str, severity: int, image: Image.Image) -> float:
    """Root mean square of the change of the pixels."""
    change = np.asarray(corrupt(image, name, severity), float) - np.asarray(image, float)
    return float(np.sqrt((change**2).mean()))


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def test_there_are_the_15_common_corruptions_and_four_more():
    assert (len(NAMES), NAMES[:15]) == (19, imagecorruptions.get_corruption_names("common"))


@pytest.mark.parametrize("name", NAMES)
def test_small_images_and_others_can_be_corrupted(name, capfd):
    for image in (photograph(), photograph(40, 96)):
        for severity in range(1, 6):
            corrupted = corrupt(image, name, severity)
            assert (corrupted.mode, corrupted.size) == ("RGB", image.size)
            assert corrupted.tobytes() != image.tobytes()
    assert capfd.readouterr() == ("", "")  # the package prints when it falls back to something else


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_depend_on_the_image_corruption_and_severity_alone(name):
    first, other = photograph(), photograph().transpose(Image.Transpose.ROTATE_180)
    expected = corrupt(first, name, 3).tobytes()
    np.random.seed(1)
    corrupt(other, name, 3)
    assert corrupt(first, name, 3).tobytes() == expected


def test_images_get_different_noise():
    grey, darker = (Image.new("RGB", (32, 32), (value,) * 3) for value in (128, 127))
    noises = [np.asarray(corrupt(image, "gaussian_noise", 1), float).ravel() for image in (grey, darker)]
    assert abs(np.corrcoef(noises)[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["gaussian_noise", "gaussian_blur", "contrast", "brightness"])
def test_a_stronger_corruption_changes_an_image_more(name):
    errors = [error_of(name, severity, photograph(64, 64)) for severity in range(1, 6)]
    assert errors == sorted(errors)
    assert errors[-1] > 1.2 * errors[0] > 0


def test_noise_has_the_severity_of_the_paper():
    """Standard deviations of 0.08 to 0.38; the strongest is clipped."""
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    errors = [error_of("gaussian_noise", severity, grey) / 255 for severity in (1, 2)]
    assert errors == pytest.approx([0.08, 0.12], rel=0.05)


def test_spatter_without_drops_leaves_an_image_unchanged():
    """One small image in 40 gets no drop, for which the package returns a black one."""
    images = [Image.new("RGB", (32, 32), (100, 100, number)) for number in range(200)]
    corrupted = [corrupt(image, "spatter", 1) for image in images]
    assert any(before.tobytes() == after.tobytes() for before, after in zip(images, corrupted))
    assert all(np.asarray(image).any() for image in corrupted)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_means():
    top1 = {name: [60.0 - number - severity for severity in range(1, 6)] for number, name in enumerate(NAMES)}
    header, clean, *rows = corruption_table(top1, 80.0)
    assert {len(row) for row in (header, clean, *rows)} == {7}
    assert (clean[0], clean[-1]) == ("clean", "80.000")
    means = {row[0]: row[-1] for row in rows}
    assert means["frost"] == f"{60 - NAMES.index('frost') - 3:.3f}"
    assert means["mean of 15"] == f"{60 - 7 - 3:.3f}"
    assert means["mean of 19"] == f"{60 - 9 - 3:.3f}"


def test_the_picture_shows_the_means():
    top1 = {name: [60.0 - number - severity for severity in range(1, 6)] for number, name in enumerate(NAMES)}
    (axes,) = draw_corruptions(top1, 80.0).axes
    bars = dict(zip((label.get_text() for label in axes.get_yticklabels()), (bar.get_width() for bar in axes.patches)))
    assert bars["clean"] == 80
    assert bars["all, severity 2"] == 60 - 9 - 2
    assert bars["frost"] == 60 - NAMES.index("frost") - 3
    assert len(bars) == 1 + 5 + 19


def test_each_severity_of_each_corruption_is_evaluated():
    top1 = top1_by_corruption(lambda name, severity: NAMES.index(name) + severity / 10)
    assert list(top1) == NAMES
    assert top1[NAMES[3]] == [3.1, 3.2, 3.3, 3.4, 3.5]


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def evaluate(folder: Path, data: Path, *flags: object) -> list[str]:
    """Arguments that evaluate the checkpoint of `trained_digits` under corruptions."""
    checkpoint = folder / "checkpoint.pth"
    arguments = [*SMALL, "--eval", "--corruptions", "--resume", checkpoint, "--data-path", data, "--device", "cpu"]
    return list(map(str, [*arguments, *flags]))


@pytest.mark.usefixtures("_two")
def test_the_files_agree_with_the_printed_table(trained_digits, few_digits, tmp_path, capsys):
    assert main.run(evaluate(trained_digits, few_digits, "--output_dir", tmp_path)) == 0
    printed = capsys.readouterr().out
    lines = list(csv.reader((tmp_path / "corruptions.csv").read_text().splitlines()))
    assert "\n" + as_text(lines) + "\n" in printed
    results = json.loads((tmp_path / "eval.json").read_text())
    before = json.loads((trained_digits / "eval.json").read_text())
    assert {name: value for name, value in results.items() if name != "corruptions"} == before  # clean, both weights
    rows = {row[0]: row[1:] for row in lines}
    assert rows["clean"][-1] == f"{results['test_acc1']:.3f}"
    for name, values in results["corruptions"].items():
        assert rows[name][:5] == [f"{value:.3f}" for value in values]
        for severity, value in enumerate(values, start=1):
            assert f"{name}, severity {severity}: top-1 {value:.3f} %" in printed
    assert results["corruptions"]["gaussian_noise"][4] < results["test_acc1"]
    assert "[" not in "".join(line for line in printed.splitlines() if "severity" in line)  # no progress of each
    with Image.open(tmp_path / "corruptions.png") as picture:
        assert picture.width > 600


@pytest.mark.usefixtures("_two")
def test_results_do_not_depend_on_workers(trained_digits, few_digits, tmp_path):
    results = []
    for workers, batch in ((0, 16), (2, 3)):
        flags = ["--num_workers", workers, "--batch-size", batch, "--output_dir", tmp_path]
        assert main.run(evaluate(trained_digits, few_digits, *flags)) == 0
        results.append(json.loads((tmp_path / "eval.json").read_text())["corruptions"])
    assert results[0] == results[1]


@pytest.mark.slow
def test_results_do_not_depend_on_processes(trained_digits, few_digits, tmp_path):
    results = []
    for processes in (0, 2):
        flags = ["--dist-eval", "--output_dir", tmp_path]
        succeed(*evaluate(trained_digits, few_digits, *flags), processes=processes)
        results.append(json.loads((tmp_path / "eval.json").read_text())["corruptions"])
    assert list(results[0]) == NAMES
    assert results[0] == results[1]


@pytest.mark.parametrize("flags", ["--in-chans 1", "--input-size 28", "--multi-label --data-set csv/x.csv"])
def test_unsupported_images_are_refused(flags, few_digits, capsys):
    arguments = [*SMALLEST, "--eval", "--corruptions", "--data-path", few_digits, "--device", "cpu", *flags.split()]
    assert "only for RGB images of at least 32 × 32 pixels" in refusal(main.run, "main", arguments, capsys)


def test_a_missing_package_is_named_first(trained_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    line = refusal(main.run, "main", evaluate(trained_digits, tmp_path / "missing"), capsys)
    assert "--corruptions: needs imagecorruptions: pip install '.[corruptions]'" in line
