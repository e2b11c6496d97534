"""Predictions and attention for the page of tools/app.py, and their computation by a classifier."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sepvit import SepViTStages
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.inference.attention import BlockAttention, Rollout, record_attention, rollout
from sepvit_lib.inference.classifier import THRESHOLD, Classifier
from sepvit_lib.inference.images import read_image
from sepvit_lib.pipeline.image_files import as_picture, open_image

MAX_PIXELS = 50_000_000  # of an image; decoding takes up to 12 bytes per pixel
MAX_WEIGHTS = 2**21  # per block, 8 MiB; for blocks with more, the page gets the mean over heads
TOP = 5


@dataclass(frozen=True)
class Row:
    """A line of the prediction.

    Attributes:
        name: name of the class.
        share: probability, score, or share of the image, 0 to 1.
        colour: colour of the class in the overlay, as #rrggbb; "" if it has none.
    """

    name: str
    share: float
    colour: str = ""


@dataclass(frozen=True)
class BlockWeights:
    """Attention among the windows of a block, or the attention rollout over all blocks, for the page to draw.

    Attributes:
        label: STAGE.BLOCK, or 'rollout'.
        rows: rows of windows.
        columns: columns of windows.
        height: height of a window in pixels of the picture.
        width: width of a window in pixels of the picture.
        weights: float32, h × n × n, for h heads and n windows. Rows sum to one.
        is_mean: whether the weights are the mean over heads; if so, h is 1.
    """

    label: str
    rows: int
    columns: int
    height: float
    width: float
    weights: np.ndarray
    is_mean: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, with the weights as little-endian float32 in base64."""
        weights = encoded(self.weights.astype("<f4").tobytes())
        return {**vars(self), "heads": len(self.weights), "weights": weights}


@dataclass
class Answer:
    """The results for an image, as the page shows them.

    Attributes:
        picture: the network's input.
        rows: lines of the prediction.
        summary: the prediction in a sentence.
        overlay: a picture to draw over `picture`.
        blocks: attention among windows, if any.
        note: why attention is missing or incomplete.
        times: milliseconds by step.
    """

    picture: Image.Image
    rows: list[Row]
    summary: str
    overlay: Image.Image | None = None
    blocks: list[BlockWeights] = field(default_factory=list)
    note: str = ""
    times: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON, with pictures as PNG in base64."""
        picture, overlay = encoded_picture(self.picture), self.overlay and encoded_picture(self.overlay)
        rows, blocks = [vars(row) for row in self.rows], [block.to_json() for block in self.blocks]
        return {**vars(self), **dict(picture=picture, overlay=overlay, rows=rows, blocks=blocks)}


class Predictor:
    """A trained network with everything the page needs to know about it.

    Args:
        kind: 'classifier', 'segmentor' or 'detector'.
        name: display name of the network.
        classes: names of its classes.
        orientation: 'exif' to turn images upright, or 'stored' to ignore the EXIF orientation.
        size: description of its input size.
        network: the PyTorch network; None for an exported file.

    Attributes:
        title: description of the network in one line.
        facts: facts that the page displays, by name.
        note: why there is no attention to show; "" if there is.
    """

    def __init__(
        self, kind: str, name: str, classes: Sequence[str], orientation: str, size: str, network: nn.Module | None
    ) -> None:
        self.kind, self.classes, self.orientation, self.network = kind, classes, orientation, network
        self.title = f"{name}, a {kind} with {len(classes)} classes"
        self.facts = {"model": name, "classes": str(len(classes)), "input": size}
        self.note = ""
        if network is None:
            self.note = "An exported file does not show its attention. Use the checkpoint that it was exported from."
        elif not any(isinstance(module, SepViTStages) for module in network.modules()):
            self.note = "This network is not a SepViT, so it has no attention among windows."

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image."""
        raise NotImplementedError


