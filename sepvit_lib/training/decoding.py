"""Decoding of a training image's random crop: of a JPEG no more than the crop needs, of other images everything."""

import importlib.util
import io
import math
import random
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode

from sepvit_lib.training.errors import UserError, setting
from sepvit_lib.training.images import EXIF, STORED, UPRIGHT, Encoded, decode, open_image, orientation_of

SCALES = (8, 4, 2, 1)  # a JPEG can be decoded at these fractions of its size, by fewer coefficients of each block
ROUNDING = 1e-3  # of a pixel of the crop


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
        UserError: simplejpeg is not installed. Only the fast loader needs it.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, orientation: str = STORED) -> None:
        self.crop = crop
        self.orientation = orientation
        self.size: int = crop.size[0]
        if importlib.util.find_spec("simplejpeg") is None:
            raise UserError(f"{setting('loader', 'fast')}: needs simplejpeg: pip install '.[fast]', or use faithful")

    def __call__(self, source: Encoded) -> Image.Image:
        """Decode and resize a random crop.

        Args:
            source: an image file's content, or an image.

        Raises:
            OSError: the image is unreadable.
        """
        if isinstance(source, bytes):
            with suppress(ValueError):  # unusual or damaged: PIL says whether it is readable, and names the damage
                return self.resize(self.decode(source))
        return self.crop(decode(source, self.orientation))

    def decode(self, content: bytes) -> Part:
        """Draw a random crop of a JPEG, and decode what it needs.

        Raises:
            ValueError: it is damaged, has to be turned, or is an image that only PIL decodes.
            OSError: it is no image.
        """
        from simplejpeg import decode_jpeg

        image = open_image(io.BytesIO(content))
        is_upright = self.orientation != EXIF or orientation_of(image) == UPRIGHT
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or not is_upright:
            raise ValueError(f"{image.format}, {image.mode}, {'' if is_upright else 'not '}upright")
        top, left, rows, columns = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (list, tuple)) else modes
        scale = next((scale for scale in SCALES if min(rows, columns) >= scale * self.size), 1)
        least_height, least_width = (math.ceil(side / scale) for side in (image.height, image.width))
        pixels = decode_jpeg(content, min_height=least_height, min_width=least_width, min_factor=scale)
        height, width = rows / scale, columns / scale
        y = min(round(top / scale), int(pixels.shape[0] - height))
        x = min(round(left / scale), int(pixels.shape[1] - width))
        return Part(pixels[y : y + math.ceil(height), x : x + math.ceil(width)], height, width, mode)

    def resize(self, part: Part) -> Image.Image:
        """Resize a crop with antialiasing, to size × size."""
        image = torch.from_numpy(part.pixels)[None].permute(0, 3, 1, 2)  # in this order, torch sees channels last
        # The size is the scaled part's, rounded down, so that it must not be a hair less.
        factors = [(self.size + ROUNDING) / side for side in (part.height, part.width)]
        resized = F.interpolate(image, scale_factor=factors, mode=part.mode.value, antialias=True)
        return Image.fromarray(resized.permute(0, 2, 3, 1)[0].contiguous().numpy())
