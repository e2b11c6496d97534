"""Class weights of segmentation and detection: counts, losses, refusals, and runs that resume with them."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refusal
from dense_data import BOXED, LABELLED, NAMES, own_config, read, write_boxed, write_labelled
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

import segmentation.test
from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.class_weights import WEIGHTED, set_class_weights, weight_classes
from sepvit_lib.mm.commands.train import build_train_parser, run_training
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.mm.training_run import DenseNames, settings_of

TRAIN = partial(run_training, build_train_parser(""))
WRITERS = {LABELLED: write_labelled, BOXED: write_boxed}
RETINANET = ROOT / "detection/configs/retinanet_sepvit_t_fpn_1x_coco_pvt_setting.py"
UPERNET = ROOT / "segmentation/configs/upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"


@pytest.fixture
def own(tmp_path):
    """Write a data set and the config of a demo for it. Returns the config's path."""
    return lambda base, **others: own_config(
        tmp_path / f"{base.stem}.py", base, WRITERS[base](tmp_path / base.stem), **others
    )


# ----------------------------------------------------------------------------------------------------------------------
# Counts
# ----------------------------------------------------------------------------------------------------------------------


def balanced(*counts: int) -> list[float]:
    return [sum(counts) / (len(counts) * count) for count in counts]


@pytest.mark.parametrize("ignored", [255, 0])
def test_pixels_are_counted(ignored, own, tmp_path):
    """But not ignored ones, those of the background, and those of an unreadable label map."""
    classes = ("a", "b", "c")
    rest = f"model = dict(decode_head=dict(num_classes=3, ignore_index={ignored}))" if ignored != 255 else ""
    cfg = read(own(LABELLED, names=classes, rest=rest))
    rng, counts = np.random.default_rng(0), np.zeros(256, np.int64)
    for path in (tmp_path / LABELLED.stem / "annotations/training").iterdir():
        stored = rng.choice((1, 2, 3) if ignored != 255 else (0, 1, 2, 3, 255), (80, 96)).astype(np.uint8)
        Image.fromarray(stored).save(path)
        counts += np.bincount(stored.ravel(), minlength=256)
    path.write_bytes(b"")
    counts -= np.bincount(stored.ravel(), minlength=256)
    weight_classes("balanced", cfg)
    found = cfg.model.decode_head.loss_decode.class_weight
    if ignored == 255:
        assert found == balanced(*counts[1:4].tolist())
    else:  # the first class has no pixel
        total = int(counts[2:4].sum())
        assert found == [1.0, *(total / (3 * count) for count in counts[2:4].tolist())]


def test_label_maps_of_some_classes(own):
    """mmseg renumbers labels by name."""
    names = ("square", "ground")
    cfg = read(own(LABELLED, names=names))
    for node in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
        node.pipeline[1].label_map = [1, 0]
    weight_classes("balanced", cfg)
    square, ground = 6 * 30 * 30, 6 * (80 * 96 - 30 * 30)
    assert cfg.model.decode_head.loss_decode.class_weight == balanced(square, ground)


def test_objects_are_counted(own, tmp_path):
    """But not crowds, those without extent or mask, those of other categories, and those of images out of use."""
    cfg = read(own(BOXED))
    path = tmp_path / BOXED.stem / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    mark = content["annotations"][0] | dict(category_id=3)
    changes = [{}, {}, dict(iscrowd=1), dict(bbox=[1, 1, 0, 9]), dict(segmentation=[[]]), dict(category_id=9)]
    content["annotations"] += [mark | dict(id=50 + number) | change for number, change in enumerate(changes)]
    content["categories"].append(dict(id=9, name="cow"))
    path.write_text(json.dumps(content))
    weight_classes("balanced", cfg)
    assert cfg.model.roi_head.bbox_head.loss_cls.class_weight == [*balanced(5, 3), 1.0]
    assert "class_weight" not in cfg.model.roi_head.mask_head.loss_mask


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-20, 20), min_size=3 * 12, max_size=3 * 12).map(lambda x: torch.tensor(x).view(2, 3, 2, 3))
LABELS = st.lists(st.sampled_from([0, 1, 2, 255]), min_size=12, max_size=12).map(
    lambda x: torch.tensor(x).view(2, 2, 3)
)
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


