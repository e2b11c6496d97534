"""Augmentation of the fast loader in its workers: crops with what a GPU is to do to them, or augmented by PIL already.

timm's transforms draw all random numbers, in the same order as in the faithful loader. Where a GPU augments, stand-ins
take the place of the image and record what the transforms would do to it.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import RandomHorizontalFlip

from sepvit_lib.training.shifts import with_shifts

VALUES = 9  # of an operation: its strength, or its affine matrix (6) and the colour outside the image (3)

Region = tuple[int, int, int, int]  # top, left, bottom, right


class Operation(NamedTuple):
    """An operation on one image.

    Attributes:
        kind: one of `sepvit_lib.training.device_augmentation.OPERATIONS`.
        values: at most `VALUES` numbers.
    """

    kind: str
    values: tuple[float, ...]


FLIP = Operation("flip", ())


class Crop(NamedTuple):
    """A random crop, and what is still to be done to it.

    Attributes:
        pixels: H × W × 3, uint8.
        is_flipped: whether to flip it horizontally.
        operations: RandAugment's operations, in their order.
        regions: regions to erase.
    """

    pixels: Tensor
    is_flipped: bool
    operations: list[Operation]
    regions: list[Region]


@dataclass(frozen=True)
class CropBatch:
    """A batch of crops, and what is still to be done to them, grouped by operation.

    Attributes:
        pixels: B × H × W × 3, uint8.
        indices: the image of each operation, int64.
        values: the values of each operation, `VALUES` in a row, float32.
        groups: successive ranges of operations, each of one kind on different images: kind, first, last + 1.
        regions: regions to erase, each with its image.
    """

    pixels: Tensor
    indices: Tensor
    values: Tensor
    groups: list[tuple[str, int, int]]
    regions: list[tuple[int, Region]]

    def to(self, device: torch.device) -> "CropBatch":
        """Copy to a device. The copy from pinned memory is not waited for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "CropBatch":
        """Copy to pinned memory. torch's loaders call this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def share_memory_(self) -> "CropBatch":
        """Move to shared memory."""
        return self._each(lambda tensor: tensor.share_memory_())

    def _each(self, function: Callable[[Tensor], Tensor]) -> "CropBatch":
        """Apply a function to all tensors."""
        return replace(self, pixels=function(self.pixels), indices=function(self.indices), values=function(self.values))

    def __len__(self) -> int:
        return len(self.pixels)


def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    """Collate crops into a batch. Operations are grouped: flips, then all first ones by kind, all second ones, …"""
    drawn = [(-1, FLIP.kind, index, FLIP.values) for index, crop in enumerate(crops) if crop.is_flipped]
    drawn += [
        (place, operation.kind, index, operation.values)
        for index, crop in enumerate(crops)
        for place, operation in enumerate(crop.operations)
    ]
    drawn.sort(key=lambda entry: entry[:3])
    values = np.zeros((len(drawn), VALUES), np.float32)
    groups: dict[tuple[int, str], tuple[str, int, int]] = {}
    for row, (place, kind, _, numbers) in enumerate(drawn):
        values[row, : len(numbers)] = numbers
        first = groups.get((place, kind), (kind, row, row))[1]
        groups[place, kind] = (kind, first, row + 1)
    return CropBatch(
        default_collate([crop.pixels for crop in crops]),
        torch.tensor([index for _, _, index, _ in drawn], dtype=torch.int64),
        torch.from_numpy(values),
        list(groups.values()),
        [(index, region) for index, crop in enumerate(crops) for region in crop.regions],
    )


class CropAugmentation:
    """Augment a crop by timm's transforms, as far as it is not left to the device.

    Regions to erase are always drawn only: they are filled after normalisation. Of the transforms of PIL images, the
    device can do flips and RandAugment. With any other (AugMix, AutoAugment, colour jitter), all are done here.

    Args:
        steps: transforms of PIL images.
        erasing: random erasing, or None.
        size: side of the crops in pixels.
        on_device: leave to the device what it can do.
    """

    def __init__(self, steps: Sequence[Any], erasing: RandomErasing | None, size: int, on_device: bool) -> None:
        is_recorded = on_device and all(isinstance(step, (RandomHorizontalFlip, RandAugment)) for step in steps)
        self.steps = (
            [] if is_recorded else [with_shifts(step) if isinstance(step, RandAugment) else step for step in steps]
        )
        recorded = steps if is_recorded else []
        self.flips = [step.p for step in recorded if isinstance(step, RandomHorizontalFlip)]
        self.operations = [recording(step, size) for step in recorded if isinstance(step, RandAugment)]
        self.erasing = without_pixels(erasing) if erasing is not None else None
        self.size = size

    def __call__(self, pixels: np.ndarray) -> Crop:
        """Augment pixels, H × W × 3, uint8."""
        is_flipped = any([bool(torch.rand(1) < probability) for probability in self.flips])
        operations: list[Operation] = []
        for draw in self.operations:
            operations = draw(operations)
        if self.steps:
            image = Image.fromarray(pixels)
            for step in self.steps:
                image = step(image)
            pixels = np.array(image)
        return Crop(torch.from_numpy(pixels), is_flipped, operations, self.regions())

    def regions(self) -> list[Region]:
        """Draw the regions to erase."""
        recorder = RegionRecorder(self.size)
        if self.erasing is not None:
            self.erasing(recorder)
        return recorder.regions


# ----------------------------------------------------------------------------------------------------------------------
# Recording
# ----------------------------------------------------------------------------------------------------------------------


class RegionRecorder:
    """Stand-in for an image, 3 × size × size, which records the regions that are assigned to."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.shape = (3, size, size)
        self.regions: list[Region] = []

    def size(self) -> tuple[int, int, int]:
        """The image's shape."""
        return self.shape

    def __setitem__(self, region: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = region
        self.regions.append((rows.start, columns.start, rows.stop, columns.stop))


def without_pixels(erasing: RandomErasing) -> RandomErasing:
    """Random erasing that draws the same regions, but not what fills them."""
    regions = copy.copy(erasing)
    regions.per_pixel = regions.rand_color = False
    return regions


def recording(augmentation: RandAugment, size: int) -> RandAugment:
    """RandAugment that takes a list of operations, and returns it with those that it would apply to an image.

    Args:
        augmentation: timm's RandAugment, which draws operations and levels.
        size: side of the images in pixels.
    """
    operations = np.array([copy.copy(operation) for operation in augmentation.ops], dtype=object)
    for operation in operations:
        operation.aug_fn = partial(_record, operation.aug_fn, size)
    return RandAugment(operations, augmentation.num_layers, augmentation.choice_weights)


def _record(
    function: Callable[..., Any],
    size: int,
    operations: list[Operation],
    *level: float,
    fillcolor: tuple[int, int, int],
    resample: Any,
) -> list[Operation]:
    """Add the operation that one of timm's functions is at a level.

    Args:
        function: the function.
        size: side of the image in pixels.
        operations: the operations before.
        level: the function's arguments.
        fillcolor: colour outside the image.
        resample: PIL's interpolation, or several, of which timm's affine transforms draw one.
    """
    if function in STRENGTHS:
        return [*operations, Operation(STRENGTHS[function], level)]
    if isinstance(resample, (list, tuple)):
        resample = random.choice(resample)
    kind = "affine_bilinear" if resample == Image.Resampling.BILINEAR else "affine_bicubic"
    return [*operations, Operation(kind, (*MATRICES[function](size, *level), *fillcolor))]


def _shear_x(size: int, factor: float) -> tuple[float, ...]:
    return (1, factor, 0, 0, 1, 0)


def _shear_y(size: int, factor: float) -> tuple[float, ...]:
    return (1, 0, 0, factor, 1, 0)


def _translate_x(size: int, share: float) -> tuple[float, ...]:
    return (1, 0, share * size, 0, 1, 0)


def _translate_y(size: int, share: float) -> tuple[float, ...]:
    return (1, 0, 0, 0, 1, share * size)


def _rotate(size: int, degrees: float) -> tuple[float, ...]:
    """About the centre, as PIL rotates."""
    angle = -math.radians(degrees)
    cosine, sine, centre = math.cos(angle), math.sin(angle), size / 2
    return (cosine, sine, centre * (1 - cosine - sine), -sine, cosine, centre * (1 + sine - cosine))


# timm's functions with one strength or none, and the kinds of their operations
STRENGTHS = {
    getattr(auto_augment, kind): kind
    for kind in (
        "auto_contrast",
        "equalize",
        "invert",
        "posterize",
        "solarize",
        "solarize_add",
        "color",
        "contrast",
        "brightness",
        "sharpness",
    )
}
# timm's affine transforms, and their matrices: six numbers that map a place in the result to one in the image
MATRICES: dict[Callable[..., Any], Callable[..., tuple[float, ...]]] = {
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _shear_y,
    auto_augment.translate_x_rel: _translate_x,
    auto_augment.translate_y_rel: _translate_y,
    auto_augment.rotate: _rotate,
}
