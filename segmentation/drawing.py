"""Pictures of label maps over their images, with a legend, for test.py and predict.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sepvit_lib.inference.fonts import font_file
from sepvit_lib.mm.drawing import FileHook, enlargement, read_pixels

IGNORED = 255  # label of pixels that belong to no class
MARGIN = 8
OPACITY = 0.55


def labels_in(field: Any) -> np.ndarray:
    """Labels of a data sample's label map, H × W, as integers. For single-channel heads, mmseg returns floats."""
    return field.data[0].cpu().numpy().astype(np.int64)


def overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Blend an image (H × W × 3, RGB, 0 to 255) with the colours of its labels (H × W), except at ignored pixels."""
    colours = np.asarray(palette, dtype=np.float32)[np.where(labels == IGNORED, 0, labels)]  # H × W × 3
    mixed = (1 - OPACITY) * image + OPACITY * colours
    return np.where((labels == IGNORED)[..., None], image, mixed).round().astype(np.uint8)


def shares(labels: np.ndarray, count: int) -> np.ndarray:
    """Return each class's share of the pixels that are not ignored. `count` is the number of classes."""
    areas = np.bincount(labels[labels != IGNORED].ravel(), minlength=count)
    return areas / max(1, areas.sum())


def draw(
    image: np.ndarray, maps: dict[str, np.ndarray], classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> Image.Image:
    """Draw an image, each label map over the image, and a legend with each class's share of the last map.

    Args:
        image: H × W × 3, RGB, 0 to 255.
        maps: label maps, H × W, by title.
        classes: names of the classes.
        palette: colours of the classes, RGB, 0 to 255.
    """
    panels = {"image": image} | {title: overlay(image, labels, palette) for title, labels in maps.items()}
    height, width = image.shape[:2]
    scale = enlargement(height, width)
    last = shares(list(maps.values())[-1], len(classes))
    largest = np.max([shares(labels, len(classes)) for labels in maps.values()], axis=0)
    present = [index for index in np.argsort(-largest, kind="stable") if largest[index] > 0]
    entries = [f"{classes[index]}  {100 * last[index]:.1f} %" for index in present]
    font, line = ImageFont.truetype(font_file([*entries, *panels]), size=14), 20
    legend = max([font.getlength(entry) for entry in entries], default=0) + 2 * line
    total_width = int(len(panels) * (scale * width + MARGIN) + MARGIN + legend)
    total_height = line + 2 * MARGIN + max(scale * height, line * len(entries))
    picture = Image.new("RGB", (total_width, total_height), "white")
    pen = ImageDraw.Draw(picture)
    for number, (title, panel) in enumerate(panels.items()):
        left = MARGIN + number * (scale * width + MARGIN)
        pen.text((left, MARGIN // 2), title, "black", font)
        enlarged = Image.fromarray(panel).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, line + MARGIN))
    left = MARGIN + len(panels) * (scale * width + MARGIN)
    for number, (index, entry) in enumerate(zip(present, entries)):
        top = line + MARGIN + number * line
        pen.rectangle((left, top + 3, left + 14, top + 17), fill=tuple(int(c) for c in palette[index]), outline="grey")
        pen.text((left + 20, top), entry, "black", font)
    return picture


class DrawingHook(FileHook):
    """Draw each test image with its ground truth, if it has one, and its prediction, as PNG.

    Args:
        folder: output folder; see `FileHook`.
        side: length to which the shorter side of larger images is roughly reduced, in pixels. 0 keeps their size.
    """

    def __init__(self, folder: Path, side: int = 0) -> None:
        super().__init__(folder)
        self.side = side

    def write(self, sample: Any, metainfo: dict[str, Any], path: Path) -> None:
        """Draw a test image and write the picture."""
        maps = {}
        if "gt_sem_seg" in sample:
            maps["truth"] = labels_in(sample.gt_sem_seg)
        maps["prediction"] = labels_in(sample.pred_sem_seg)
        image = read_pixels(sample.img_path, self.loader)
        step = max(1, min(image.shape[:2]) // self.side) if self.side else 1
        image, *small = (pixels[::step, ::step] for pixels in (image, *maps.values()))
        save(draw(image, dict(zip(maps, small)), metainfo["classes"], metainfo["palette"]), path)


class LabelsHook(FileHook):
    """Write the predicted labels of each test image, in the data set's numbering, as PNG."""

    def write(self, sample: Any, metainfo: dict[str, Any], path: Path) -> None:
        """Write the labels of an image."""
        labels = labels_in(sample.pred_sem_seg)
        if chosen := metainfo.get("label_map"):  # the config selects a subset of the data set's classes
            originals = {new: old for old, new in chosen.items() if new != IGNORED}
            labels = np.array([originals[new] for new in range(len(originals))])[labels]
        if stored := metainfo.get("stored_classes"):  # the checkpoint numbers the classes in a different order
            labels = np.array([stored.index(name) for name in metainfo["classes"]])[labels]
        if metainfo.get("reduce_zero_label"):
            labels = labels + 1  # the data set's 0 belongs to no class
        save(Image.fromarray(labels.astype(np.uint8)), path)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whatever the suffix of the path, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path.with_suffix(".png"))
