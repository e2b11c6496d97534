"""What the page of tools/app.py shows of an image: the answer, and the classifier that gives it."""

import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sepvit import SepViTStages
from sepvit_lib.inference.attention import BlockAttention, record_attention, rollout
from sepvit_lib.inference.classifier import Classifier
from sepvit_lib.inference.images import read_image
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.images import open_image

MOST_PIXELS = 50_000_000  # of an image; decoding takes up to 12 bytes for each
MOST_WEIGHTS = 2**21  # of a block, sent to the page: 8 MiB
TOP = 5


@dataclass(frozen=True)
class Row:
    """A line of the prediction.

    Attributes:
        name: of the class.
        share: probability, score, or share of the image, 0 to 1.
        colour: of the class in the overlay, as #rrggbb; "" if it has none.
    """

    name: str
    share: float
    colour: str = ""


@dataclass(frozen=True)
class BlockWeights:
    """Attention among windows as the page draws it.

    Attributes:
        label: names the block.
        grid: rows and columns of windows.
        side: height and width of a window in pixels of the picture.
        weights: h × n × n, rows sum to one, float32. For one head, h = 1.
        is_mean: whether the one head is the mean of several.
    """

    label: str
    grid: tuple[int, int]
    side: tuple[float, float]
    weights: np.ndarray
    is_mean: bool = False


@dataclass
class Answer:
    """What the page shows of an image.

    Attributes:
        picture: what the network sees.
        rows: the prediction.
        summary: the prediction in a sentence.
        overlay: a picture to lay over the other one.
        blocks: attention among windows; none if there is none.
        note: why there is none, or less than usual.
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
        """Return it as fields that JSON can hold: pictures as PNG, weights as little-endian float32, both in base64."""
        return dict(
            picture=encoded_picture(self.picture),
            overlay=None if self.overlay is None else encoded_picture(self.overlay),
            rows=[vars(row) for row in self.rows],
            summary=self.summary,
            blocks=[
                dict(
                    label=block.label,
                    rows=block.grid[0],
                    columns=block.grid[1],
                    height=block.side[0],
                    width=block.side[1],
                    heads=len(block.weights),
                    is_mean=block.is_mean,
                    weights=encoded(block.weights.astype("<f4").tobytes()),
                )
                for block in self.blocks
            ],
            note=self.note,
            times=self.times,
        )


class Predictor(Protocol):
    """A trained network with all that the page needs of it.

    Attributes:
        kind: 'classifier', 'segmentor' or 'detector'.
        title: what the network is, for people.
        classes: names of its classes.
        orientation: in which images are read, 'exif' or 'stored'.
        facts: further facts for the page, such as the input's size.
        note: why there is no attention to show; "" if there is.
    """

    kind: str
    title: str
    classes: Sequence[str]
    orientation: str
    facts: Mapping[str, str]
    note: str

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image."""

    def warm_up(self) -> None:
        """Predict an empty image, so that the first one is not slower than the others."""


