"""Segmentors and detectors for the page of tools/app.py."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from segmentation.drawing import IGNORED, labels_in, shares
from sepvit_lib.dense.predict import build_inference_model
from sepvit_lib.dense.settings import read_config, where_of
from sepvit_lib.training.errors import UserError
from tools.app_predictors import Answer, BlockWeights, Row, record, timed, why_no_attention

LONGEST = 1024  # pixels of an image's longer side; a segmentor's scores take 4 bytes for each pixel and class
MOST_ROWS = 12
SCORE = 0.3  # lowest score of a detection, by default
LIBRARIES = {"mmseg": "segmentor", "mmdet": "detector"}


class DensePredictor:
    """Predicts by a segmentor or detector; see `tools.app_predictors.Predictor`.

    Args:
        model: the model, from `sepvit_lib.dense.predict.build_inference_model`.
        kind: 'segmentor' or 'detector'.
        name: names the model, for people.
    """

    def __init__(self, model: Any, kind: str, name: str) -> None:
        self.model = model
        self.kind = kind
        self.classes: Sequence[str] = tuple(model.dataset_meta["classes"])
        self.orientation: str = model.orientation
        self.title = f"{name}, a {kind} with {len(self.classes)} classes"
        self.facts: Mapping[str, str] = {"model": name, "classes": str(len(self.classes)), "input": "any size"}
        self.note = why_no_attention(model)

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image, made smaller if a side exceeds `LONGEST`, and record the backbone's attention."""
        picture = image.copy()
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        times: dict[str, float] = {}
        samples: list[Any] = []
        with timed(times, "preprocessing and network"), torch.no_grad():
            samples.append(self.run(pixels))
        blocks: list[BlockWeights] = []
        note = self.note
        if not note:
            with timed(times, "again, recording its attention"):
                blocks, note = record(self.model, lambda: self.run(pixels), lambda: scale_of(samples[0], pixels))
        with timed(times, "drawing"):
            rows, overlay = self.draw(samples[0], pixels)
        return Answer(picture, rows, self.summary(rows, samples[0]), overlay, blocks, note, times)

    def run(self, pixels: np.ndarray) -> Any:
        """Return the data sample that the model predicts for an image, H × W × 3, RGB, 0 to 255."""
        raise NotImplementedError

    def draw(self, sample: Any, pixels: np.ndarray) -> tuple[list[Row], Image.Image]:
        """Make the lines and the overlay of a data sample, for the same image."""
        raise NotImplementedError

    def summary(self, rows: list[Row], sample: Any) -> str:
        """Describe a prediction in a sentence."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Predict an empty image, so that the first one is not slower than the others."""
        self.predict(Image.new("RGB", (128, 128)))


class Segmentor(DensePredictor):
    """Predicts by a segmentor; see `DensePredictor`."""

    def run(self, pixels: np.ndarray) -> Any:
        """Return the data sample that the model predicts for an image, H × W × 3, RGB, 0 to 255."""
        from segmentation.predict import segment

        return segment(self.model, pixels)

    def draw(self, sample: Any, pixels: np.ndarray) -> tuple[list[Row], Image.Image]:
        """Make the lines, the largest class first, and the labels as colours. Ignored pixels are transparent."""
        labels = labels_in(sample.pred_sem_seg)
        palette = np.asarray(self.model.dataset_meta["palette"], dtype=np.uint8)
        share = shares(labels, len(self.classes))
        largest = [int(index) for index in np.argsort(-share)[:MOST_ROWS] if share[index] > 0]
        rows = [Row(self.classes[i], float(share[i]), "#" + palette[i].tobytes().hex()) for i in largest]
        known = labels != IGNORED
        colours = np.dstack([palette[np.where(known, labels, 0)], np.where(known, 255, 0).astype(np.uint8)])
        return rows, Image.fromarray(colours)

    def summary(self, rows: list[Row], sample: Any) -> str:
        """Name the largest classes."""
        return ", ".join(f"{row.name} {100 * row.share:.1f} %" for row in rows[:3])


class Detector(DensePredictor):
    """Predicts by a detector; see `DensePredictor`.

    Args:
        lowest: lowest score of an object.
    """

    def __init__(self, model: Any, kind: str, name: str, lowest: float) -> None:
        super().__init__(model, kind, name)
        self.lowest = lowest

    def run(self, pixels: np.ndarray) -> Any:
        """Return the data sample that the model predicts for an image, H × W × 3, RGB, 0 to 255."""
        from detection.predict import detect

        return detect(self.model, pixels, self.lowest)

    def draw(self, sample: Any, pixels: np.ndarray) -> tuple[list[Row], Image.Image]:
        """Make the lines, the highest score first, and the image with boxes and masks."""
        from detection.predict import draw_sample

        found = sample.pred_instances
        order = found.scores.argsort(descending=True)[:MOST_ROWS].tolist()
        rows = [Row(self.classes[int(found.labels[i])], float(found.scores[i])) for i in order]
        return rows, draw_sample(self.model, "image", pixels, sample)

    def summary(self, rows: list[Row], sample: Any) -> str:
        """Count the objects of each class."""
        counts = Counter(self.classes[label] for label in sample.pred_instances.labels.tolist())
        line = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
        return line or f"no object with a score of {self.lowest} or more"


def scale_of(sample: Any, pixels: np.ndarray) -> tuple[float, float]:
    """Height and width of an image, divided by those of the network's input, which a data sample tells."""
    height, width = sample.metainfo["img_shape"][:2]
    return pixels.shape[0] / height, pixels.shape[1] / width


def load_dense_predictor(config: str, checkpoint: str, device: torch.device, lowest: float | None) -> DensePredictor:
    """Load a segmentor or detector.

    Args:
        config: path of its config.
        checkpoint: path or https address of its checkpoint.
        device: where it computes.
        lowest: lowest score of a detection; None for the default.

    Raises:
        UserError: the config or the checkpoint cannot be read, or they do not fit.
    """
    args = argparse.Namespace(config=config, cfg_options={})
    cfg = read_config(args)
    kind = LIBRARIES.get(cfg.get("default_scope"))
    if kind is None:
        raise UserError(f"--config {config}: default_scope is {cfg.get('default_scope')!r}, not mmseg or mmdet")
    if kind == "segmentor" and lowest is not None:
        raise UserError(f"--score-thr {lowest}: is for detectors, and --config {config} is of a segmentor; omit it")
    model = build_inference_model(cfg, checkpoint, where_of(args)).to(device)
    name = f"{type(model).__name__} with {cfg.model.backbone.type}"
    if kind == "segmentor":
        return Segmentor(model, kind, name)
    return Detector(model, kind, name, SCORE if lowest is None else lowest)
