"""The configs of segmentation and detection, number by number, and the demo's scenes."""

import json
from functools import cache, partial
from typing import Any

import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

from detection.get_flops import samples
from sepvit_lib.count import AMONG, INSIDE, costs_of, count_multiply_adds, total_of

METHODS = {
    "fpn": "segmentation/configs/fpn_sepvit_{}_512x512_80k_ade20k.py",
    "upernet": "segmentation/configs/upernet_sepvit_{}_512x512_160k_ade20k_swin_setting.py",
    "retinanet-1x": "detection/configs/retinanet_sepvit_{}_fpn_1x_coco_pvt_setting.py",
    "retinanet-3x": "detection/configs/retinanet_sepvit_{}_fpn_3x_ms_coco.py",
    "mask_rcnn-1x": "detection/configs/mask_rcnn_sepvit_{}_fpn_1x_coco_pvt_setting.py",
    "mask_rcnn-3x": "detection/configs/mask_rcnn_sepvit_{}_fpn_3x_coco_swin_setting.py",
}
SEGMENTORS, DETECTORS = list(METHODS)[:2], list(METHODS)[2:]
VARIANTS = {  # name, embedding dims, depths, drop path rate
    "t": ("SepViT_Tiny", (96, 192, 384, 768), (1, 2, 6, 2), 0.2),
    "s": ("SepViT_Small", (96, 192, 384, 768), (1, 2, 14, 2), 0.3),
    "b": ("SepViT_Base", (128, 256, 512, 1024), (1, 2, 14, 2), 0.5),
}
OPTIMIZERS = {  # learning rate, weight decay of t, s and b, and whether norms and positional encodings are spared
    "fpn": (1e-4, (1e-4, 1e-4, 1e-4), False),
    "upernet": (6e-5, (0.01, 0.01, 0.03), True),
    "retinanet-1x": (1e-4, (1e-3, 1e-4, 1e-4), False),
    "retinanet-3x": (1e-4, (0.05, 0.1, 0.1), True),
    "mask_rcnn-1x": (2e-4, (1e-3, 1e-4, 1e-4), False),
    "mask_rcnn-3x": (1e-4, (0.05, 0.1, 0.1), True),
}
# The paper's GFLOPs of t, s and b, at 512 × 2048 and 800 × 1280 pixels.
GFLOPS = {"fpn": (181, 244, 367), "upernet": (940, 1003, 1128), "retinanet-1x": (243, 302), "mask_rcnn-1x": (261, 321)}
PER_EPOCH = 1000  # iterations, in the tests of schedules

of_all = pytest.mark.parametrize("method", METHODS)
of_segmentors = pytest.mark.parametrize("method", SEGMENTORS)
of_detectors = pytest.mark.parametrize("method", DETECTORS)
of_variants = pytest.mark.parametrize("variant", VARIANTS)


@cache
def read(method: str, variant: str) -> Config:
    return Config.fromfile(ROOT / METHODS[method].format(variant))


def config(method: str, variant: str) -> Config:
    """A config. The registries of its library are used from here on."""
    init_default_scope("mmseg" if method in SEGMENTORS else "mmdet")
    return read(method, variant)


def built(method: str, variant: str, device: str = "cpu") -> torch.nn.Module:
    models = (mmseg if method in SEGMENTORS else mmdet).registry.MODELS
    with torch.device(device):
        return models.build(config(method, variant).model)


@cache
def model_of(method: str, variant: str) -> torch.nn.Module:
    """The model, without values."""
    return built(method, variant, "meta")


def parameters_of(model: torch.nn.Module, *kinds: type[torch.nn.Module]) -> set[str]:
    """Return the names of the parameters of all modules of some kinds."""
    modules = [(where, module) for where, module in model.named_modules() if isinstance(module, kinds)]
    return {f"{where}.{name}" for where, module in modules for name, _ in module.named_parameters()}


def learning_rates(cfg: Config, iterations: int) -> np.ndarray:
    """Return the learning rate of each iteration, from the built schedule."""
    return stepped(cfg.optim_wrapper.optimizer.lr, json.dumps(cfg.param_scheduler), iterations)


