"""Random crops of training images. JPEGs are decoded at a reduced size if it suffices for the crop."""

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

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.packages import lacking
from sepvit_lib.pipeline.image_files import EXIF, STORED, UPRIGHT, Encoded, decode, open_image, orientation_of

SCALES = (8, 4, 2, 1)  # a JPEG can be decoded at 1/8, 1/4 or 1/2 of its size, from fewer coefficients of each block
ROUNDING = 1e-3  # in pixels, added to the side of the output so that rounding down loses no pixel


class Part(NamedTuple):
    """The part of an image that a crop needs.

    Attributes:
        pixels: H × W × 3, uint8.
        height: height of the crop from the top of `pixels`; fractional if the image is scaled.
        width: width of the crop from the left of `pixels`; also fractional if the image is scaled.
        mode: interpolation for resizing.
    """

    pixels: np.ndarray
    height: float
    width: float
    mode: InterpolationMode


class CropDecoder:
    """Random resized crop of an image file.

    timm's transform draws the box to crop, as in the faithful loader: the same random numbers yield the same box. If
    both sides of the box are at least 2, 4 or 8 times as long as those of the output, a JPEG is decoded at 1/2, 1/4 or
    1/8 of its size, by libjpeg-turbo's scaled inverse DCT. The scaled box keeps its fractional size, but its top left
    corner is rounded to whole pixels.

    Args:
        crop: timm's transform.
        orientation: see `sepvit_lib.pipeline.image_files.decode`.

    Raises:
        UserError: simplejpeg is not installed. Only the fast loader needs it.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, orientation: str = STORED) -> None:
        self.crop = crop
        self.orientation = orientation
        self.size: tuple[int, int] = crop.size
        if problem := lacking("simplejpeg", extra="fast"):
            raise UserError(f"{setting('loader', 'fast')}: {problem}, or use faithful")

    def __call__(self, source: Encoded) -> Image.Image:
        """Decode and resize a random crop.

        Args:
            source: an image file's content, or an image.

        Raises:
            OSError: the image is unreadable.
        """
        if isinstance(source, bytes):
            with suppress(ValueError):  # unusual or damaged: PIL reads it, or reports the damage
                return self.resize(self.decode(source))
        return self.crop(decode(source, self.orientation))

    def decode(self, content: bytes) -> Part:
        """Draw a random crop of a JPEG, and decode the JPEG at the smallest size that suffices for the crop.

        Raises:
            ValueError: the image is damaged, must be turned upright, or can only be decoded by PIL.
            OSError: the content is not an image.
        """
        from simplejpeg import decode_jpeg

        image = open_image(io.BytesIO(content))
        is_upright = self.orientation != EXIF or orientation_of(image) == UPRIGHT
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or not is_upright:
            raise ValueError(f"{image.format}, {image.mode}, {'' if is_upright else 'not '}upright")
        top, left, rows, columns = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (list, tuple)) else modes
        scale = next((scale for scale in SCALES if rows >= scale * self.size[0] and columns >= scale * self.size[1]), 1)
        min_height, min_width = (math.ceil(side / scale) for side in (image.height, image.width))
        pixels = decode_jpeg(content, min_height=min_height, min_width=min_width, min_factor=scale)
        height, width = rows / scale, columns / scale
        y = min(round(top / scale), int(pixels.shape[0] - height))
        x = min(round(left / scale), int(pixels.shape[1] - width))
        return Part(pixels[y : y + math.ceil(height), x : x + math.ceil(width)], height, width, mode)

    def resize(self, part: Part) -> Image.Image:
        """Resize a crop with antialiasing, to the size of the network's input."""
        image = torch.from_numpy(part.pixels)[None].permute(0, 3, 1, 2)  # torch sees this permutation as channels-last
        # interpolate rounds the scaled size down: without ROUNDING, the output may be a pixel short.
        factors = [(new + ROUNDING) / old for new, old in zip(self.size, (part.height, part.width))]
        resized = F.interpolate(image, scale_factor=factors, mode=part.mode.value, antialias=True)
        return Image.fromarray(resized.permute(0, 2, 3, 1)[0].contiguous().numpy())