def loss_of(**settings: object) -> torch.nn.Module:
    init_default_scope("mmseg")
    return MODELS.build(settings)


@given(LOGITS, LABELS, WEIGHTS, st.booleans())
def test_loss_of_pixels(logits, labels, weights, is_partial):
    """The sum of the weighted losses, divided as without weights: by all pixels, or by those that are not ignored."""
    kept, known = labels != 255, labels.clamp(max=2)
    total = (F.cross_entropy(logits, known, reduction="none") * torch.tensor(weights)[known])[kept].sum()
    expected = 0.4 * total / (max(1, kept.sum()) if is_partial else 12)
    settings = dict(avg_non_ignore=is_partial, loss_weight=0.4)
    weighted, equal = (loss_of(type=WEIGHTED, class_weight=one, **settings) for one in (weights, [1.0] * 3))
    torch.testing.assert_close(weighted(logits, labels, weight=None, ignore_index=255), expected)
    usual = loss_of(type="CrossEntropyLoss", **settings)
    assert equal(logits, labels, ignore_index=255) == usual(logits, labels, ignore_index=255)


def test_weights_beyond_float16():
    loss = loss_of(type=WEIGHTED, class_weight=[1.0, 1e6])
    assert loss(torch.zeros(1, 2, 1, 1).half(), torch.tensor([[[1]]])).item() == pytest.approx(1e6 * np.log(2))


def test_loss_of_boxes(own):
    """Of Mask R-CNN. The background, the last class, has weight 1, and ignored samples do not count."""
    cfg = read(own(BOXED))
    set_class_weights(cfg, dict(cat=0.3, dog=4.0))
    head = MODELS.build(cfg.model.roi_head.bbox_head)
    torch.manual_seed(0)
    labels, used, logits = torch.tensor([0, 1, 2, 1, 2]), torch.tensor([1.0, 1, 1, 0, 1]), torch.randn(5, 3)
    losses = F.cross_entropy(logits, labels, reduction="none") * torch.tensor([0.3, 4.0, 1.0])[labels]
    boxes = torch.zeros(5, 4)
    loss = head.loss(logits, None, boxes, labels, used, boxes, boxes)["loss_cls"]
    torch.testing.assert_close(loss, (losses * used).sum() / 4)


def test_all_heads_have_the_weights(tmp_path):
    """Also several losses of a head."""
    cfg, names = read(UPERNET), ("ground", "square")
    cfg.train_dataloader.dataset.metainfo = dict(classes=names)
    auxiliary = cfg.model.auxiliary_head
    auxiliary.loss_decode = [auxiliary.loss_decode, dict(type="CrossEntropyLoss", loss_name="loss_other")]
    set_class_weights(cfg, dict(square=3.0, ground=0.5))
    for loss in (cfg.model.decode_head.loss_decode, *auxiliary.loss_decode):
        assert (loss.type, loss.class_weight) == (WEIGHTED, [0.5, 3.0])
    assert auxiliary.loss_decode[0].loss_weight == 0.4


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------

UNFIT = {
    "loss_decode=dict(use_sigmoid=True)": "loss_decode use_sigmoid=True",
    "loss_decode=dict(_delete_=True, type='DiceLoss')": "loss_decode type=DiceLoss",
    "loss_decode=[dict(type='CrossEntropyLoss'), dict(type='FocalLoss')]": "loss_decode type=FocalLoss",
    "loss_cls=dict(type='mmdet.CrossEntropyLoss')": "loss_cls type=mmdet.CrossEntropyLoss",
}


@pytest.mark.parametrize("loss", UNFIT)
def test_losses_without_class_weights(loss, own, tmp_path, capsys):
    config = own(LABELLED, rest=f"model = dict(decode_head=dict(num_classes=2, {loss}))")
    arguments = [config, "--from-scratch", "--work-dir", tmp_path / "run", "--class-weights", "balanced"]
    line = refusal(TRAIN, "train", arguments, capsys)
    key, setting = UNFIT[loss].split()
    assert f"--class-weights: not available with model.decode_head.{key} " in line
    assert setting in line
    assert not (tmp_path / "run").exists()