@cache
def stepped(lr: float, settings: str, iterations: int) -> np.ndarray:
    """Step the schedulers with these settings, in JSON, which several configs share."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    build = partial(PARAM_SCHEDULERS.build, default_args=dict(optimizer=optimizer))
    schedulers = [(setting["by_epoch"], build(setting)) for setting in json.loads(settings)]
    rates = np.empty(iterations)
    for i in range(iterations):
        rates[i] = optimizer.param_groups[0]["lr"]
        for by_epoch, scheduler in schedulers:
            if not by_epoch or (i + 1) % PER_EPOCH == 0:
                scheduler.step()
    return rates


def steps_of(pipeline: list) -> dict:
    """The steps of a pipeline, by the names of their classes."""
    return {type(step).__name__: step for step in map(TRANSFORMS.build, pipeline)}


@of_variants
@of_all
def test_backbone(method, variant):
    cfg, model = config(method, variant), model_of(method, variant)
    name, dims, depths, drop_path_rate = VARIANTS[variant]
    assert type(model.backbone).__name__ == name
    assert model.backbone.embed_dims == dims
    assert tuple(map(len, model.backbone.blocks)) == depths
    assert model.backbone.blocks[-1][-1].drop_path.drop_prob == pytest.approx(drop_path_rate)
    assert model.backbone.out_indices == (0, 1, 2, 3)
    assert model.backbone.init_cfg == dict(type="Pretrained", checkpoint=f"pretrained/{name}.pth")
    assert "find_unused_parameters" not in cfg
    assert cfg.train_dataloader.batch_size == 2


@of_variants
@of_all
def test_optimizer(method, variant):
    cfg, model = config(method, variant), model_of(method, variant)
    lr, decays, spares = OPTIMIZERS[method]
    settings = {key: value for key, value in cfg.optim_wrapper.items() if key != "loss_scale"}
    optimizer = build_optim_wrapper(model, {**settings, "type": "OptimWrapper"}).optimizer
    assert type(optimizer) is torch.optim.AdamW
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    undecayed = {name for name, _ in model.named_parameters() if spares and ("norm" in name or "pos_block" in name)}
    for name, parameter in model.named_parameters():
        group = group_of.pop(id(parameter))
        assert group["weight_decay"] == (0 if name in undecayed else decays["tsb".index(variant)]), name
        assert (group["lr"], group["betas"]) == (lr, (0.9, 0.999)), name
    assert not group_of
    if spares:  # all norms have the word in their names, but for UPerNet's batch norms
        positions = {name for name in undecayed if ".pos_block." in name}
        assert len(positions) == 8
        assert undecayed - positions == parameters_of(model, torch.nn.LayerNorm, torch.nn.GroupNorm)
        batch_norms = parameters_of(model, torch.nn.modules.batchnorm._BatchNorm)
        assert len(batch_norms) == (26 if method == "upernet" else 0)
        assert not batch_norms & undecayed


@pytest.mark.parametrize("method", ["fpn", "upernet", "retinanet-1x", "mask_rcnn-1x"])
def test_every_parameter_gets_a_gradient(method):
    """Data parallelism therefore needs no find_unused_parameters."""
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = revert_sync_batchnorm(built(method, "t")).train()
    if method in SEGMENTORS:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 150, (1, 64, 96)))) for _ in range(2)]
        for sample in samples:
            sample.set_metainfo(dict(img_shape=(64, 96)))
        data = dict(inputs=torch.randn(2, 3, 64, 96), data_samples=samples)
    else:
        data = demo_mm_inputs(2, [[3, 128, 128], [3, 96, 128]], num_classes=80, with_mask=True)
        data = model.data_preprocessor(data, training=True)
    model.parse_losses(model(**data, mode="loss"))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


COUNTED: list[Any] = [(name, v) for name in GFLOPS for v in "tsb"[: len(GFLOPS[name])]]
COUNTED[-1] = pytest.param(*COUNTED[-1], marks=pytest.mark.slow)  # other than -t in its backbone alone, as RetinaNet


@pytest.mark.parametrize(("method", "variant"), COUNTED)
def test_multiply_adds_are_the_papers(method, variant):
    """The paper counts layers, but neither the matrix products of attention nor the norms."""
    size, needs_values = (512, 2048) if method in SEGMENTORS else (800, 1280), method.startswith("mask")
    device = "cpu" if needs_values else "meta"  # Mask R-CNN proposes boxes
    model = revert_sync_batchnorm(built(method, variant, device)).eval()
    images = torch.zeros(1, 3, *size, device=device)
    backbone = costs_of(model_of(method, variant).backbone.eval(), images.to("meta"))
    uncounted = sum(total_of(backbone, "multiply_adds", kind=kind) for kind in (INSIDE, AMONG, "norms, window tokens"))
    counted = count_multiply_adds(model, images, *([samples(*size)] if needs_values else [])) - uncounted
    assert counted / 1e9 == pytest.approx(GFLOPS[method]["tsb".index(variant)], abs=1)


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation
# ----------------------------------------------------------------------------------------------------------------------


@of_variants
@of_segmentors
def test_segmentation_data(method, variant):
    cfg, model = config(method, variant), model_of(method, variant)
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == "ADE20KDataset"
    assert dataset.data_root == "data/ade/ADEChallengeData2016"
    assert dict(dataset.data_prefix) == dict(img_path="images/training", seg_map_path="annotations/training")
    steps = steps_of(dataset.pipeline)
    assert (steps["RandomResize"].scale, steps["RandomResize"].ratio_range) == ((2048, 512), (0.5, 2.0))
    assert (steps["RandomCrop"].crop_size, steps["RandomCrop"].cat_max_ratio) == ((512, 512), 0.75)
    assert steps["RandomFlip"].prob == 0.5
    assert "PhotoMetricDistortion" in steps
    assert model.data_preprocessor.size == (512, 512)
    preprocessor = mmseg.registry.MODELS.build(cfg.model.data_preprocessor)
    np.testing.assert_allclose(preprocessor.mean.flatten(), [123.675, 116.28, 103.53])
    np.testing.assert_allclose(preprocessor.std.flatten(), [58.395, 57.12, 57.375])


@of_variants
def test_fpn(variant):
    cfg, model = config("fpn", variant), model_of("fpn", variant)
    assert (type(model.neck).__name__, type(model.decode_head).__name__) == ("FPN", "FPNHead")
    assert model.neck.in_channels == list(VARIANTS[variant][1])
    assert (model.neck.out_channels, model.neck.num_outs) == (256, 4)
    assert model.decode_head.num_classes == 150
    assert not model.with_auxiliary_head
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", 80000)
    expected = (1e-4 - 1e-6) * (1 - np.arange(80000) / 79999) ** 0.9 + 1e-6
    np.testing.assert_allclose(learning_rates(cfg, 80000), expected, rtol=1e-5)


@of_variants
def test_upernet(variant):
    cfg, model = config("upernet", variant), model_of("upernet", variant)
    head, auxiliary, dims = model.decode_head, model.auxiliary_head, VARIANTS[variant][1]
    assert (type(head).__name__, type(auxiliary).__name__) == ("UPerHead", "FCNHead")
    assert (head.in_channels, head.channels, head.num_classes) == (list(dims), 512, 150)
    assert (auxiliary.in_index, auxiliary.in_channels, auxiliary.num_classes) == (2, dims[2], 150)
    assert (auxiliary.loss_decode.loss_weight, head.loss_decode.loss_weight) == (0.4, 1.0)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", 160000)
    i = np.arange(160000)
    expected = 6e-5 * (1 - i / 160000) * np.where(i < 1500, 1 - (1 - i / 1500) * (1 - 1e-6), 1)
    np.testing.assert_allclose(learning_rates(cfg, 160000), expected, rtol=1e-9)


@of_segmentors
def test_evaluation_scales(method, tmp_path):
    cfg = config(method, "t")
    Image.new("RGB", (683, 512)).save(tmp_path / "image.jpg")
    Image.new("L", (683, 512)).save(tmp_path / "labels.png")
    paths = dict(img_path=str(tmp_path / "image.jpg"), seg_map_path=str(tmp_path / "labels.png"))

    def run(pipeline: list) -> dict:
        sample = dict(paths, reduce_zero_label=True, seg_fields=[], label_map=None)
        for step in map(TRANSFORMS.build, pipeline):
            sample = step(sample)
        return sample

    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert run(loader.dataset.pipeline)["inputs"].shape == (3, 512, 683)
        assert steps_of(loader.dataset.pipeline)["Resize"].scale == (2048, 512)
    images = run(cfg.tta_pipeline)
    ratios = [ratio for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) for _ in range(2)]
    assert [image.shape[1:] for image in images["inputs"]] == [(int(512 * r), int(683 * r + 0.5)) for r in ratios]
    assert [bool(sample.metainfo["flip"]) for sample in images["data_samples"]] == [False, True] * 6


# ----------------------------------------------------------------------------------------------------------------------
# Detection
# ----------------------------------------------------------------------------------------------------------------------


@of_variants
@of_detectors
def test_detector(method, variant):
    model, neck = model_of(method, variant), model_of(method, variant).neck
    assert (type(neck).__name__, neck.in_channels) == ("FPN", list(VARIANTS[variant][1]))
    assert (neck.out_channels, neck.num_outs) == (256, 5)
    if method.startswith("retinanet"):
        assert type(model).__name__ == "RetinaNet"
        assert (neck.start_level, neck.add_extra_convs) == (1, "on_input")
        head, strides = model.bbox_head, [8, 16, 32, 64, 128]
        assert head.num_classes == 80
    else:
        assert type(model).__name__ == "MaskRCNN"
        assert neck.start_level == 0
        head, strides = model.rpn_head, [4, 8, 16, 32, 64]
        assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 80
    assert [stride for stride, _ in head.prior_generator.strides] == strides
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 128, 256, device="meta"))
    assert [tuple(y.shape) for y in maps] == [(1, 256, max(1, 128 // s), 256 // s) for s in strides]


@of_variants
def test_static_loss_scale(variant, monkeypatch):
    """The loss scale stays the same, with finite gradients and with others."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, "GradScaler", partial(torch.amp.GradScaler, device="cpu"))
    layer = torch.nn.Linear(1, 1)
    wrapper = build_optim_wrapper(layer, config("mask_rcnn-3x", variant).optim_wrapper)
    wrapper.loss_scaler.set_growth_interval(1)
    for factor in (1.0, float("inf"), 1.0):
        wrapper.update_params(factor * layer(torch.ones(1, 1)).sum())
        assert wrapper.loss_scaler.get_scale() == 512


