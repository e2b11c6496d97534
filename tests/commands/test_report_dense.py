"""The reports of segmentation/test.py and detection/test.py."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, succeed
from dense_data import BOXED, LABELLED, own_config, save_model, write_boxed, write_labelled
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detection.test
import segmentation.test
from detection.report import matches
from sepvit_lib.report.html import MAX_CLASSES, SHOWN, Page, add_classes, add_confusions

MAIN = dict(segmentation=segmentation.test.main, detection=detection.test.main)
OPTIONS = ["--cfg-options", *(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test"))]
FILES = ["report.html", "report.json", "facts.csv", "classes.csv", "images.csv", "worst_images/01.jpg"]
OWN_FILES = dict(
    segmentation=["confusions.csv", "confusion_matrix.csv", "confusion_matrix.png"],
    detection=[f"precision_recall_{kind}_{name}.png" for kind in ("box", "mask") for name in ("mean", "classes")],
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, list[Path]]:
    """By task: config and checkpoint of a model with random weights. Label maps have unlabelled pixels."""
    folder, found = tmp_path_factory.mktemp("inputs"), {}
    for task, base, write in (("segmentation", LABELLED, write_labelled), ("detection", BOXED, write_boxed)):
        root = write(folder / task)
        for number, path in enumerate(sorted(root.glob("annotations/validation/*.png")), start=1):
            labels = np.array(Image.open(path))
            labels[: 5 * number] = 0
            Image.fromarray(labels).save(path)
        config = own_config(folder / f"{task}_own.py", base, root)
        found[task] = [config, save_model(config, folder / f"{task}.pth")]
    saved = torch.load(found["segmentation"][1], weights_only=True)
    weights = saved["state_dict"]["decode_head.conv_seg.weight"]
    weights.normal_(generator=torch.Generator().manual_seed(0))  # so that all classes are predicted
    torch.save(saved, found["segmentation"][1])
    return found


def run(task: str, inputs: dict[str, list[Path]], folder: Path, capsys, *flags: str) -> str:
    """Run test.py in this process. Returns what it printed."""
    capsys.readouterr()
    arguments = [*map(str, inputs[task]), "--report", "--work-dir", str(folder), *flags]
    assert MAIN[task]([*arguments, *([] if "--cfg-options" in flags else OPTIONS)]) == 0
    return capsys.readouterr().out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed(text: str, *names: str) -> dict[str, float]:
    """The last figures with the given names that mmengine printed."""
    return {name: float(re.findall(rf"{name}: ([\d.-]+)", text)[-1]) for name in names}


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """By task: the folder of its report, and what the command printed."""
    found = {}
    for task in MAIN:
        folder = tmp_path_factory.mktemp(task)
        flags = ["--report", "--work-dir", folder, *OPTIONS]
        text = succeed(*inputs[task], *flags, script=f"{task}/test.py", cwd=ROOT / task)
        found[task] = folder / "report", text
    return found


@pytest.mark.parametrize("task", MAIN)
def test_files(task, written):
    folder, text = written[task]
    assert f"report: {folder}/report.html" in text
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {*FILES, *OWN_FILES[task]} <= names
    page = (folder / "report.html").read_text()
    assert "://" not in page  # self-contained
    assert page.count("<img ") == len([name for name in names if name.endswith(".jpg")])
    values = json.loads((folder / "report.json").read_text())
    assert values["data"].startswith("2 images of 2 classes in ")
    keys = ("mIoU", "aAcc", "mAcc") if task == "segmentation" else ("coco/bbox_mAP", "coco/segm_mAP_50")
    for name, value in printed(text, *keys).items():
        assert values[name] == pytest.approx(value, abs=1e-4)
        shown = f"<b>{value:.2f} %</b>" if task == "segmentation" else f"<b>{100 * value:.1f} %</b>"
        assert shown in page


def test_segmentation_figures(inputs, written):
    """The matrix has all labelled pixels, and mmseg's measures follow from it."""
    folder, text = written["segmentation"]
    rows = table(folder / "confusion_matrix.csv")
    matrix = np.array([[int(row[name]) for name in ("ground", "square")] for row in rows])
    root = inputs["segmentation"][0].parent / "segmentation"
    labels = np.stack([np.asarray(Image.open(path)) for path in root.glob("annotations/validation/*.png")])
    assert matrix.sum(axis=1).tolist() == [(labels == 1).sum(), (labels == 2).sum()]
    assert (matrix > 0).all()
    hits = matrix.diagonal()
    iou = hits / (matrix.sum(axis=0) + matrix.sum(axis=1) - hits)
    figures = printed(text, "aAcc", "mIoU", "mAcc")
    expected = 100 * np.array([hits.sum() / matrix.sum(), iou.mean(), (hits / matrix.sum(axis=1)).mean()])
    assert [*figures.values()] == pytest.approx(expected, abs=0.0051)
    classes = table(folder / "classes.csv")
    for row, share in zip(classes, iou):
        assert float(row["IoU (%)"]) == pytest.approx(100 * share, rel=1e-4)
        line = re.search(rf"\|\s+{row['class']}\s+\|\s+([\d.]+)\s+\|", text)
        assert float(line[1]) == pytest.approx(100 * share, abs=0.0051)  # the table that mmseg prints
    accuracies = [float(row["pixel accuracy (%)"]) for row in table(folder / "images.csv")]
    pixels = (labels > 0).sum(axis=(1, 2))
    assert np.average(accuracies, weights=sorted(pixels)[::-1]) == pytest.approx(figures["aAcc"], abs=0.0051)


