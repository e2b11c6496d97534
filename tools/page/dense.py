"""Segmentors and detectors for the page of tools/app.py."""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from segmentation.drawing import IGNORED, labels_in, shares
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.attention import record_attention
from sepvit_lib.mm.commands.predict import build_inference_model
from sepvit_lib.mm.config import read_config, where_of
from tools.page.predictors import Answer, BlockWeights, Predictor, Row, timed, weights_of

MAX_SIDE = 1024  # of images, in pixels, to limit memory: a segmentor's scores take 4 bytes per pixel and class
MAX_ROWS = 12
SCORE = 0.3  # default minimum score of a detection
LIBRARIES = {"mmseg": "segmentor", "mmdet": "detector"}
Show = Callable[[Any, Any, np.ndarray], tuple[list[Row], Image.Image, str]]


class DensePredictor(Predictor):
    """Predicts with a segmentor or detector.

    Args:
        model: the model, from `sepvit_lib.mm.commands.predict.build_inference_model`.
        kind: 'segmentor' or 'detector'.
        name: display name of the model.
        run: returns the data sample for a model and an image (H × W × 3, RGB, 0 to 255).
        show: returns the rows, the overlay and the summary for a model, a data sample and an image.
    """

    def __init__(self, model: Any, kind: str, name: str, run: Callable[..., Any], show: Show) -> None:
        super().__init__(kind, name, tuple(model.dataset_meta["classes"]), model.orientation, "any size", model)
        self.model, self.run, self.show = model, run, show

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image, downscaled if a side exceeds `MAX_SIDE`, and record the backbone's attention."""
        picture = image.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        times: dict[str, float] = {}
        blocks: list[BlockWeights] = []
        note = self.note
        with timed(times, "preprocessing and network"), torch.no_grad():
            sample = self.run(self.model, pixels)
        height, width = sample.metainfo["img_shape"][:2]
        if not note:
            with timed(times, "again, recording attention"):
                try:
                    recorded = record_attention(self.model, torch.empty(0), lambda _: self.run(self.model, pixels))
                    blocks, note = weights_of(recorded, (pixels.shape[0] / height, pixels.shape[1] / width))
                except ValueError:
                    note = "This network runs its backbone several times per image, so its attention is not shown."
        with timed(times, "drawing"):
            rows, overlay, summary = self.show(self.model, sample, pixels)
        return Answer(picture, rows, summary, overlay, blocks, note, times)


def show_labels(model: Any, sample: Any, pixels: np.ndarray) -> tuple[list[Row], Image.Image, str]:
    """Return rows of classes, largest first; the labels as colours, transparent at ignored pixels; and a summary."""
    labels, classes = labels_in(sample.pred_sem_seg), model.dataset_meta["classes"]
    palette = np.asarray(model.dataset_meta["palette"], dtype=np.uint8)
    share = shares(labels, len(classes))
    largest = [int(index) for index in np.argsort(-share)[:MAX_ROWS] if share[index] > 0]
    rows = [Row(classes[i], float(share[i]), "#" + palette[i].tobytes().hex()) for i in largest]
    known = labels != IGNORED
    colours = np.dstack([palette[np.where(known, labels, 0)], np.where(known, 255, 0).astype(np.uint8)])
    return rows, Image.fromarray(colours), ", ".join(f"{row.name} {100 * row.share:.1f} %" for row in rows[:3])


def show_objects(model: Any, sample: Any, pixels: np.ndarray) -> tuple[list[Row], Image.Image, str]:
    """Return rows of objects, highest score first; the image with boxes and masks; and the number of each class."""
    from detection.predict import draw_sample

    found, classes = sample.pred_instances, model.dataset_meta["classes"]
    order = found.scores.argsort(descending=True)[:MAX_ROWS].tolist()
    rows = [Row(classes[int(found.labels[i])], float(found.scores[i])) for i in order]
    counts = Counter(classes[label] for label in found.labels.tolist())
    line = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
    return rows, draw_sample(model, "image", pixels, sample), line or "no object reaches --score-thr"


def load_dense_predictor(config: str, checkpoint: str, device: torch.device, min_score: float | None) -> DensePredictor:
    """Load a segmentor or detector.

    Args:
        config: path of its config.
        checkpoint: path or https URL of its checkpoint.
        device: device of the model.
        min_score: minimum score of a detection; None for the default.

    Raises:
        UserError: the config or the checkpoint cannot be read, or the checkpoint does not match the config.
    """
    args = argparse.Namespace(config=config, cfg_options={})
    cfg = read_config(args)
    kind = LIBRARIES.get(cfg.get("default_scope"))
    if kind is None:
        raise UserError(f"--config {config}: default_scope is {cfg.get('default_scope')!r}, not mmseg or mmdet")
    if kind == "segmentor" and min_score is not None:
        raise UserError(f"--score-thr {min_score}: only for detectors, but --config {config} is a segmentor; omit it")
    model = build_inference_model(cfg, checkpoint, where_of(args)).to(device)
    name = f"{type(model).__name__} with {cfg.model.backbone.type}"
    if kind == "segmentor":
        from segmentation.predict import segment

        return DensePredictor(model, kind, name, segment, show_labels)
    from detection.predict import detect

    run = partial(detect, lowest=SCORE if min_score is None else min_score)
    return DensePredictor(model, kind, name, run, show_objects)
