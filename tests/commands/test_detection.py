"""Detection: the configs number by number, and the commands on scenes of digits."""

import json
import pickle
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from conftest import ROOT, Code, free_port, optimizer_groups, refusal, shell, succeed, undecayed_names
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

import detection.predict
import detection.test
from sepvit_lib.dense.mmengine_adapter import read_checkpoint
from sepvit_lib.dense.runner import DenseRunner
from sepvit_lib.dense.settings import read_config
from sepvit_lib.dense.train import build_train_parser, run_training

CONFIGS = ROOT / "detection/configs"
DEMO = CONFIGS / "mask_rcnn_sepvit_lite_fpn_demo.py"
script = partial(shell, "detection")
VARIANTS = {  # name, embedding dims, depths, drop path rate, weight decay at 1x and 3x
    "t": ("SepViT_Tiny", (96, 192, 384, 768), (1, 2, 6, 2), 0.2, 1e-3, 0.05),
    "s": ("SepViT_Small", (96, 192, 384, 768), (1, 2, 14, 2), 0.3, 1e-4, 0.1),
    "b": ("SepViT_Base", (128, 256, 512, 1024), (1, 2, 14, 2), 0.5, 1e-4, 0.1),
}
NAMES = {
    ("retinanet", 1): "retinanet_sepvit_{}_fpn_1x_coco_pvt_setting",
    ("retinanet", 3): "retinanet_sepvit_{}_fpn_3x_ms_coco",
    ("mask_rcnn", 1): "mask_rcnn_sepvit_{}_fpn_1x_coco_pvt_setting",
    ("mask_rcnn", 3): "mask_rcnn_sepvit_{}_fpn_3x_coco_swin_setting",
}
ALL = [(detector, schedule, variant) for detector, schedule in NAMES for variant in VARIANTS]
# The models of both schedules are alike. Building the larger ones takes long.
BUILT = [pytest.param(*one, marks=pytest.mark.slow if one[1:] in ((3, "s"), (3, "b")) else ()) for one in ALL]


# ----------------------------------------------------------------------------------------------------------------------
# Configs
# ----------------------------------------------------------------------------------------------------------------------


@cache
def config(detector: str, schedule: int, variant: str) -> Config:
    return Config.fromfile(CONFIGS / f"{NAMES[detector, schedule].format(variant)}.py")


@cache
def model_of(detector: str, schedule: int, variant: str) -> torch.nn.Module:
    init_default_scope("mmdet")
    return MODELS.build(config(detector, schedule, variant).model)