class ClassifierPredictor(Predictor):
    """Predicts with a classifier."""

    def __init__(self, classifier: Classifier) -> None:
        if (channels := classifier.prepare.preprocessing.channels) != 3:
            raise UserError(f"{setting('resume')}: expects {channels} channels, but the page has RGB; use predict.py")
        made, (height, width) = classifier.description, classifier.description.preprocessing.size
        size = f"{height} × {width}"
        super().__init__("classifier", made.model, made.classes, made.orientation, size, classifier.network)
        self.classifier = classifier

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image: the most probable classes, and the attention among windows."""
        times: dict[str, float] = {}
        with timed(times, "preprocessing"):
            inputs = self.classifier.prepare(image)
        with timed(times, "network"):
            probabilities = self.classifier.probabilities(self.classifier.logits([inputs]))[0]
        rows = [Row(*pair) for pair in self.classifier.ranked(probabilities)[:TOP]]
        picture = as_picture(self.classifier.description.preprocessing.crop(image))
        summary = f"{rows[0].name}, {100 * rows[0].share:.1f} %"
        if self.classifier.description.multi_label:
            summary = ", ".join(row.name for row in rows if row.share >= THRESHOLD) or "no label"
        answer = Answer(picture, rows, summary, note=self.note, times=times)
        if self.network is not None and not self.note:
            with timed(times, "network again, recording attention"):
                batch = inputs[None].to(next(self.network.parameters()).device)
                answer.blocks, answer.note = weights_of(record_attention(self.network, batch), (1.0, 1.0))
        return answer


@contextmanager
def timed(times: dict[str, float], step: str) -> Iterator[None]:
    """Record the milliseconds that a `with` block takes. To include GPU work, move results to the CPU in the block."""
    start = time.perf_counter()
    yield
    times[step] = 1000 * (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def read_upload(content: bytes, orientation: str) -> Image.Image:
    """Read an uploaded image in memory, in RGB.

    Args:
        content: the file's bytes.
        orientation: see `sepvit_lib.pipeline.image_files.decode`.

    Raises:
        UserError: it is not an image of a common format, is damaged, or has too many pixels.
    """
    try:
        with open_image(io.BytesIO(content)) as opened:
            width, height = opened.size
    except Exception:  # Pillow's decoders raise errors of any type for damaged files
        formats = "JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP and PPM"
        raise UserError(f"This is not an image, or it is damaged or too large. The page accepts {formats}.") from None
    if width * height > MAX_PIXELS:
        size = f"{width * height / 1e6:.0f} megapixels, more than {MAX_PIXELS / 1e6:.0f}"
        raise UserError(f"The image has {size}. Make it smaller.")
    return as_picture(read_image(content, "The image", orientation))


def encoded_picture(picture: Image.Image) -> str:
    """Encode a picture as PNG in base64."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)  # four times as fast as the default
    return encoded(file.getvalue())


def encoded(content: bytes) -> str:
    """Encode bytes in base64."""
    return base64.b64encode(content).decode("ascii")


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def shown_weights(
    blocks: Sequence[BlockAttention], dtype: torch.dtype = torch.float64
) -> list[tuple[str, BlockAttention | Rollout, Tensor, bool]]:
    """Choose the weights that the page shows for the first image: those of all blocks, and their rollout.

    Args:
        blocks: the recorded blocks.
        dtype: number format in which to compute the rollout.

    Returns:
        label, block or rollout, h × n × n weights, and whether these are the mean over heads. See `BlockWeights`.
    """
    found: list[tuple[str, BlockAttention | Rollout, Tensor, bool]] = []
    for block in blocks:
        if block.among is not None:
            is_mean = block.among[0].numel() > MAX_WEIGHTS
            label = block.name.partition("blocks.")[2]  # STAGE.BLOCK, as in tools/visualize.py
            found.append((label, block, block.among_mean()[:1] if is_mean else block.among[0], is_mean))
    if len(found) > 1:
        total = rollout(blocks, dtype)
        found.append(("rollout", total, total.weights[:1], True))
    return found


def weights_of(blocks: Sequence[BlockAttention], scale: tuple[float, float]) -> tuple[list[BlockWeights], str]:
    """Collect the attention among windows of all blocks for one image, and its rollout, for the page.

    Args:
        blocks: the recorded blocks.
        scale: height and width of the picture, each divided by that of the network's input.

    Returns:
        the weights, and a note if there are none.
    """
    found = []
    for label, part, weights, is_mean in shown_weights(blocks):
        height, width = (part.stride * one for one in scale)
        found.append(BlockWeights(label, *part.grid, height, width, weights.float().cpu().numpy(), is_mean))
    if not found:
        return [], "At this size, every block has a single window, so there is no attention among windows."
    return found, ""
