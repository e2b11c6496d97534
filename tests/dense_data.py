"""Small data sets of one's own for segmentation and detection: dark noise with bright squares, and their configs."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from mmengine.config import Config
from PIL import Image

from sepvit_lib.mm.build import build_model
from sepvit_lib.mm.config import read_config

LABELLED = ROOT / "segmentation/configs/fpn_sepvit_lite_112x112_demo.py"
BOXED = ROOT / "detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py"
HEIGHT, WIDTH, SIDE = 80, 96, 30  # of the scenes and of the squares in them, in pixels
HEADS = {
    LABELLED: "decode_head=dict(num_classes={0}, loss_decode=dict(class_weight=None))",
    BOXED: "roi_head=dict(bbox_head=dict(num_classes={0}), mask_head=dict(num_classes={0}))",
}
NAMES = {LABELLED: ("ground", "square"), BOXED: ("cat", "dog")}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Make an image (H × W × 3), and the top left corner of its square."""
    image = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    top, left = (int(value) for value in rng.integers(0, 40, 2))
    image[top : top + SIDE, left : left + SIDE] += 150
    return image, top, left


def write_labelled(root: Path) -> Path:
    """Write six training and two validation scenes with labels in ADE20K's layout: 1 is the ground, 2 the square."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image, top, left = scene(rng)
            labels = np.ones((HEIGHT, WIDTH), np.uint8)
            labels[top : top + SIDE, left : left + SIDE] = 2
            Image.fromarray(image).save(root / f"images/{split}/{number}.jpg", quality=95)
            Image.fromarray(labels).save(root / f"annotations/{split}/{number}.png")
    return root


def write_boxed(root: Path) -> Path:
    """Write six training and two validation scenes with squares that are cats (3) and dogs (7) in COCO's layout."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 6), ("val2017", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            image, top, left = scene(rng)
            Image.fromarray(image).save(root / f"{split}/{number}.jpg", quality=95)
            images.append(dict(id=number, file_name=f"{number}.jpg", height=HEIGHT, width=WIDTH))
            corners = [left, top, left + SIDE, top, left + SIDE, top + SIDE, left, top + SIDE]
            mark = dict(id=number, image_id=number, category_id=(3, 7)[number % 2], iscrowd=0, area=SIDE**2)
            annotations.append(dict(mark, bbox=[left, top, SIDE, SIDE], segmentation=[corners]))
        categories = [dict(id=3, name="cat"), dict(id=7, name="dog")]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def own_config(path: Path, base: Path, root: Path, names: tuple[str, ...] = (), rest: str = "") -> Path:
    """Write a child of a demo's config, for a data set of one's own."""
    names = names or NAMES[base]
    data = f"dict(data_root=data_root, metainfo=dict(_delete_=True, classes={names!r}))"
    lines = [
        f"_base_ = {str(base)!r}",
        f"data_root = {str(root)!r}",
        f"metainfo = dict(_delete_=True, classes={names!r})",
        *(f"{part}_dataloader = dict(dataset={data})" for part in ("train", "val", "test")),
        f"model = dict({HEADS[base].format(len(names))})",
    ]
    if base == BOXED:
        lines.append(
            "val_evaluator = test_evaluator = dict(ann_file=data_root + '/annotations/instances_val2017.json')"
        )
    path.write_text("\n".join([*lines, rest]) + "\n")
    return path


def save_model(config: Path, path: Path) -> Path:
    """Write a checkpoint of a config's model with random weights."""
    torch.manual_seed(0)
    cfg = read(config)
    meta = dict(dataset_meta=cfg.test_dataloader.dataset.metainfo.to_dict())
    torch.save(dict(state_dict=build_model(cfg).state_dict(), meta=meta), path)
    return path


def read(path: Path, **options: Any) -> Config:
    """Read a config as the commands do."""
    return read_config(Namespace(config=str(path), cfg_options=options))