@pytest.mark.parametrize(("detector", "schedule", "variant"), BUILT)
def test_model(detector, schedule, variant):
    cfg, model = config(detector, schedule, variant), model_of(detector, schedule, variant)
    name, dims, depths, drop_path_rate, *_ = VARIANTS[variant]
    backbone, neck = model.backbone, model.neck
    assert type(backbone).__name__ == name
    assert backbone.embed_dims == dims
    assert tuple(map(len, backbone.blocks)) == depths
    assert backbone.blocks[-1][-1].drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert backbone.out_indices == (0, 1, 2, 3)
    assert backbone.init_cfg == dict(type="Pretrained", checkpoint=f"pretrained/{name}.pth")
    assert type(neck).__name__ == "FPN"
    assert neck.in_channels == list(dims)
    assert (neck.out_channels, neck.num_outs) == (256, 5)
    strides = {"retinanet": [8, 16, 32, 64, 128], "mask_rcnn": [4, 8, 16, 32, 64]}[detector]
    if detector == "retinanet":
        assert type(model).__name__ == "RetinaNet"
        assert (neck.start_level, neck.add_extra_convs) == (1, "on_input")
        head = model.bbox_head
        assert head.num_classes == 80
    else:
        assert type(model).__name__ == "MaskRCNN"
        assert neck.start_level == 0
        head = model.rpn_head
        assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 80
    assert [stride for stride, _ in head.prior_generator.strides] == strides
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 128, 256))
    assert [tuple(y.shape) for y in maps] == [(1, 256, max(1, 128 // s), 256 // s) for s in strides]
    assert "find_unused_parameters" not in cfg


@pytest.mark.parametrize(("detector", "schedule", "variant"), ALL)
def test_optimizer(detector, schedule, variant):
    cfg, model = config(detector, schedule, variant), model_of(detector, schedule, variant)
    weight_decay = VARIANTS[variant][4 if schedule == 1 else 5]
    lr = 2e-4 if (detector, schedule) == ("mask_rcnn", 1) else 1e-4
    undecayed = undecayed_names(model) if schedule == 3 else set()
    assert len([name for name in undecayed if ".pos_block." in name]) == (8 if schedule == 3 else 0)
    if schedule == 3:  # only the backbone has norms, and all have the word in their names
        kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)
        norms = {
            f"{where}.{name}"
            for where, module in model.named_modules()
            if isinstance(module, kinds)
            for name, _ in module.named_parameters()
        }
        assert norms == {name for name in undecayed if ".pos_block." not in name}
    for name, group in optimizer_groups(cfg, model).items():
        assert group["weight_decay"] == (0 if name in undecayed else weight_decay), name
        assert (group["lr"], group["betas"]) == (lr, (0.9, 0.999)), name
    mixed = (detector, schedule) == ("mask_rcnn", 3)
    assert cfg.optim_wrapper.type == ("AmpOptimWrapper" if mixed else "OptimWrapper")
    for loop in (cfg.val_cfg, cfg.test_cfg):
        assert loop.get("fp16", False) == mixed


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_loss_scale(variant, monkeypatch):
    """The loss scale stays the same, with finite gradients and with others."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, "GradScaler", partial(torch.amp.GradScaler, device="cpu"))
    layer = torch.nn.Linear(1, 1)
    wrapper = build_optim_wrapper(layer, config("mask_rcnn", 3, variant).optim_wrapper)
    wrapper.loss_scaler.set_growth_interval(1)
    for factor in (1.0, float("inf"), 1.0):
        wrapper.update_params(factor * layer(torch.ones(1, 1)).sum())
        assert wrapper.loss_scaler.get_scale() == 512


@pytest.mark.parametrize(("detector", "schedule", "variant"), ALL)
def test_schedule(detector, schedule, variant):
    cfg = config(detector, schedule, variant)
    epochs, steps = {1: (12, (8, 11)), 3: (36, (27, 33))}[schedule]
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", epochs)
    per_epoch = 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        (setting.by_epoch, PARAM_SCHEDULERS.build(dict(setting), default_args=dict(optimizer=optimizer)))
        for setting in cfg.param_scheduler
    ]
    rates = []
    for i in range(epochs * per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        for by_epoch, scheduler in schedulers:
            if not by_epoch or (i + 1) % per_epoch == 0:
                scheduler.step()
    warm_up = np.minimum(1, 0.001 + 0.999 * np.arange(epochs * per_epoch) / 499)
    epoch = np.arange(epochs * per_epoch) // per_epoch
    expected = warm_up * 0.1 ** ((epoch >= steps[0]).astype(int) + (epoch >= steps[1]))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(("detector", "schedule", "variant"), ALL)
def test_data(detector, schedule, variant):
    cfg = config(detector, schedule, variant)
    loader = cfg.train_dataloader
    assert loader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert (loader.dataset.type, loader.dataset.data_root) == ("CocoDataset", "data/coco/")
    assert loader.dataset.data_prefix == dict(img="train2017/")
    init_default_scope("mmdet")
    steps = {step["type"]: TRANSFORMS.build(step) for step in loader.dataset.pipeline}
    assert steps["LoadAnnotations"].with_mask == (detector == "mask_rcnn")
    assert steps["RandomFlip"].prob == 0.5
    if schedule == 1:
        assert steps["Resize"].scale == (1333, 800)
        assert "RandomChoice" not in steps
    else:
        assert "Resize" not in steps
        scales = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
        plain, cropped = (branch.transforms for branch in steps["RandomChoice"].transforms)
        assert [list(step.scales) for step in plain] == [scales]
        assert list(cropped[0].scales) == [(400, 1333), (500, 1333), (600, 1333)]
        assert (cropped[1].crop_type, cropped[1].crop_size) == ("absolute_range", (384, 600))
        assert cropped[1].allow_negative_crop
        assert list(cropped[2].scales) == scales
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        test_steps = {step["type"]: TRANSFORMS.build(step) for step in loader.dataset.pipeline}
        assert test_steps["Resize"].scale == (1333, 800)
    assert cfg.test_evaluator.metric == (["bbox", "segm"] if detector == "mask_rcnn" else "bbox")


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_every_parameter_gets_a_gradient(detector):
    """Data parallelism therefore needs no find_unused_parameters."""
    from mmdet.testing import demo_mm_inputs

    model = model_of(detector, 1, "t").train()
    data = demo_mm_inputs(2, [[3, 128, 128], [3, 96, 128]], num_classes=80, with_mask=True)
    data = model.data_preprocessor(data, training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------------------------------------------
# Demo data
# ----------------------------------------------------------------------------------------------------------------------


def test_demo_scenes(demo_data):
    """pycocotools reads the scenes. Boxes and masks agree with each other and with the segmentation demo's labels."""
    for name, split, count in (("train2017", "training", 600), ("val2017", "validation", 100)):
        coco = COCO(str(demo_data / f"coco/annotations/instances_{name}.json"))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list("0123456789")
        assert len(coco.getImgIds()) == count
        labels = sorted((demo_data / f"ade/ADEChallengeData2016/annotations/{split}").iterdir())
        for number, label in list(enumerate(labels, start=1))[:25]:
            image = coco.loadImgs(number)[0]
            assert Image.open(demo_data / "coco" / name / image["file_name"]).size == (image["width"], image["height"])
            label, drawn = np.asarray(Image.open(label)), np.zeros((image["height"], image["width"]), dtype=int)
            annotations = coco.loadAnns(coco.getAnnIds(number))
            assert annotations
            for annotation in annotations:
                mask = coco.annToMask(annotation).astype(bool)
                x, y, width, height = annotation["bbox"]
                assert mask.sum() == annotation["area"] == mask[y : y + height, x : x + width].sum()
                assert mask[y].any()
                assert mask[:, x + width - 1].any()
                drawn[mask] = annotation["category_id"]
            np.testing.assert_array_equal(drawn, np.where(label > 10, 0, label))


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(demo_data, tmp_path_factory) -> Path:
    """Eight training and two validation scenes."""
    root = tmp_path_factory.mktemp("scenes") / "with space"
    (root / "annotations").mkdir(parents=True)
    for name, count in (("train2017", 8), ("val2017", 2)):
        (root / name).symlink_to(demo_data / "coco" / name)
        content = json.loads((demo_data / f"coco/annotations/instances_{name}.json").read_text())
        content["images"] = content["images"][:count]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= count]
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


def small(scenes: Path, epochs: int = 1) -> list[str]:
    """Options that make a run small: two iterations per epoch on one process."""
    intervals = "train_cfg.val_interval=1 default_hooks.checkpoint.interval=1 default_hooks.logger.interval=1"
    workers = " ".join(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test"))
    others = f"train_cfg.max_epochs={epochs} {intervals} train_dataloader.batch_size=4 {workers}"
    return ["--cfg-options", f"data_root={scenes}", *others.split()]


def run(name: str, *arguments) -> str:
    return succeed(*arguments, script=f"detection/{name}", cwd=ROOT / "detection")


def figures(text: str) -> list[list[str]]:
    """The last figures of the evaluation, for boxes and for masks."""
    return [re.findall(rf"coco/{kind}_mAP_50: ([\d.-]+)", text)[-1:] for kind in ("bbox", "segm")]


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory) -> Path:
    """A small RetinaNet's config."""
    path = tmp_path_factory.mktemp("retinanet") / "retinanet_demo.py"
    path.write_text(
        f"_base_ = {str(CONFIGS / 'retinanet_sepvit_t_fpn_1x_coco_pvt_setting.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='SepViT_Lite', drop_path_rate=0.1),\n"
        "             neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),\n"
        "             bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=1, num_classes=10))\n"
        "model['test_cfg'] = dict(score_thr=0.0)\n"  # otherwise there is nothing to evaluate
        "scale = dict(type='Resize', scale=(160, 128), keep_ratio=True)\n"
        "meta = dict(classes=tuple('0123456789'))\n"
        "load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), scale]\n"
        "keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')\n"
        "train_dataloader = dict(dataset=dict(metainfo=meta, pipeline=[*load, dict(type='PackDetInputs')]))\n"
        "test = [*load, dict(type='PackDetInputs', meta_keys=keys)]\n"
        "val_dataloader = dict(dataset=dict(metainfo=meta, pipeline=test))\n"
        "test_dataloader = val_dataloader\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """The work dir of a small run of Mask R-CNN."""
    work_dir = tmp_path_factory.mktemp("trained")
    text = run("train.py", DEMO, "--work-dir", work_dir, "--seed", "0", "--auto-scale-lr", *small(scenes))
    assert "SepViT_Lite: randomly initialised, no pretrained weights" in text
    assert "current batch size is 4. Scaling the original LR by 0.25" in text
    assert f": checkpoints and logs are in {work_dir}" in text
    assert all(figures(text))
    return work_dir


def test_resume(trained, scenes, tmp_path):
    options = ["--no-validate", "--amp", "--auto-scale-lr", *small(scenes, 2)]
    text = run("train.py", DEMO, "--work-dir", tmp_path, "--resume", trained / "epoch_1.pth", *options)
    assert "epoch_1.pth: resuming at iteration 3" in text
    assert "Epoch(train) [2][2/2]" in text
    assert "Epoch(val)" not in text
    assert read_checkpoint(str(tmp_path / "epoch_2.pth"), "checkpoint")["meta"]["iter"] == 4


def test_evaluation_detections_and_pictures(trained, scenes, tmp_path):
    out, pictures = tmp_path / "results.pkl", tmp_path / "pictures"
    written = ["--out", out, "--show-dir", pictures, "--show-score-thr", "0.01"]
    options = ["--eval", "mAP", *written, "--work-dir", tmp_path, *small(scenes)]
    text = run("test.py", DEMO, trained / "epoch_1.pth", *options)
    assert all(figures(text))
    results = pickle.loads(out.read_bytes())
    assert [result["img_id"] for result in results] == [1, 2]
    assert {"bboxes", "scores", "labels", "masks"} <= results[0]["pred_instances"].keys()
    assert sorted(path.name for path in pictures.iterdir()) == ["000000000001.jpg", "000000000002.jpg"]
    assert Image.open(pictures / "000000000001.jpg").size == (320, 128)  # truth and detections
    # only write COCO's format
    text = run("test.py", DEMO, trained / "epoch_1.pth", "--format-only", "--work-dir", tmp_path / "f", *small(scenes))
    assert not any(figures(text))
    written = json.loads((tmp_path / "f/results.segm.json").read_text())
    assert all({"image_id", "category_id", "score", "segmentation"} <= entry.keys() for entry in written)
    assert isinstance(json.loads((tmp_path / "f/results.bbox.json").read_text()), list)


def test_half_precision_in_evaluation(scenes, tmp_path):
    """Mask R-CNN 3x evaluates in half precision, here with the demo's sizes. A CPU uses float32 and reports it."""
    path = tmp_path / "lite.py"
    name, own = (str(CONFIGS / f"{NAMES['mask_rcnn', schedule].format('t')}.py") for schedule in (1, 3))
    path.write_text(DEMO.read_text().replace(Path(name).name, own))
    parser = detection.test.build_detection_test_parser()
    options = ["--work-dir", str(tmp_path), *small(scenes), "model.test_cfg.rcnn.max_per_img=5"]
    cfg = read_config(parser.parse_args([str(path), "none.pth", *options]))
    assert (cfg.optim_wrapper.type, cfg.val_cfg.fp16, cfg.test_cfg.fp16) == ("AmpOptimWrapper", True, True)
    runner, types = DenseRunner.from_config(cfg), []
    runner.model.neck.register_forward_hook(lambda _, inputs, maps: types.append({y.dtype for y in maps}))
    assert "coco/segm_mAP" in runner.val()
    assert "coco/segm_mAP" in runner.test()
    has_gpu = torch.cuda.is_available()
    assert types == 4 * [{torch.float16 if has_gpu else torch.float32}]
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert ("half precision: no GPU here, computing in float32" in log) != has_gpu


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_commands_of_the_page_on_two_processes(detector, retinanet, scenes, tmp_path):
    """Train and evaluate with the scripts. The figures are the same as on one process."""
    path, work_dir, port = retinanet if detector == "retinanet" else DEMO, tmp_path / "work dir", {"PORT": free_port()}
    text = script("dist_train.sh", path, 2, "--work-dir", work_dir, *small(scenes), environment=port)
    assert text.count(": checkpoints and logs are in ") == 1
    arguments = [path, work_dir / "epoch_1.pth", "--eval", "mAP", "--work-dir", work_dir, *small(scenes)]
    two = script("dist_test.sh", *arguments[:2], 2, *arguments[2:], environment=port)
    boxes, masks = figures(two)
    assert boxes
    assert bool(masks) == (detector == "mask_rcnn")
    if detector == "retinanet":
        assert figures(run("test.py", *arguments)) == [boxes, masks]


@pytest.mark.slow
@pytest.mark.parametrize(("detector", "schedule"), [("retinanet", 1), ("mask_rcnn", 3)])
def test_paper_configs_on_two_processes(detector, schedule, scenes, tmp_path):
    path, port = f"configs/{NAMES[detector, schedule].format('t')}.py", {"PORT": free_port()}
    from mmdet.datasets import CocoDataset  # looks for mmcv's operators, which the commands above have offered

    # the digits replace the first ten classes of COCO
    categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO["classes"], start=1)]
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / split).symlink_to(scenes / split)
        content = json.loads((scenes / f"annotations/instances_{split}.json").read_text())
        content["categories"] = categories
        (tmp_path / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))
    options = [*small(tmp_path / "coco"), "train_dataloader.batch_size=1"]
    if detector == "retinanet":
        options.append("model.test_cfg.score_thr=0.0")  # otherwise there is nothing to evaluate
    text = script("dist_train.sh", path, 2, "--from-scratch", "--work-dir", tmp_path, *options, environment=port)
    assert "Epoch(val)" in text
    arguments = [path, tmp_path / "epoch_1.pth", 2, "--eval", "mAP", "--work-dir", tmp_path, *options]
    text = script("dist_test.sh", *arguments, environment=port)
    assert figures(text)[0]