def test_detection_figures(written):
    """AP of the classes averages to mmdet's mAP, and the counts of images add up to those of the classes."""
    folder, text = written["detection"]
    classes, images = (table(folder / f"{name}.csv") for name in ("classes", "images"))
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        for measure, key in (("AP", "mAP"), ("AP50", "mAP_50")):
            values = [float(row[f"{kind} {measure} (%)"]) for row in classes]
            assert printed(text, f"coco/{name}_{key}").popitem()[1] == pytest.approx(np.mean(values) / 100, abs=0.00051)
    for name in ("objects", "detections", "false negatives", "false positives"):
        assert sum(int(row[name]) for row in classes) == sum(int(row[name]) for row in images)
    assert [(row["class"], row["objects"]) for row in classes] == [("cat", "1"), ("dog", "1")]


@pytest.mark.parametrize(
    ("task", "flags", "names"),
    [
        ("segmentation", ["--eval", "mDice", "--aug-test"], ("mDice", "mIoU")),
        ("detection", ["--eval", "bbox"], ("coco/bbox_mAP",)),
    ],
)
def test_with_other_flags(task, flags, names, inputs, tmp_path, capsys):
    figures = printed(run(task, inputs, tmp_path, capsys, *flags), *names)
    values = json.loads((tmp_path / "report/report.json").read_text())
    assert {name: values[name] for name in names} == pytest.approx(figures, abs=1e-4)
    assert values["test-time augmentation"] == ("yes" if "--aug-test" in flags else "no")
    assert ("mask AP" in (tmp_path / "report/report.html").read_text()) is False


def test_without_detections(inputs, tmp_path, capsys):
    text = run("detection", inputs, tmp_path, capsys, *OPTIONS, "model.test_cfg.rcnn.score_thr=1.0")
    assert "no report was written: mmdet evaluates nothing" in text
    assert not (tmp_path / "report/report.html").exists()


def test_report_needs_an_evaluation(inputs, tmp_path, capsys):
    arguments = [*inputs["detection"], "--work-dir", tmp_path, "--report", "--format-only", *OPTIONS]
    assert "--report and --format-only: choose one" in refusal(MAIN["detection"], "test", arguments, capsys)


# mmdet collects the detections of all processes itself, so this takes the short form for segmentation only.
@pytest.mark.parametrize("task", ["segmentation", pytest.param("detection", marks=pytest.mark.slow)])
def test_two_processes_report_the_same(task, inputs, tmp_path, capsys):
    """Also if the number of images is odd, so that one is evaluated twice."""
    options = list(OPTIONS)
    if task == "segmentation":
        prefix = "test_dataloader.dataset.data_prefix"
        options += [f"{prefix}.img_path=images/training", f"{prefix}.seg_map_path=annotations/training"]
        options += ["test_dataloader.dataset.indices=3"]
    run(task, inputs, tmp_path / "one", capsys, *options)
    flags = ["--launcher", "pytorch", "--report", "--work-dir", tmp_path / "two", *options]
    succeed(*inputs[task], *flags, script=f"{task}/test.py", cwd=ROOT / task, processes=2)
    for path in (tmp_path / "one/report").glob("*.csv"):
        if path.name != "facts.csv":
            assert path.read_text() == (tmp_path / "two/report" / path.name).read_text(), path.name
    assert not [*tmp_path.rglob("collected*")]


def test_many_classes():
    """The page has the worst classes and the most frequent confusions, the files have all."""
    count = MAX_CLASSES + 10
    names, page = [f"class {number}" for number in range(count)], Page("", "")
    add_classes(page, {"class": names, "IoU (%)": [*range(count, 1, -1), float("nan")]}, "IoU (%)")
    matrix = np.diag(np.full(count, 100)) + np.arange(count)[:, None]
    add_confusions(page, matrix, names, "pixels")
    html = "".join(page._parts)
    assert "confusion_matrix.png" not in page.files
    assert html.count("<tr>") == 2 * (SHOWN + 1)
    assert html.index("class 38") < html.index("class 37")  # class 39 has no value
    assert len(page.files["classes.csv"].splitlines()) == count + 1
    confusions = page.files["confusions.csv"].decode().splitlines()
    assert len(confusions) == 1 + (count - 1) ** 2 + (count - 1) - (count - 1)
    assert confusions[1].startswith("class 39,class 0,39,")


def test_matches():
    """A detection needs the score, the class and the IoU. Crowds are no objects, and what lies in them is not false."""
    square = [0, 0, 10, 10]
    objects = [(1, 1, square, 0), (1, 1, [50, 50, 10, 10], 0), (1, 2, square, 0), (2, 1, [0, 0, 90, 90], 1)]
    found = [
        (1, 1, [0, 0, 10, 8], 0.9),
        (1, 1, [50, 50, 10, 10], 0.2),  # a low score
        (1, 1, [80, 80, 10, 10], 0.5),  # no object
        (1, 2, [0, 0, 4, 10], 0.8),  # a low IoU
        (2, 1, [20, 20, 10, 10], 0.7),  # in the crowd
    ]
    truth = COCO()
    truth.dataset = dict(
        info={},
        images=[dict(id=image) for image in (1, 2)],
        categories=[dict(id=label, name=str(label)) for label in (1, 2)],
        annotations=[
            dict(id=number, image_id=image, category_id=label, bbox=box, area=box[2] * box[3], iscrowd=crowd)
            for number, (image, label, box, crowd) in enumerate(objects, start=1)
        ],
    )
    truth.createIndex()
    results = [dict(image_id=image, category_id=label, bbox=box, score=score) for image, label, box, score in found]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    assert matches(evaluation).tolist() == [[[2, 2, 1, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