DETECTORS = {
    "model.bbox_head.loss_cls` type=FocalLoss": {},
    "model.bbox_head.loss_cls`;": dict(bbox_head=dict(type="SSDHead")),
    "model.loss_cls`;": dict(bbox_head=None, panoptic_head=dict(type="Mask2FormerHead")),
}


@pytest.mark.parametrize("words", DETECTORS)
def test_detectors_without_class_weights(words):
    cfg = read(RETINANET)
    for key, head in DETECTORS[words].items():
        cfg.model[key] = head
    with pytest.raises(UserError) as raised:
        weight_classes("balanced", cfg)
    assert f"`class_weights`: not available with `{words}" in str(raised.value)


@pytest.mark.parametrize("base", WRITERS)
def test_files_of_other_classes(base, own, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({NAMES[base][0]: 1, "sky": 2}))
    with pytest.raises(UserError, match=f"no positive .* for {NAMES[base][1]}"):
        weight_classes(str(path), read(own(base)))


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

OPTIONS = (
    "--cfg-options train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0 "
    "train_dataloader.batch_size=2 default_hooks.logger.interval=1 default_hooks.checkpoint.interval=1"
).split()
LENGTHS = {LABELLED: ["train_cfg.max_iters=3", "train_cfg.val_interval=9"], BOXED: ["train_cfg.max_epochs=2"]}


def run(arguments: list[object]) -> None:
    assert TRAIN(list(map(str, arguments))) == 0


@pytest.mark.parametrize("base", WRITERS)
def test_runs_resume_with_the_weights_that_they_started_with(base, own, tmp_path, capsys):
    """Also with classes in another order. Other weights are noticed."""
    one, two = NAMES[base]
    weights = tmp_path / "weights.json"
    usual, turned = own(base), tmp_path / "turned.py"
    root = shutil.copytree(tmp_path / base.stem, tmp_path / "turned")
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(3 - np.asarray(Image.open(path))).save(path)
    own_config(turned, base, root, (two, one))

    def train(config: Path, name: str) -> list[object]:
        flags = ["--no-validate", "--auto-resume", "--from-scratch", "--class-weights", weights]
        return [config, "--work-dir", tmp_path / name, *flags, *OPTIONS, *LENGTHS[base]]

    weights.write_text(json.dumps({one: 0.3, two: 4}))
    run(train(usual, "whole"))
    last, *_, first = DenseNames(0, 9, -1).numbered(tmp_path / "whole")
    (tmp_path / "resumed").mkdir()
    shutil.copy(first, tmp_path / "resumed")
    weights.write_text(json.dumps({one: 0.3, two: 5}))
    capsys.readouterr()
    line = refusal(TRAIN, "train", train(usual, "resumed"), capsys)
    assert "class_weight.1 5.0 (was 4.0)" in line
    weights.write_text(json.dumps({two: 4.0, one: 0.3}))
    run(train(turned, "resumed"))
    whole, resumed = (read_checkpoint(str(tmp_path / name / last.name), name) for name in ("whole", "resumed"))
    assert whole["args"] == resumed["args"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for choice in ("", "balanced"):
        cfg = read(usual)
        if choice:
            weight_classes(choice, cfg)
        found, key = settings_of(cfg), "loss_cls" if base == BOXED else "loss_decode"
        assert any(found.get(name) != value for name, value in whole["args"].items() if f"{key}.class_weight" in name)


def test_the_config_that_a_run_writes_is_tested(own, tmp_path, capsys):
    """Its losses have the weights, and it trains on with them."""
    folder = tmp_path / "run"
    options = [*OPTIONS, "train_cfg.max_iters=1", "train_cfg.val_interval=9"]
    train = [own(LABELLED), "--from-scratch", "--work-dir", folder, "--class-weights", "balanced", *options]
    run(train)
    config = folder / f"{LABELLED.stem}.py"
    assert len(read(config).model.decode_head.loss_decode.class_weight) == 2
    test = [config, folder / "iter_1.pth", "--eval", "mIoU", "--work-dir", tmp_path / "test", *OPTIONS]
    assert segmentation.test.main(list(map(str, test))) == 0
    capsys.readouterr()
    run([config, "--auto-resume", "--work-dir", folder, *options])
    assert "is complete" in capsys.readouterr().out
