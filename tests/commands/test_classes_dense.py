"""Classes of segmentation and detection: heads with one channel, and checkpoints whose classes are compared by name."""

import json
import shutil
from pathlib import Path

import mmseg.registry
import numpy as np
import pytest
import torch
from conftest import refusal
from dense_data import BOXED, LABELLED, NAMES, own_config, read, save_model, write_boxed, write_labelled
from PIL import Image

import detection.test
import segmentation.predict
import segmentation.test
from sepvit_lib.mm.check_classes import match_classes
from sepvit_lib.mm.commands.predict import build_inference_model
from sepvit_lib.mm.commands.train import build_train_parser, read_starting_weights, run_training
from sepvit_lib.mm.mmengine_private import read_checkpoint

OPTIONS = (
    "--cfg-options train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0 "
    "train_dataloader.batch_size=2 default_hooks.logger.interval=1"
).split()


COMMANDS = {
    "train": lambda arguments: run_training(build_train_parser(""), arguments),
    "test": segmentation.test.main,
    "predict": segmentation.predict.main,
    "detection": detection.test.main,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[Path, Path]:
    """Both data sets, and as "turned" the labelled one whose label maps number the classes the other way round."""
    folder = tmp_path_factory.mktemp("data")
    turned = write_labelled(folder / "turned")
    for path in turned.glob("annotations/*/*.png"):
        Image.fromarray(3 - np.asarray(Image.open(path))).save(path)
    return {LABELLED: write_labelled(folder / "labelled"), BOXED: write_boxed(folder / "boxed"), Path("turned"): turned}


@pytest.fixture
def run(capsys):
    """Run a command in this process. Returns what it printed."""

    def succeed(name: str, *arguments: object) -> str:
        capsys.readouterr()
        assert COMMANDS[name](list(map(str, arguments))) == 0
        return capsys.readouterr().out

    return succeed


ONE_CHANNEL = """
model = dict(decode_head=dict(num_classes=2, out_channels=1, threshold=0.5,
                              loss_decode=dict(use_sigmoid=True, class_weight=None)))
"""


def test_binary_segmentation_with_one_channel(roots, tmp_path, run, capsys):
    """mmseg advises it, and gives its labels as floats."""
    config = own_config(tmp_path / "binary.py", LABELLED, roots[LABELLED], rest=ONE_CHANNEL)
    short = [*OPTIONS, "train_cfg.max_iters=1", "train_cfg.val_interval=1"]
    run("train", config, "--from-scratch", "--work-dir", tmp_path / "run", *short)
    checkpoint, out = tmp_path / "run/iter_1.pth", ["--out", tmp_path / "out", "--show-dir", tmp_path / "shown"]
    assert "mIoU" in run("test", config, checkpoint, "--eval", "mIoU", *out, "--work-dir", tmp_path / "work", *OPTIONS)
    assert sorted(path.name for path in (tmp_path / "shown").iterdir()) == ["0.png", "1.png"]
    assert set(np.unique(Image.open(tmp_path / "out/0.png"))) <= {1, 2}
    image = roots[LABELLED] / "images/validation/0.jpg"
    assert " %; drawn in " in run("predict", config, checkpoint, image, "--out", tmp_path / "drawn")

    from tools.page.dense import load_dense_predictor

    answer = load_dense_predictor(str(config), str(checkpoint), torch.device("cpu"), None).predict(Image.open(image))
    assert sum(row.share for row in answer.rows) == pytest.approx(1)
    line = refusal(segmentation.test.main, "test", [config, checkpoint, "--eval", "mIoU", "--aug-test"], capsys)
    assert "--aug-test: model.decode_head.out_channels=1" in line


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_segmentor_with_classes_in_another_order(roots, tmp_path, run):
    """Figures are those of their names, and labels are written in the data set's numbering."""
    names = NAMES[LABELLED]
    usual = own_config(tmp_path / "usual.py", LABELLED, roots[LABELLED])
    turned = own_config(tmp_path / "turned.py", LABELLED, roots[Path("turned")], names[::-1])
    checkpoint = torch.load(save_model(usual, tmp_path / "a.pth"), weights_only=True)
    checkpoint["state_dict"]["decode_head.conv_seg.weight"].zero_()  # the second class everywhere
    checkpoint["state_dict"]["decode_head.conv_seg.bias"].copy_(torch.tensor([0.0, 9.0]))
    torch.save(checkpoint, tmp_path / "a.pth")
    found, labels = [], []
    for config in (usual, turned):
        out = ["--out", tmp_path / f"out_{config.stem}", "--work-dir", tmp_path / "work"]
        text = run("test", config, tmp_path / "a.pth", "--eval", "mIoU", *out, *OPTIONS)
        rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
        found.append({row[1]: float(row[2]) for row in rows if row[1] in names})
        labels.append(set(np.unique(Image.open(tmp_path / f"out_{config.stem}/0.png"))))
        assert ("matched by name" in text) == (config == turned)
    assert found[0] == found[1]
    assert found[0]["ground"] == 0
    assert found[0]["square"] > 5
    assert labels == [{2}, {1}]


def test_detector_with_classes_in_another_order(roots, tmp_path, run):
    """Detections get the categories of their names."""
    checkpoint, results = None, []
    for number, names in enumerate((("cat", "dog"), ("dog", "cat"))):
        config = own_config(tmp_path / f"{number}.py", BOXED, roots[BOXED], names)
        checkpoint = checkpoint or save_model(config, tmp_path / "a.pth")
        flags = ["--format-only", "--work-dir", tmp_path / f"work{number}", *OPTIONS]
        text = run("detection", config, checkpoint, *flags, "model.test_cfg.rcnn.score_thr=0")
        results.append(json.loads((tmp_path / f"work{number}/results.bbox.json").read_text()))
        assert ("matched by name" in text) == (number == 1)
    assert results[0] == results[1]
    assert {one["category_id"] for one in results[0]} == {3, 7}


@pytest.mark.parametrize(("base", "test"), [(LABELLED, "test"), (BOXED, "detection")])
def test_other_classes_are_refused(base, test, roots, tmp_path, capsys):
    """In evaluation, and for resuming. The line has the way out."""
    config = own_config(tmp_path / "own.py", base, roots[base])
    checkpoint = torch.load(save_model(config, tmp_path / "a.pth"), weights_only=True)
    checkpoint["meta"] |= dict(dataset_meta=dict(classes=(NAMES[base][0], "sky")), iter=1, epoch=0)
    torch.save({**checkpoint, "optimizer": {}, "message_hub": {}}, tmp_path / "a.pth")
    work = ["--work-dir", tmp_path / "new"]
    line = refusal(COMMANDS[test], "test", [config, tmp_path / "a.pth", *work], capsys)
    assert "2 names differ (" in line
    assert "metainfo = dict(classes=" in line
    line = refusal(COMMANDS["train"], "train", [config, "--resume", tmp_path / "a.pth", *work], capsys)
    assert line.startswith(f"train.py: --resume {tmp_path}/a.pth: ")
    assert "2 names differ (" in line
    assert not (tmp_path / "new").exists()


def test_a_run_resumes_with_its_classes_in_another_order(roots, tmp_path, run):
    """It trains on the labels that it started with."""
    options = [*OPTIONS, "train_cfg.val_interval=9", "default_hooks.checkpoint.interval=1", "train_cfg.max_iters=2"]
    usual = own_config(tmp_path / "usual.py", LABELLED, roots[LABELLED])
    turned = own_config(tmp_path / "turned.py", LABELLED, roots[Path("turned")], NAMES[LABELLED][::-1])
    run("train", usual, "--from-scratch", "--work-dir", tmp_path / "run", *options)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other/iter_2.pth").unlink()
    assert "matched by name" in run("train", turned, "--auto-resume", "--work-dir", tmp_path / "other", *options)
    ends = [read_checkpoint(str(tmp_path / name / "iter_2.pth"), name) for name in ("run", "other")]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    assert ends[1]["meta"]["dataset_meta"]["classes"] == NAMES[LABELLED]


DEPENDING = {
    LABELLED: {"decode_head.conv_seg"},
    BOXED: {"roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"},
}


@pytest.mark.parametrize("base", [LABELLED, BOXED], ids=["segmentation", "detection"])
def test_starting_weights_of_other_classes(base, roots, tmp_path):
    """What depends on the classes stays fresh, also if there are as many."""
    cfg = read(config := own_config(tmp_path / "own.py", base, roots[base]))
    checkpoint = torch.load(save_model(config, tmp_path / "a.pth"), weights_only=True)
    for classes, missing in ((NAMES[base], set()), (("road", "sky"), DEPENDING[base]), (None, set())):
        meta = dict(dataset_meta=dict(classes=classes)) if classes else {}
        torch.save(dict(checkpoint, meta=meta), tmp_path / "a.pth")
        cfg.load_from = str(tmp_path / "a.pth")
        kept = read_starting_weights(cfg, "--load-from")["state_dict"]
        assert checkpoint["state_dict"].keys() - kept.keys() == {
            f"{name}.{kind}" for name in missing for kind in ("weight", "bias")
        }


def test_colours_of_a_checkpoint_without_any(roots, tmp_path):
    """mmseg chooses those of a data set without a palette."""
    cfg = read(config := own_config(tmp_path / "own.py", LABELLED, roots[LABELLED]))
    save_model(config, tmp_path / "a.pth")
    model = build_inference_model(cfg, str(tmp_path / "a.pth"), "CONFIG")
    assert (model.dataset_meta["classes"], len(model.dataset_meta["palette"])) == (NAMES[LABELLED], 2)


def test_some_of_ade20ks_classes_in_another_order():
    """mmseg numbers them by its own names."""
    cfg = read(LABELLED.parent / "fpn_sepvit_t_512x512_80k_ade20k.py")
    node = cfg.test_dataloader.dataset
    node.metainfo = dict(classes=("sky", "wall"))
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=("wall", "sky"))))
    match_classes(cfg, checkpoint, "CHECKPOINT a.pth", ["test_dataloader"])
    assert node.metainfo.classes == ("wall", "sky")
    label_map = mmseg.registry.DATASETS.build({**node, "lazy_init": True, "pipeline": []}).label_map
    assert (label_map[0], label_map[2], label_map[1]) == (0, 1, 255)
