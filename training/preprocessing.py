"""How an image becomes a network's input in validation, prediction and exported files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, normalise: DeiT's transform for validation.

    Attributes:
        size: height and width of the network's input, in pixels.
        resize: length of the image's shorter side before the crop, in pixels.
        mean: mean of each channel, on a scale of 0 to 1.
        std: standard deviation of each channel, likewise.
        interpolation: 'bicubic' or 'bilinear', antialiased.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"

    @classmethod
    def for_size(cls, size: int) -> "Preprocessing":
        """Preprocess square inputs as the published evaluation does: crop 224 of 256 pixels, or in that proportion."""
        return cls((size, size), int(size * 256 / 224))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Make it from what `to_json` returned."""
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**lists)

    def to_json(self) -> dict[str, Any]:
        """Return it as fields that JSON can hold."""
        return asdict(self)

    def transform(self) -> transforms.Compose:
        """Build the transform from an RGB image to a normalised tensor, 3 × H × W."""
        return transforms.Compose([*self._crop(), transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the part of an image that the network sees, in its size."""
        for step in self._crop():
            image = step(image)
        return image

    def _crop(self) -> list[Any]:
        interpolation = transforms.InterpolationMode(self.interpolation)
        return [transforms.Resize(self.resize, interpolation=interpolation), transforms.CenterCrop(self.size)]
