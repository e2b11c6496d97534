"""Preprocessing of images for validation, prediction and exported files."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torchvision import transforms

from sepvit_lib.common.saved_settings import img_size_of

MAX_ASPECT = 16  # maximum aspect ratio of images that are resized whole; see `Preprocessing.bounded`


@dataclass(frozen=True)
class Preprocessing:
    """DeiT's transform for validation: resize the shorter side, crop the centre, normalise.

    Attributes:
        size: height and width of the network's input, in pixels.
        resize: length of the image's shorter side before the crop, in pixels.
        mean: mean of each channel, on a scale of 0 to 1.
        std: standard deviation of each channel, on the same scale.
        interpolation: 'bicubic' or 'bilinear', antialiased.
        squash: whether to resize both sides to `resize`, which changes the aspect ratio.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    squash: bool = False

    @classmethod
    def for_size(cls, size: int) -> "Preprocessing":
        """Preprocessing of the published evaluation, for square inputs: resize to 256/224 of `size`, then crop."""
        return cls((size, size), int(size * 256 / 224))

    @classmethod
    def from_timm(cls, settings: Mapping[str, Any], size: tuple[int, int] | None = None) -> "Preprocessing":
        """Convert timm's settings of a network's preprocessing.

        Args:
            settings: the network's `pretrained_cfg`.
            size: height and width of the input; None for the size in `settings`.
        """
        height, width = size or settings["input_size"][1:]
        resize = math.floor(min(height, width) / settings["crop_pct"])
        mean, std, squash = tuple(settings["mean"]), tuple(settings["std"]), settings.get("crop_mode") == "squash"
        return cls((height, width), resize, mean, std, settings["interpolation"], squash)

    @classmethod
    def of_weights(cls, checkpoint: Mapping[str, Any], model: str, size: int) -> "Preprocessing":
        """Preprocessing that matches the training of a checkpoint's network.

        Args:
            checkpoint: the checkpoint. If it does not record its preprocessing, the result is the published
                preprocessing for a checkpoint with main.py's settings, and timm's preprocessing for bare weights.
            model: timm's name for the network.
            size: side of the input in pixels.
        """
        if "preprocessing" in checkpoint:
            saved = cls.from_json(checkpoint["preprocessing"])
            side = min(saved.size)
            is_published = saved.resize == cls.for_size(side).resize
            resize = cls.for_size(size).resize if is_published else int(size * saved.resize / side)
            return replace(saved, size=(size, size), resize=resize)
        known = get_pretrained_cfg(model)
        if img_size_of(dict(checkpoint)) or known is None:
            return cls.for_size(size)
        return cls.from_timm(known.to_dict(), (size, size))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Restore the preprocessing from the result of `to_json`."""
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**lists)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can represent."""
        return asdict(self)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        kind = "squashed to" if self.squash else "a crop of"
        return f"mean {mean}, std {std}, {kind} {min(self.size)} of {self.resize} pixels, {self.interpolation}"

    def transform(self) -> transforms.Compose:
        """Build the transform from an RGB image to a normalised tensor, 3 × H × W."""
        return transforms.Compose([self.crop, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image to the network's input."""
        interpolation = transforms.InterpolationMode(self.interpolation)
        size = (self.resize, self.resize) if self.squash else self.resize
        resized = transforms.functional.resize(self.bounded(image), size, interpolation)
        return transforms.functional.center_crop(resized, self.size)

    def bounded(self, image: Image.Image) -> Image.Image:
        """Crop a very long image to its middle part: the area of the centre crop, with some margin.

        Resizing a whole image of 1 × 50,000 pixels would take gigabytes.
        """
        if self.squash or max(image.size) <= MAX_ASPECT * min(image.size):
            return image
        scale = min(image.size) / self.resize
        width, height = (min(side, math.ceil(MAX_ASPECT * max(self.size) * scale)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