@pytest.mark.slow
def test_own_tools_of_mmdet(scenes, tmp_path):
    """mmdet's train.py runs our configs from any folder, without a change of the path."""
    (tmp_path / "scenes").symlink_to(scenes)  # mmdet's options drop spaces, and its data_root does not move the data
    roots = [f"{split}_dataloader.dataset.data_root={tmp_path}/scenes" for split in ("train", "val")]
    annotations = f"val_evaluator.ann_file={tmp_path}/scenes/annotations/instances_val2017.json"
    workers = [f"{split}_dataloader.persistent_workers=False" for split in ("train", "val")]
    script = Path(mmdet.__file__).parent / ".mim/tools/train.py"
    command = [sys.executable, script, DEMO, "--work-dir", tmp_path, *small(""), *roots, annotations, *workers]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(figures(result.stdout))


def test_predict(trained, scenes, tmp_path):
    image = scenes / "val2017/000000000001.jpg"
    text = run("predict.py", DEMO, trained / "epoch_1.pth", image, "--out", tmp_path, "--score-thr", "0.01")
    assert f"{image}: " in text
    assert Image.open(tmp_path / "000000000001.png").size == (320, 256)  # enlarged


def test_get_flops():
    text = run("get_flops.py", DEMO)
    init_default_scope("mmdet")
    parameters = sum(p.numel() for p in MODELS.build(Config.fromfile(DEMO).model).parameters()) / 1e6
    assert f"MaskRCNN, 800 × 1280 pixels: {parameters:.3f} M parameters, " in text


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory) -> Path:
    """Write checkpoints, most of them faulty."""
    root = tmp_path_factory.mktemp("bad")
    checkpoint = read_checkpoint(str(trained / "epoch_1.pth"), "checkpoint")
    torch.save(checkpoint, root / "good.pth")
    torch.save({**checkpoint, "meta": Code(root / "ran")}, root / "code.pth")
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    return root


