"""Sample images for the page of tools/app.py, from packages that are installed anyway."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

PHOTOGRAPHS = {"chelsea": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket", "astronaut": "an astronaut"}
DIGITS = ("3", "8")
SCENES = 2


@dataclass(frozen=True)
class Sample:
    """A sample image.

    Attributes:
        name: in its address.
        label: what is on it.
        media_type: of the file.
        content: the file's bytes.
    """

    name: str
    label: str
    media_type: str
    content: bytes


def load_samples(kind: str, classes: Sequence[str]) -> dict[str, Sample]:
    """Load the samples, by name: photographs, and a digit; first what the network was trained for.

    Args:
        kind: of the network: 'classifier', 'segmentor' or 'detector'.
        classes: names of its classes.
    """
    photographs = _photographs()
    if not set(DIGITS) <= set(classes):
        samples = photographs + _digits(DIGITS[:1])
    elif kind == "classifier":
        samples = _digits(DIGITS) + photographs
    else:
        samples = _scenes() + photographs
    return {sample.name: sample for sample in samples}


def _photographs() -> list[Sample]:
    """Photographs that scikit-image carries in its package."""
    from skimage import data

    return [
        Sample(name, label, "image/jpeg", _file(Image.fromarray(getattr(data, name)()), "JPEG"))
        for name, label in PHOTOGRAPHS.items()
    ]


def _digits(names: Sequence[str]) -> list[Sample]:
    """Handwritten digits of scikit-learn, 8 × 8 pixels: of the part that the demo does not train on."""
    from sklearn.datasets import load_digits

    from tools.make_demo_data import split_digits

    digits = load_digits()
    validation = split_digits()[1]
    samples = []
    for name in names:
        index = next(index for index in validation if digits.target[index] == int(name))
        pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
        samples.append(Sample(f"digit-{name}", f"the digit {name}", "image/png", _file(Image.fromarray(pixels), "PNG")))
    return samples


def _scenes() -> list[Sample]:
    """Scenes of digits, composed like the demo's, of digits and photographs that the demo does not train on."""
    from sklearn.datasets import load_digits

    from tools.make_demo_data import compose_scene, photographs, split_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    validation, backgrounds = split_digits()[1], photographs("validation")
    images, labels = digits.images[validation], digits.target[validation]
    scenes = [compose_scene(rng, images, labels, backgrounds) for _ in range(SCENES)]
    return [
        Sample(f"scene-{number}", f"scene {number} of digits", "image/png", _file(Image.fromarray(scene.image), "PNG"))
        for number, scene in enumerate(scenes, 1)
    ]


def _file(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 92} if kind == "JPEG" else {}))
    return file.getvalue()