class ClassifierPredictor:
    """Predicts by a classifier; see `Predictor`.

    Args:
        classifier: the classifier.
    """

    kind = "classifier"

    def __init__(self, classifier: Classifier) -> None:
        description = classifier.description
        height, width = description.preprocessing.size
        self.classifier = classifier
        self.classes: Sequence[str] = description.classes
        self.orientation = description.orientation
        self.title = f"{description.model} with {len(self.classes)} classes"
        self.facts: Mapping[str, str] = {
            "model": description.model,
            "classes": str(len(self.classes)),
            "input": f"{height} × {width}",
        }
        self.note = why_no_attention(classifier.network)

    def predict(self, image: Image.Image) -> Answer:
        """Predict an RGB image: the likeliest classes, and the attention among windows."""
        times: dict[str, float] = {}
        network = self.classifier.network
        with timed(times, "preprocessing"):
            inputs = self.classifier.prepare(image)
        with timed(times, "network"):
            probabilities = self.classifier.probabilities([inputs])[0]
        best = probabilities.topk(min(TOP, len(self.classes)))
        rows = [Row(self.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
        picture = self.classifier.description.preprocessing.crop(image)
        answer = Answer(picture, rows, f"{rows[0].name}, {100 * rows[0].share:.1f} %", note=self.note, times=times)
        if network is not None and not self.note:
            with timed(times, "network again, recording its attention"):
                batch = inputs[None].to(next(network.parameters()).device)
                answer.blocks, answer.note = weights_of(record_attention(network, batch), (1.0, 1.0))
        return answer

    def warm_up(self) -> None:
        """Predict an empty image, so that the first one is not slower than the others."""
        height, width = self.classifier.description.preprocessing.size
        self.predict(Image.new("RGB", (width, height)))


@contextmanager
def timed(times: dict[str, float], step: str) -> Iterator[None]:
    """Enter the milliseconds that the body takes. Results that it moves to the CPU are waited for."""
    start = time.perf_counter()
    yield
    times[step] = 1000 * (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def read_upload(content: bytes, orientation: str) -> Image.Image:
    """Read an image that was sent, in memory, in RGB.

    Args:
        content: the file's bytes.
        orientation: see `sepvit_lib.training.images.decode`.

    Raises:
        UserError: it is not an image of a common format, is damaged, or has too many pixels.
    """
    if not content:
        raise UserError("The file is empty.")
    try:
        with open_image(io.BytesIO(content)) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise UserError(f"The image has more than {MOST_PIXELS / 1e6:.0f} megapixels. Make it smaller.") from None
    except Exception:  # Pillow's decoders raise errors of any type for damaged files
        raise UserError(
            "This is not an image, or it is damaged. The page takes JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP and PPM."
        ) from None
    if width * height > MOST_PIXELS:
        raise UserError(
            f"The image has {width * height / 1e6:.0f} megapixels, more than {MOST_PIXELS / 1e6:.0f}. Make it smaller."
        )
    return read_image(content, "The image", orientation)


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


def why_no_attention(network: nn.Module | None) -> str:
    """Say why a network has no attention to show; "" if it has.

    Args:
        network: the network; None for an exported file.
    """
    if network is None:
        return "An exported file does not show its attention. The checkpoint that it was exported from does."
    if not any(isinstance(module, SepViTStages) for module in network.modules()):
        return "This network is not a SepViT, so it has no attention among windows."
    return ""


def weights_of(blocks: Sequence[BlockAttention], scale: tuple[float, float]) -> tuple[list[BlockWeights], str]:
    """Collect the attention among windows of one image's blocks, and their rollout.

    Args:
        blocks: the recorded blocks.
        scale: height and width of the picture, divided by those of the network's input.

    Returns:
        the weights, and a note if they are fewer than usual.
    """
    found: list[BlockWeights] = []
    left_out = 0
    for block in blocks:
        if block.among is None:
            continue
        weights = block.among[0]  # h × n × n
        heads, n, _ = weights.shape
        if heads * n * n > MOST_WEIGHTS:
            weights = weights.mean(dim=0, keepdim=True)
        if weights.numel() > MOST_WEIGHTS:
            left_out += 1
            continue
        label = block.name.partition("blocks.")[2]  # STAGE.BLOCK, as tools/visualize.py takes it
        found.append(_block(label, block.grid, block.stride, scale, weights, is_mean=len(weights) < heads))
    if not found:
        return [], "At this size, every block has a single window, so there is no attention among windows."
    if not left_out and len(found) > 1:
        total = rollout(blocks)
        found.append(_block("rollout", total.grid, total.stride, scale, total.weights, is_mean=True))
    return found, f"{left_out} blocks have too many windows to show at this size." if left_out else ""


def _block(
    label: str, grid: tuple[int, int], stride: int, scale: tuple[float, float], weights: Tensor, is_mean: bool
) -> BlockWeights:
    side = (stride * scale[0], stride * scale[1])
    return BlockWeights(label, grid, side, weights.float().cpu().numpy(), is_mean)


def record(
    network: nn.Module, run: Callable[[], object], scale: Callable[[], tuple[float, float]]
) -> tuple[list[BlockWeights], str]:
    """Run a segmentor or detector once, and collect the attention of its backbone.

    Args:
        network: the segmentor or detector.
        run: runs it on an image. Always called once.
        scale: see `weights_of`; called after `run`.

    Returns:
        see `weights_of`.
    """
    ran: list[object] = []
    try:
        blocks = record_attention(network, torch.empty(0), lambda _: ran.append(run()))
    except ValueError:
        if not ran:
            run()  # recording was given up halfway
        return [], "This network runs its backbone several times for an image, so its attention is not shown."
    return weights_of(blocks, scale())