# Of detection alone; segmentation's tests have the others. GOOD stands for the demo's config and a checkpoint.
MISTAKES = {
    "train {tiny} --cfg-options data_root={scenes}": "no category is named person, bicycle, car, ",
    "test GOOD --eval mIoU": "--eval mIoU: unknown; choose from bbox, segm, mAP",
    "test {tiny} {files}/good.pth --eval segm": "--eval segm: RetinaNet predicts no masks; choose bbox",
    "test GOOD --eval bbox --format-only": "--eval and --format-only: choose one",
    "test GOOD --out a.json": "--out a.json: takes the name of a .pkl file",
    "test GOOD --show": "--show: use --show-dir DIR",
    "test GOOD --show-dir a --show-score-thr 30": "--show-score-thr: 30",
    "test {demo} {files}/code.pth --eval bbox --cfg-options data_root={scenes}": "could run code",
    "test GOOD --eval bbox --cfg-options data_root={files}": "{files}/annotations/instances_val2017.json: no such file",
    "predict {demo} {files}/code.pth {image} --out out": "could run code",
}


RUN = {
    "train": lambda arguments: run_training(build_train_parser(""), arguments),
    "test": detection.test.main,
    "predict": detection.predict.main,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, files, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = CONFIGS / "retinanet_sepvit_t_fpn_1x_coco_pvt_setting.py"
    paths = dict(demo=DEMO, tiny=tiny, files=files, scenes=scenes, image=next((scenes / "val2017").iterdir()))
    line = mistake.replace("GOOD", "{demo} {files}/good.pth")
    command, *arguments = [word.format(**paths) for word in line.split()]
    assert MISTAKES[mistake].format(**paths) in refusal(RUN[command], command, arguments, capsys)
    assert not (files / "ran").exists()
    assert not list(tmp_path.iterdir())
