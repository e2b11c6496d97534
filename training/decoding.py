"""Decoding of a training image's random crop: of a JPEG no more than the crop needs, of other images everything."""

import importlib
import io
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode

from training.errors import UserError, setting

PLAIN = ("YCbCr", "Gray", "RGB")  # colour spaces of JPEGs that both PIL and simplejpeg convert to the same RGB
SCALES = (8, 4, 2)  # fractions of a JPEG's size at which it can be decoded, by fewer coefficients of each block
JPEG_START = b"\xff\xd8"
PIL_MODES = {InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}

Encoded = bytes | Image.Image  # an image file's content, or an image of a data set that decodes by itself


def as_rgb(source: Encoded) -> Image.Image:
    """Decode an image by PIL, as the faithful loader does.

    Args:
        source: an image file's content, or an image.

    Raises:
        OSError: the image is unreadable.
    """
    return (Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source).convert("RGB")


def import_decoder() -> Any:
    """Import simplejpeg, which only the fast loader needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("simplejpeg")
    except ImportError as error:
        what = setting("loader", "fast")
        raise UserError(f"{what}: needs simplejpeg ({error}): pip install simplejpeg, or use faithful") from None


class Part(NamedTuple):
    """The part of an image that a crop needs.

    Attributes:
        pixels: H × W × 3, uint8.
        box: the crop in it, or None if it is the whole part: left, top, right, bottom. Edges may lie between pixels.
        mode: interpolation for resizing.
    """

    pixels: np.ndarray
    box: tuple[float, float, float, float] | None
    mode: InterpolationMode


class CropDecoder:
    """Random resized crop of an image file.

    The box is drawn by timm's transform, which the faithful loader uses too: the same random numbers give the same box.
    A JPEG whose box is at least 2, 4 or 8 times as large as the crop on both sides is decoded at that fraction of its
    size, by libjpeg-turbo's scaled inverse cosine transform. An EXIF orientation is ignored, as by the faithful loader.

    Args:
        crop: timm's transform.

    Raises:
        UserError: simplejpeg is not installed.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop
        self.size: int = crop.size[0]
        import_decoder()

    def __call__(self, source: Encoded) -> np.ndarray:
        """Decode and resize a random crop.

        Args:
            source: an image file's content, or an image.

        Returns:
            pixels, size × size × 3, uint8.

        Raises:
            OSError: the image is unreadable.
        """
        if isinstance(source, bytes) and source.startswith(JPEG_START):
            try:
                return self.resize(self.decode(source))
            except ValueError:  # unusual or damaged: PIL says whether it is readable, and names the damage
                pass
        return decode_and_crop(self.crop, source)

    def decode(self, content: bytes) -> Part:
        """Draw a random crop of a JPEG, and decode what it needs.

        Raises:
            ValueError: the JPEG is damaged, or of a kind that only PIL decodes.
        """
        jpeg = import_decoder()
        height, width, space, _ = jpeg.decode_jpeg_header(content)
        if space not in PLAIN or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            raise ValueError(f"{space}, {height} × {width} pixels")
        top, left, rows, columns = self.crop.get_params(_blank(height, width), self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (list, tuple)) else modes
        scale = next((scale for scale in SCALES if min(rows, columns) >= scale * self.size), 1)
        if scale == 1:
            pixels = jpeg.decode_jpeg(content)
            return Part(pixels[top : top + rows, left : left + columns], None, mode)
        least = dict(min_height=-(-height // scale), min_width=-(-width // scale), min_factor=scale)
        box = (left / scale, top / scale, (left + columns) / scale, (top + rows) / scale)
        return Part(jpeg.decode_jpeg(content, **least), box, mode)

    def resize(self, part: Part) -> np.ndarray:
        """Resize a crop with antialiasing, to size × size × 3."""
        if part.box is not None:  # torch has no resizing of a box whose edges lie between pixels
            whole = Image.fromarray(part.pixels)
            return np.array(whole.resize((self.size, self.size), PIL_MODES[part.mode], part.box))
        image = torch.from_numpy(part.pixels)[None].permute(0, 3, 1, 2)  # in this order, torch sees channels last
        resized = F.interpolate(image, (self.size, self.size), mode=part.mode.value, antialias=True)
        return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def decode_and_crop(crop: Callable[[Image.Image], Image.Image], source: Encoded) -> np.ndarray:
    """Decode and crop an image by PIL.

    Args:
        crop: transform of PIL images.
        source: an image file's content, or an image.

    Returns:
        pixels, H × W × 3, uint8.

    Raises:
        OSError: the image is unreadable.
    """
    return np.array(crop(as_rgb(source)))


def _blank(height: int, width: int) -> Tensor:
    """An image of a size, for functions that only ask for it. Takes no memory."""
    return torch.empty(()).expand(3, height, width)
