"""Preprocessing of images for validation, prediction and exported files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.data.transforms import MaybeToTensor
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.saved_settings import img_size_of

MAX_ASPECT = 16  # maximum aspect ratio of images that are resized whole; see `Preprocessing.bounded`


@dataclass(frozen=True)
class Preprocessing:
    """DeiT's transform for validation: resize the shorter side, crop the centre, normalise.

    Attributes:
        size: height and width of the network's input, in pixels.
        resize: length of the image's shorter side before the crop, in pixels. If height and width of the input differ,
            the image is resized to cover a rectangle of the input's shape, whose shorter side is `resize`.
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
    def for_size(cls, size: int | Sequence[int]) -> "Preprocessing":
        """Preprocessing of the published evaluation: resize to 256/224 of `size` (a side, or H and W), then crop."""
        height, width = to_2tuple(size)
        return cls((height, width), int(min(height, width) * 256 / 224))

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
    def of_weights(cls, checkpoint: Mapping[str, Any], model: str, size: int | Sequence[int]) -> "Preprocessing":
        """Preprocessing that matches the training of a checkpoint's network.

        Args:
            checkpoint: the checkpoint. If it does not record its preprocessing, the result is the published
                preprocessing for a checkpoint with main.py's settings, and timm's preprocessing for bare weights.
            model: timm's name for the network.
            size: side of the input in pixels, or height and width.
        """
        published = cls.for_size(size)
        if "preprocessing" in checkpoint:
            saved = cls.from_json(checkpoint["preprocessing"])
            side = min(saved.size)
            is_published = saved.resize == cls.for_size(side).resize
            resize = published.resize if is_published else int(min(published.size) * saved.resize / side)
            return replace(saved, size=published.size, resize=resize)
        known = get_pretrained_cfg(model)
        if img_size_of(dict(checkpoint)) or known is None:
            return published
        return cls.from_timm(known.to_dict(), published.size)

    def varied(
        self,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
    ) -> "Preprocessing":
        """Change settings; None keeps them.

        Args:
            channels: channels of the images. If their number changes, mean and standard deviation are 0.5 by default.
            mean: mean of each channel, or of all.
            std: standard deviation of each channel, or of all.
            crop_pct: side of the input divided by `resize`.
            interpolation: see `Preprocessing`.

        Raises:
            UserError: there are not as many values as channels.
        """
        same = len(self.mean) == channels
        mean = mean or (self.mean if same else IMAGENET_INCEPTION_MEAN[:1])
        std = std or (self.std if same else IMAGENET_INCEPTION_STD[:1])
        for name, given in dict(mean=mean, std=std).items():
            if len(given) not in (1, channels):
                raise UserError(f"{setting(name, *given)}: the images have {channels} channels; pass 1 or {channels}")
        mean, std = (tuple(values) * (channels // len(values)) for values in (mean, std))
        resize = math.floor(min(self.size) / crop_pct) if crop_pct else self.resize
        return replace(self, mean=mean, std=std, resize=resize, interpolation=interpolation or self.interpolation)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)

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
        size = " × ".join(map(str, dict.fromkeys(self.size)))
        return f"mean {mean}, std {std}, {kind} {size} of {self.resize} pixels, {self.interpolation}"

    def transform(self, *steps: Callable[[Any], Any]) -> transforms.Compose:
        """Build the transform from an image to a normalised tensor, C × H × W.

        Args:
            *steps: further steps, between crop and normalisation.
        """
        return transforms.Compose([self.crop, *steps, MaybeToTensor(), transforms.Normalize(self.mean, self.std)])

    def crop(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """Resize and crop an image, RGB or C × H × W, to the network's input."""
        interpolation = transforms.InterpolationMode(self.interpolation)
        size = list(self._covered) if self.squash else [self.resize]
        image = self.bounded(image)
        if not self.squash and self.size[0] != self.size[1]:
            width, height = functional.get_image_size(image)
            scale = min(height / self._covered[0], width / self._covered[1])
            size = [round(height / scale), round(width / scale)]
        return functional.center_crop(functional.resize(image, size, interpolation), self.size)

    @property
    def _covered(self) -> tuple[int, int]:
        """Height and width of the rectangle that the resized image covers, in the shape of the input."""
        height, width = (side * self.resize // min(self.size) for side in self.size)
        return height, width

    def bounded(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """Crop a very long image to its middle part: the area of the centre crop, with some margin.

        Resizing a whole image of 1 × 50,000 pixels would take gigabytes.
        """
        width, height = functional.get_image_size(image)
        if self.squash or max(width, height) <= MAX_ASPECT * min(width, height):
            return image
        scale = min(height / self._covered[0], width / self._covered[1])
        longest = math.ceil(MAX_ASPECT * max(self.size) * scale)
        rows, columns = min(height, longest), min(width, longest)
        return functional.crop(image, (height - rows) // 2, (width - columns) // 2, rows, columns)
