"""Decoding of a training image's random crop: of a JPEG no more than the crop needs, of other images everything."""

import importlib
import io
import math
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

from sepvit_lib.training.errors import UserError, setting
from sepvit_lib.training.images import EXIF, STORED, UPRIGHT, Encoded, decode, open_image, orientation_of

PLAIN = ("YCbCr", "Gray", "RGB")  # colour spaces of JPEGs that both PIL and simplejpeg convert to the same RGB
SCALES = (8, 4, 2)  # fractions of a JPEG's size at which it can be decoded, by fewer coefficients of each block
JPEG_START = b"\xff\xd8"
ROUNDING = 1e-3  # of a pixel of the crop


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
        height: height of the crop in it, from its top, in pixels; not a whole number if the image is scaled.
        width: width of the crop in it, from its left.
        mode: interpolation for resizing.
    """

    pixels: np.ndarray
    height: float
    width: float
    mode: InterpolationMode


class CropDecoder:
    """Random resized crop of an image file.

    The box is drawn by timm's transform, which the faithful loader uses too: the same random numbers give the same box.
    A JPEG whose box is at least 2, 4 or 8 times as large as the crop on both sides is decoded at that fraction of its
    size, by libjpeg-turbo's scaled inverse cosine transform. There, the box keeps its size, and its corner moves to the
    nearest pixel.

    Args:
        crop: timm's transform.
        orientation: see `sepvit_lib.training.images.decode`.

    Raises:
        UserError: simplejpeg is not installed.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, orientation: str = STORED) -> None:
        self.crop = crop
        self.orientation = orientation
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
        return decode_and_crop(self.crop, self.orientation, source)

    def decode(self, content: bytes) -> Part:
        """Draw a random crop of a JPEG, and decode what it needs.

        Raises:
            ValueError: the JPEG is damaged, has to be turned, or is of a kind that only PIL decodes.
        """
        if self.orientation == EXIF and orientation_of(open_image(io.BytesIO(content))) != UPRIGHT:
            raise ValueError("to be turned")
        jpeg = import_decoder()
        height, width, space, _ = jpeg.decode_jpeg_header(content)
        if space not in PLAIN or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            raise ValueError(f"{space}, {height} × {width} pixels")
        top, left, rows, columns = self.crop.get_params(_blank(height, width), self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (list, tuple)) else modes
        scale = next((scale for scale in SCALES if min(rows, columns) >= scale * self.size), 1)
        least = (
            dict(min_height=-(-height // scale), min_width=-(-width // scale), min_factor=scale) if scale > 1 else {}
        )
        pixels = jpeg.decode_jpeg(content, **least)
        crop_height, crop_width = rows / scale, columns / scale
        y = min(round(top / scale), int(pixels.shape[0] - crop_height))
        x = min(round(left / scale), int(pixels.shape[1] - crop_width))
        part = pixels[y : y + math.ceil(crop_height), x : x + math.ceil(crop_width)]
        return Part(part, crop_height, crop_width, mode)

    def resize(self, part: Part) -> np.ndarray:
        """Resize a crop with antialiasing, to size × size × 3."""
        image = torch.from_numpy(part.pixels)[None].permute(0, 3, 1, 2)  # in this order, torch sees channels last
        # The size is the scaled part's, rounded down, so that it must not be a hair less.
        factors = [(self.size + ROUNDING) / side for side in (part.height, part.width)]
        resized = F.interpolate(image, scale_factor=factors, mode=part.mode.value, antialias=True)
        return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()


def decode_and_crop(crop: Callable[[Image.Image], Image.Image], orientation: str, source: Encoded) -> np.ndarray:
    """Decode and crop an image by PIL.

    Args:
        crop: transform of PIL images.
        orientation: see `sepvit_lib.training.images.decode`.
        source: an image file's content, or an image.

    Returns:
        pixels, H × W × 3, uint8.

    Raises:
        OSError: the image is unreadable.
    """
    return np.array(crop(decode(source, orientation)))


def _blank(height: int, width: int) -> Tensor:
    """An image of a size, for functions that only ask for it. Takes no memory."""
    return torch.empty(()).expand(3, height, width)
