"""Shears and translations of the fast loader's workers: rows, or columns, that move along themselves.

PIL computes them as general affine transforms, from 16 pixels for each. Along a row, 4 are enough. Results equal PIL's
to a grey level (tested).
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


def with_shifts(augmentation: RandAugment) -> RandAugment:
    """RandAugment whose shears and translations are those of this module. It draws the same random numbers."""
    operations = np.array([copy.copy(operation) for operation in augmentation.ops], dtype=object)
    for operation in operations:
        if operation.aug_fn in SHIFTS:
            operation.aug_fn = partial(_shift, operation.aug_fn)
    return RandAugment(operations, augmentation.num_layers, augmentation.choice_weights)


def _shear(rows: int, columns: int, factor: float) -> np.ndarray:
    """How far each row of a sheared image is moved, in pixels."""
    return factor * (np.arange(rows) + 0.5)


def _translate(rows: int, columns: int, share: float) -> np.ndarray:
    """How far each row of an image is moved that is translated by a share of its width, in pixels."""
    return np.full(rows, share * columns)


def _shift(
    function: Callable[..., Image.Image],
    image: Image.Image,
    strength: float,
    fillcolor: tuple[int, int, int],
    resample: Any,
) -> Image.Image:
    """Shear or translate an image.

    Args:
        function: timm's function.
        image: the image.
        strength: timm's level.
        fillcolor: colour outside the image.
        resample: PIL's interpolation, or several, of which one is drawn, as timm does.
    """
    if isinstance(resample, (list, tuple)):
        resample = random.choice(resample)
    if resample != Image.Resampling.BICUBIC:  # PIL is as fast
        return function(image, strength, fillcolor=fillcolor, resample=resample)
    offsets_of, is_vertical = SHIFTS[function]
    if is_vertical:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    offsets = offsets_of(image.height, image.width, strength)
    moved = Image.fromarray(move_rows(np.asarray(image), offsets, fillcolor))
    return moved.transpose(Image.Transpose.TRANSPOSE) if is_vertical else moved


# How far timm's functions move each row of an image, and whether they move columns instead.
SHIFTS: dict[Callable[..., Any], tuple[Callable[[int, int, float], np.ndarray], bool]] = {
    auto_augment.shear_x: (_shear, False),
    auto_augment.shear_y: (_shear, True),
    auto_augment.translate_x_rel: (_translate, False),
    auto_augment.translate_y_rel: (_translate, True),
}


def cubic_weights(part: Numbers) -> list[Numbers]:
    """Weights of the four pixels around a place, which is at `part` between the middle ones. PIL's cubic has a = -1."""
    square = part * part
    cube = square * part
    return [2 * square - part - cube, 1 - 2 * square + cube, part + square - cube, cube - square]


def move_rows(pixels: np.ndarray, offsets: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Move the rows of an image along themselves, with bicubic interpolation.

    Args:
        pixels: H × W × 3, uint8.
        offsets: how far each row is moved to the left, in pixels, H.
        fill: colour outside the image.
    """
    rows, columns, _ = pixels.shape
    whole = np.floor(offsets).astype(int)
    weights = cubic_weights((offsets - whole).astype(np.float32)[:, None])
    taps = torch.from_numpy(rows_from(pixels, whole - 1, columns + 3)).float()
    width = 3 * columns
    result = taps[:, :width] * torch.from_numpy(weights[0])
    for number, weight in enumerate(weights[1:], start=1):
        result.addcmul_(taps[:, 3 * number : 3 * number + width], torch.from_numpy(weight))
    moved = result.clamp_(0, 255).to(torch.uint8).numpy()
    # A pixel is inside if 0 <= column + 0.5 + offset < columns.
    inside = (3 * np.ceil(limit - 0.5 - offsets).clip(0, columns).astype(int) for limit in (0, columns))
    blank = np.tile(np.array(fill, np.uint8), columns)
    for row, first, end in zip(moved, *(edge.tolist() for edge in inside)):
        if first > 0:
            row[:first] = blank[:first]
        if end < width:
            row[end:] = blank[end:]
    return moved.reshape(rows, columns, 3)


def rows_from(pixels: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Part of each row of an image, which is continued by its first and last pixels.

    Args:
        pixels: H × W × 3.
        starts: column at which the part of each row begins, H.
        length: pixels in it.

    Returns:
        H × 3 length.
    """
    rows, columns, _ = pixels.shape
    before, after = max(0, -int(starts.min())), max(0, int(starts.max()) + length - columns)
    left, right = (
        np.repeat(pixels[:, column], number, axis=0).reshape(rows, number, 3)
        for column, number in ((0, before), (-1, after))
    )
    padded = np.concatenate([left, pixels, right], axis=1)
    first = np.arange(rows) * padded.shape[1] + before + starts
    return sliding_window_view(padded.reshape(-1), 3 * length)[3 * first]
