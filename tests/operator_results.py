"""Results of mmcv's operators on random inputs, and of a training step, in a process of their own.

    python operator_results.py OUT.pt

Run with SEPVIT_OPERATORS, once for each kind of operators: tests/commands/test_operators.py compares the results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import sepvit_lib.dense.backbone  # noqa: F401
from sepvit_lib.dense import operators

DEMO = Path(__file__).resolve().parent.parent / "detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py"
SIZES = (1, 7, 300, 3000)


def boxes_and_scores(count: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random boxes in a small image. Whole numbers give equal scores and IoUs; otherwise, scores differ."""
    corners = torch.rand(count, 2, 2) * 60
    boxes, scores = torch.cat((corners.amin(1), corners.amax(1)), dim=1), torch.randperm(count) / count
    return (boxes.round(), (scores * 20).round() / 20) if whole else (boxes, scores)


def regions(count: int, size: int) -> torch.Tensor:
    """Random regions of two images, some beyond their edges."""
    corners = (torch.rand(count, 2, 2) * 1.5 - 0.25) * size
    image = torch.randint(2, (count, 1)).float()
    return torch.cat((image, corners.amin(1), corners.amax(1)), dim=1)


def of_operators() -> dict[str, object]:
    """Results by operator and settings."""
    from mmcv.ops import RoIAlign, batched_nms, nms

    torch.manual_seed(0)
    found: dict[str, object] = {}
    for count in SIZES:
        for whole in (False, True):
            boxes, _ = boxes_and_scores(count, whole)
            ranks = torch.randperm(count) / count  # the compiled nms leaves the order of equal scores open
            case = f"{count} {whole}"
            for offset in (0, 1):
                found[f"nms {case} {offset}"] = nms(boxes, ranks, 0.5, offset, score_threshold=0.1, max_num=500)
            classes = torch.randint(5, (count,))
            found[f"batched_nms {case}"] = batched_nms(boxes, ranks, classes, dict(type="nms", iou_threshold=0.3))
    for aligned in (False, True):
        for ratio in (0, 2):
            maps = torch.randn(2, 5, 17, 23, requires_grad=True)
            pooled = RoIAlign((7, 5), 0.25, ratio, aligned=aligned)(maps, regions(50, 80))
            pooled.backward(torch.randn_like(pooled))
            found[f"roi_align {aligned} {ratio}"] = (pooled.detach(), maps.grad)
    return found


def of_a_training_step() -> dict[str, torch.Tensor]:
    """Losses and gradients of the demo's Mask R-CNN on random images and objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    init_default_scope("mmdet")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    cfg = Config.fromfile(DEMO).model
    cfg.backbone.init_cfg, cfg.backbone.drop_path_rate = None, 0.0
    model = MODELS.build(cfg)
    model.init_weights()
    samples = []
    for _ in range(2):
        corners = np.sort(rng.integers(0, 32, (3, 2, 2)) * 4, axis=1)
        boxes = torch.tensor(np.concatenate((corners[:, 0], corners[:, 1] + 8), axis=1), dtype=torch.float32)
        masks = BitmapMasks(rng.integers(0, 2, (3, 136, 136), dtype=np.uint8), 136, 136)
        sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (136, 136))
        sample = DetDataSample(metainfo=dict(sizes, batch_input_shape=(160, 160), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 3, 7]), masks=masks)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), masks=masks[[]])
        samples.append(sample)
    losses = model.loss(torch.randn(2, 3, 160, 160), samples)
    total, values = model.parse_losses(losses)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in values.items()}, **gradients}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = dict(operators=of_operators(), step=of_a_training_step(), in_use=operators.in_use())
    torch.save(found, sys.argv[1])
