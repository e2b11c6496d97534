"""Classes of segmentation and detection: heads with one channel, and checkpoints whose classes are compared by name."""

import copy
import json
import shutil
from argparse import Namespace
from pathlib import Path

import mmseg.registry
import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, succeed
from PIL import Image
from test_own_data import BOXED, LABELLED, write_boxed, write_labelled

import detection.test
import segmentation.test
from sepvit_lib.dense.checks import build_model
from sepvit_lib.dense.classes import has_other_classes, match_classes
from sepvit_lib.dense.mmengine_adapter import read_checkpoint
from sepvit_lib.dense.parts import has_step
from sepvit_lib.dense.settings import read_config
from sepvit_lib.dense.train import build_train_parser, read_starting_weights, run_training

OPTIONS = (
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "test_dataloader.num_workers=0",
    "train_dataloader.batch_size=2",
    "default_hooks.logger.interval=1",
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    return write_boxed(tmp_path_factory.mktemp("boxed") / "data")


def child(path: Path, base: Path, root: Path, names: tuple[str, ...], rest: str = "") -> Path:
    """Write a config of a data set's own classes."""
    path.write_text(f"_base_ = {str(base)!r}\ndata_root = {str(root)!r}\nmetainfo = dict(classes={names!r})\n{rest}\n")
    return path


def save_model(config: Path, path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a config's model with random weights."""
    torch.manual_seed(seed)
    cfg = read_config(Namespace(config=str(config), cfg_options={}))
    meta = dict(dataset_meta=copy.deepcopy(cfg.test_dataloader.dataset.metainfo.to_dict()))
    torch.save(dict(state_dict=build_model(cfg).state_dict(), meta=meta), path)
    return path


def run(task: str, name: str, *arguments: object) -> str:
    return succeed(*arguments, script=f"{task}/{name}", cwd=ROOT / task)


# ----------------------------------------------------------------------------------------------------------------------
# One channel
# ----------------------------------------------------------------------------------------------------------------------

ONE_CHANNEL = """
model = dict(decode_head=dict(num_classes=2, out_channels=1, threshold=0.5,
                              loss_decode=dict(use_sigmoid=True, class_weight=None)))
"""


def test_binary_segmentation_with_one_channel(labelled, tmp_path, capsys, monkeypatch):
    """mmseg advises it, and gives its labels as floats."""
    config = child(tmp_path / "binary.py", LABELLED, labelled, ("ground", "square"), ONE_CHANNEL)
    run(
        "segmentation",
        "train.py",
        config,
        "--from-scratch",
        "--work-dir",
        tmp_path / "run",
        "--cfg-options",
        *OPTIONS,
        "train_cfg.max_iters=1",
        "train_cfg.val_interval=1",
    )
    checkpoint = tmp_path / "run/iter_1.pth"
    text = run(
        "segmentation",
        "test.py",
        config,
        checkpoint,
        "--eval",
        "mIoU",
        "--out",
        tmp_path / "out",
        "--show-dir",
        tmp_path / "shown",
        "--work-dir",
        tmp_path / "work",
        "--cfg-options",
        *OPTIONS,
    )
    assert "mIoU" in text
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == ["0.png", "1.png"]
    assert set(np.unique(Image.open(tmp_path / "out/0.png"))) <= {1, 2}
    image = labelled / "images/validation/0.jpg"
    text = run("segmentation", "predict.py", config, checkpoint, image, "--out", tmp_path / "drawn")
    assert f"{image}: " in text
    assert " %; drawn in " in text

    from tools.app_dense import load_dense_predictor

    answer = load_dense_predictor(str(config), str(checkpoint), torch.device("cpu"), None).predict(Image.open(image))
    assert sum(row.share for row in answer.rows) == pytest.approx(1)
    monkeypatch.chdir(tmp_path)
    line = refusal(segmentation.test.main, "test", [config, checkpoint, "--eval", "mIoU", "--aug-test"], capsys)
    assert "--aug-test: model.decode_head.out_channels=1" in line


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def always_second(path: Path) -> Path:
    """Let a segmentor predict its second class everywhere."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["decode_head.conv_seg.weight"].zero_()
    checkpoint["state_dict"]["decode_head.conv_seg.bias"].copy_(torch.tensor([0.0, 9.0]))
    torch.save(checkpoint, path)
    return path


def ious(text: str, names: tuple[str, ...]) -> dict[str, str]:
    """IoU of each class in mmseg's table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[1]: row[2] for row in rows if row[1] in names}


def test_segmentor_with_classes_in_another_order(labelled, tmp_path):
    """Figures are those of their names, and labels are written in the data set's numbering."""
    names = ("ground", "square")
    usual = child(tmp_path / "usual.py", LABELLED, labelled, names)
    checkpoint = always_second(save_model(usual, tmp_path / "a.pth"))
    # The same data, whose label maps number the classes the other way round.
    turned_data = write_labelled(tmp_path / "turned")
    for path in turned_data.glob("annotations/*/*.png"):
        Image.fromarray(3 - np.asarray(Image.open(path))).save(path)
    turned = child(tmp_path / "turned.py", LABELLED, turned_data, names[::-1])
    found, labels = [], []
    for config in (usual, turned):
        out = tmp_path / f"out_{config.stem}"
        text = run(
            "segmentation",
            "test.py",
            config,
            checkpoint,
            "--eval",
            "mIoU",
            "--out",
            out,
            "--work-dir",
            tmp_path / "work",
            "--cfg-options",
            *OPTIONS,
        )
        found.append(ious(text, names))
        labels.append(set(np.unique(Image.open(out / "0.png"))))
        assert ("they are matched by name" in text) == (config == turned)
    assert found[0] == found[1]
    assert found[0]["ground"] == "0.0"
    assert float(found[0]["square"]) > 5
    assert labels == [{2}, {1}]


def test_detector_with_classes_in_another_order(boxed, tmp_path):
    """Detections get the categories of their names."""
    checkpoint, results = None, []
    for number, names in enumerate((("cat", "dog"), ("dog", "cat"))):
        config = child(tmp_path / f"{number}.py", BOXED, boxed, names)
        checkpoint = checkpoint or save_model(config, tmp_path / "a.pth")
        work = tmp_path / f"work{number}"
        text = run(
            "detection",
            "test.py",
            config,
            checkpoint,
            "--format-only",
            "--work-dir",
            work,
            "--cfg-options",
            *OPTIONS,
            "model.test_cfg.rcnn.score_thr=0",
        )
        results.append(json.loads((work / "results.bbox.json").read_text()))
        assert ("they are matched by name" in text) == (number == 1)
    assert results[0] == results[1]
    assert {one["category_id"] for one in results[0]} == {3, 7}


OTHER = ("road", "sky")


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_other_classes_are_refused(task, labelled, boxed, tmp_path, capsys, monkeypatch):
    """In evaluation, and for resuming. The line has the way out."""
    monkeypatch.chdir(tmp_path)
    if task == "segmentation":
        base, root, names = LABELLED, labelled, ("ground", "square")
    else:
        base, root, names = BOXED, boxed, ("cat", "dog")
    config = child(tmp_path / "own.py", base, root, names)
    checkpoint = torch.load(save_model(config, tmp_path / "a.pth"), weights_only=True)
    checkpoint["meta"] |= dict(dataset_meta=dict(classes=(names[0], "sky")), iter=1, epoch=0)
    torch.save({**checkpoint, "optimizer": {}, "message_hub": {}}, tmp_path / "a.pth")
    test = dict(segmentation=segmentation.test.main, detection=detection.test.main)[task]
    line = refusal(test, "test", [config, tmp_path / "a.pth", "--work-dir", "new"], capsys)
    assert "2 names differ (" in line
    assert "metainfo = dict(classes=" in line
    train = [config, "--resume", tmp_path / "a.pth", "--work-dir", "new"]
    line = refusal(lambda arguments: run_training(build_train_parser(""), arguments), "train", train, capsys)
    assert line.startswith(f"train.py: --resume {tmp_path}/a.pth: ")
    assert "2 names differ (" in line
    assert not (tmp_path / "new").exists()


def test_a_run_resumes_with_its_classes_in_another_order(labelled, tmp_path):
    """It trains on the labels that it started with."""
    names = ("ground", "square")
    options = ("--cfg-options", *OPTIONS, "train_cfg.val_interval=9", "default_hooks.checkpoint.interval=1")
    usual = child(tmp_path / "usual.py", LABELLED, labelled, names)
    turned_data = write_labelled(tmp_path / "turned")
    for path in turned_data.glob("annotations/*/*.png"):
        Image.fromarray(3 - np.asarray(Image.open(path))).save(path)
    turned = child(tmp_path / "turned.py", LABELLED, turned_data, names[::-1])
    start = ("--from-scratch", "--work-dir", tmp_path / "run", *options)
    run("segmentation", "train.py", usual, *start, "train_cfg.max_iters=2")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other/iter_2.pth").unlink()
    resumed = ("--auto-resume", "--work-dir", tmp_path / "other", *options, "train_cfg.max_iters=2")
    text = run("segmentation", "train.py", turned, *resumed)
    assert "matched by name" in text
    ends = [read_checkpoint(str(tmp_path / name / "iter_2.pth"), name) for name in ("run", "other")]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    assert ends[1]["meta"]["dataset_meta"]["classes"] == names


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_starting_weights_of_other_classes(task, labelled, boxed, tmp_path):
    """What depends on the classes stays fresh, also if there are as many."""
    if task == "segmentation":
        base, root, names = LABELLED, labelled, ("ground", "square")
        depending = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    else:
        base, root, names = BOXED, boxed, ("cat", "dog")
        depending = {
            "roi_head.bbox_head.fc_cls.weight",
            "roi_head.bbox_head.fc_cls.bias",
            "roi_head.bbox_head.fc_reg.weight",
            "roi_head.bbox_head.fc_reg.bias",
            "roi_head.mask_head.conv_logits.weight",
            "roi_head.mask_head.conv_logits.bias",
        }
    config = child(tmp_path / "own.py", base, root, names)
    args = build_train_parser("").parse_args([str(config), "--load-from", str(tmp_path / "a.pth")])
    cfg = read_config(args)
    checkpoint = torch.load(save_model(config, tmp_path / "a.pth"), weights_only=True)
    held = {names: set(), OTHER: depending, None: set()}
    for classes, missing in held.items():
        meta = dict(dataset_meta=dict(classes=classes)) if classes else {}
        torch.save(dict(checkpoint, meta=meta), tmp_path / "a.pth")
        cfg.load_from = str(tmp_path / "a.pth")
        kept = read_starting_weights(cfg, "--load-from")["state_dict"]
        assert checkpoint["state_dict"].keys() - kept.keys() == missing


def test_names_in_another_unicode_form_are_the_same(labelled, tmp_path):
    composed, decomposed = ("sol", "carr\u00e9"), ("sol", "carre\u0301")
    config = child(tmp_path / "own.py", LABELLED, labelled, decomposed)
    cfg = read_config(Namespace(config=str(config), cfg_options={}))
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=composed)))
    assert not has_other_classes(cfg, checkpoint, "test_dataloader")
    match_classes(cfg, checkpoint, "CHECKPOINT a.pth", ["test_dataloader"])
    assert cfg.test_dataloader.dataset.metainfo.classes == composed
    assert not has_step(cfg.test_dataloader.dataset, "LoadAnnotations", label_map=[0, 1])


def test_some_of_ade20ks_classes_in_another_order(tmp_path):
    """mmseg numbers them by its own names."""
    base = ROOT / "segmentation/configs/fpn_sepvit_t_512x512_80k_ade20k.py"
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = {str(base)!r}\n")
    cfg = read_config(Namespace(config=str(config), cfg_options={}))
    node = cfg.test_dataloader.dataset
    node.metainfo = dict(classes=("sky", "wall"))
    match_classes(
        cfg, dict(meta=dict(dataset_meta=dict(classes=("wall", "sky")))), "CHECKPOINT a.pth", ["test_dataloader"]
    )
    assert node.metainfo.classes == ("wall", "sky")
    label_map = mmseg.registry.DATASETS.build({**node, "lazy_init": True, "pipeline": []}).label_map
    assert (label_map[0], label_map[2], label_map[1]) == (0, 1, 255)
