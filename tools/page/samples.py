"""Sample images for the page of tools/app.py, from the packages of the demo."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sepvit_lib.common.packages import lacking
from tools.make_demo_data import compose_scenes, digit_pixels, load_digits, split_digits

PHOTOGRAPHS = {"chelsea": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket", "astronaut": "an astronaut"}
DIGITS = ("3", "8")
SCENES = 2


@dataclass(frozen=True)
class Sample:
    """A sample image.

    Attributes:
        label: description of what the image shows.
        content: the image as PNG.
    """

    label: str
    content: bytes


def load_samples(kind: str, classes: Sequence[str]) -> dict[str, Sample]:
    """Load the page's sample images: photographs, and handwritten digits or scenes of digits.

    The samples that suit the network's classes come first.

    Args:
        kind: kind of the network, 'classifier', 'segmentor' or 'detector'.
        classes: names of its classes.

    Returns:
        the samples by name; empty if the demo's packages are not installed.
    """
    if lacking("skimage", "sklearn"):
        return {}
    from skimage import data

    photographs = {name: _sample(label, getattr(data, name)()) for name, label in PHOTOGRAPHS.items()}
    if not set(DIGITS) <= set(classes):
        return photographs | _digits(DIGITS[:1])
    return (_digits(DIGITS) if kind == "classifier" else _scenes()) | photographs


def _digits(names: Sequence[str]) -> dict[str, Sample]:
    """Handwritten digits, 8 × 8 pixels, from the demo's validation set."""
    digits, validation = load_digits(), split_digits()[1]
    first = {name: next(index for index in validation if digits.target[index] == int(name)) for name in names}
    return {
        f"digit-{name}": _sample(f"the digit {name}", digit_pixels(digits.images[index]))
        for name, index in first.items()
    }


def _scenes() -> dict[str, Sample]:
    """Scenes composed as in the demo, from the digits and photographs of its validation set."""
    scenes = compose_scenes({"training": 0, "validation": SCENES})["validation"]
    return {f"scene-{number}": _sample(f"scene {number} of digits", one.image) for number, one in enumerate(scenes, 1)}


def _sample(label: str, pixels: np.ndarray) -> Sample:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Sample(label, file.getvalue())