@of_variants
@of_detectors
def test_schedule_and_precision(method, variant):
    cfg = config(method, variant)
    epochs, first, second = (12, 8, 11) if "1x" in method else (36, 27, 33)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", epochs)
    i = np.arange(epochs * PER_EPOCH)
    warm_up, epoch = np.minimum(1, 0.001 + 0.999 * i / 499), i // PER_EPOCH
    expected = OPTIMIZERS[method][0] * warm_up * 0.1 ** ((epoch >= first).astype(int) + (epoch >= second))
    np.testing.assert_allclose(learning_rates(cfg, len(i)), expected, rtol=1e-6)
    mixed = method == "mask_rcnn-3x"
    assert cfg.optim_wrapper.type == ("AmpOptimWrapper" if mixed else "OptimWrapper")
    assert [loop.get("fp16", False) for loop in (cfg.val_cfg, cfg.test_cfg)] == [mixed, mixed]


@of_variants
@of_detectors
def test_detection_data(method, variant):
    cfg, has_masks = config(method, variant), method.startswith("mask_rcnn")
    dataset = cfg.train_dataloader.dataset
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert (dataset.type, dataset.data_root) == ("CocoDataset", "data/coco/")
    assert dataset.data_prefix == dict(img="train2017/")
    steps = steps_of(dataset.pipeline)
    assert steps["LoadAnnotations"].with_mask == has_masks
    assert steps["RandomFlip"].prob == 0.5
    if "1x" in method:
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
        assert steps_of(loader.dataset.pipeline)["Resize"].scale == (1333, 800)
    assert cfg.test_evaluator.metric == (["bbox", "segm"] if has_masks else "bbox")


# ----------------------------------------------------------------------------------------------------------------------
# Demo data
# ----------------------------------------------------------------------------------------------------------------------


def test_labelled_scenes(demo_data):
    root = demo_data / "ade/ADEChallengeData2016"
    seen = set()
    for split, count in (("training", 600), ("validation", 100)):
        images, labels = (sorted((root / kind / split).iterdir()) for kind in ("images", "annotations"))
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        for image, label in list(zip(images, labels))[:40]:
            image, label = np.asarray(Image.open(image)), np.asarray(Image.open(label))
            assert image.shape == (*label.shape, 3)
            present = set(np.unique(label))
            assert {0, 11} < present <= set(range(12))
            seen |= present
            # the digits are bright, the photographs darkened
            assert image[(label > 0) & (label < 11)].mean() > 150 > image[label == 11].mean()
    assert seen == set(range(12))


def test_boxed_scenes(demo_data):
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
