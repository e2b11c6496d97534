"""Augmentation of the fast loader in its workers: all of it, or only its random numbers, for a GPU to apply.

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
from torchvision.transforms import Normalize, RandomHorizontalFlip

VALUES = 9  # of an operation: its strength, or its affine matrix (6) and the colour outside the image (3)


class Operation(NamedTuple):
    """An operation of RandAugment on one image.

    Attributes:
        kind: one of `training.device_augmentation.OPERATIONS`.
        values: at most `VALUES` numbers.
    """

    kind: str
    values: tuple[float, ...]


class Crop(NamedTuple):
    """A random crop, and how to augment it.

    Attributes:
        pixels: H × W × 3, uint8.
        is_flipped: whether it is flipped horizontally.
        operations: RandAugment's operations, in their order.
        boxes: regions to erase, N × 4: top, left, bottom, right. Unused ones are zeros.
    """

    pixels: Tensor
    is_flipped: bool
    operations: list[Operation]
    boxes: Tensor


@dataclass
class CropBatch:
    """A batch of crops, and how to augment them, grouped by operation.

    Attributes:
        pixels: B × H × W × 3, uint8.
        is_flipped: B, bool.
        boxes: B × N × 4, int64.
        indices: image of each operation, int64.
        values: values of each operation, `VALUES` in a row, float32.
        groups: ranges of operations of one kind on different images: kind, first, last + 1. They follow each other.
    """

    pixels: Tensor
    is_flipped: Tensor
    boxes: Tensor
    indices: Tensor
    values: Tensor
    groups: list[tuple[str, int, int]]

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
        return replace(
            self,
            pixels=function(self.pixels),
            is_flipped=function(self.is_flipped),
            boxes=function(self.boxes),
            indices=function(self.indices),
            values=function(self.values),
        )

    def __len__(self) -> int:
        return len(self.pixels)


def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    """Collate crops into a batch, and group their operations: all first ones, by kind, then all second ones, …"""
    drawn = [(place, operation.kind, index, operation.values)
             for index, crop in enumerate(crops) for place, operation in enumerate(crop.operations)]  # fmt: skip
    drawn.sort(key=lambda entry: entry[:3])
    values = np.zeros((len(drawn), VALUES), np.float32)
    groups: dict[tuple[int, str], tuple[str, int, int]] = {}
    for row, (place, kind, _, numbers) in enumerate(drawn):
        values[row, : len(numbers)] = numbers
        first = groups.get((place, kind), (kind, row, row))[1]
        groups[place, kind] = (kind, first, row + 1)
    return CropBatch(
        default_collate([crop.pixels for crop in crops]),
        torch.tensor([crop.is_flipped for crop in crops]),
        torch.stack([crop.boxes for crop in crops]),
        torch.tensor([index for _, _, index, _ in drawn], dtype=torch.int64),
        torch.from_numpy(values),
        list(groups.values()),
    )


# ----------------------------------------------------------------------------------------------------------------------
# In the worker
# ----------------------------------------------------------------------------------------------------------------------


class WorkerAugmentation:
    """Augment a crop by timm's transforms of PIL images, normalise it, and erase regions.

    Args:
        steps: transforms of PIL images.
        normalize: the normalisation.
        erasing: random erasing, or None.
    """

    def __init__(self, steps: Sequence[Any], normalize: Normalize, erasing: RandomErasing | None) -> None:
        self.steps = steps
        self.mean, self.std = (255 * torch.as_tensor(value)[:, None, None] for value in (normalize.mean, normalize.std))
        self.erasing = erasing

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Augment pixels, H × W × 3, uint8.

        Returns:
            normalised image, 3 × H × W.
        """
        image = self.normalise(apply_steps(self.steps, pixels))
        return image if self.erasing is None else self.erasing(image)

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Normalise pixels, H × W × 3, uint8, to 3 × H × W."""
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return torch.sub(image, self.mean, out=torch.empty(image.shape)).div_(self.std)


def apply_steps(steps: Sequence[Any], pixels: np.ndarray) -> np.ndarray:
    """Apply transforms of PIL images to pixels, H × W × 3, uint8."""
    if not steps:
        return pixels
    image = Image.fromarray(pixels)
    for step in steps:
        image = step(image)
    return np.array(image)


# ----------------------------------------------------------------------------------------------------------------------
# Recorded for a GPU
# ----------------------------------------------------------------------------------------------------------------------


class RecordedAugmentation:
    """Record how timm's transforms would augment a crop.

    RandAugment and flips are recorded. With any other transform of PIL images (AugMix, AutoAugment, colour jitter), all
    of them are applied here, and only random erasing is recorded.

    Args:
        steps: transforms of PIL images.
        erasing: random erasing, or None.
        size: side of the crops in pixels.
    """

    def __init__(self, steps: Sequence[Any], erasing: RandomErasing | None, size: int) -> None:
        is_recorded = all(isinstance(step, (RandomHorizontalFlip, RandAugment)) for step in steps)
        self.steps = [] if is_recorded else list(steps)
        recorded = steps if is_recorded else []
        self.flips = [step.p for step in recorded if isinstance(step, RandomHorizontalFlip)]
        self.operations = [recording(step, size) for step in recorded if isinstance(step, RandAugment)]
        self.erasing = without_pixels(erasing) if erasing is not None else None
        self.size = size

    def __call__(self, pixels: np.ndarray) -> Crop:
        """Draw the augmentation of pixels, H × W × 3, uint8."""
        is_flipped = any([bool(torch.rand(1) < probability) for probability in self.flips])
        operations: list[Operation] = []
        for draw in self.operations:
            operations = draw(operations)
        pixels = apply_steps(self.steps, pixels)
        return Crop(torch.from_numpy(pixels), is_flipped, operations, self.boxes())

    def boxes(self) -> Tensor:
        """Draw the regions to erase."""
        if self.erasing is None:
            return torch.zeros(0, 4, dtype=torch.int64)
        regions = Regions(self.size)
        self.erasing(regions)
        unused = self.erasing.max_count - len(regions.boxes)
        return torch.tensor(regions.boxes + [(0, 0, 0, 0)] * unused)


class Regions:
    """Stand-in for an image, 3 × size × size, which records the regions that are assigned to."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self.shape = (3, size, size)
        self.boxes: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        """The image's shape."""
        return self.shape

    def __setitem__(self, region: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = region
        self.boxes.append((rows.start, columns.start, rows.stop, columns.stop))


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
    operations: list[Any] = [copy.copy(operation) for operation in augmentation.ops]
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
STRENGTHS = {getattr(auto_augment, kind): kind for kind in (
    "auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "color", "contrast", "brightness",
    "sharpness",
)}  # fmt: skip
# timm's affine transforms, and their matrices: six numbers that map a place in the result to one in the image
MATRICES: dict[Callable[..., Any], Callable[..., tuple[float, ...]]] = {
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _shear_y,
    auto_augment.translate_x_rel: _translate_x,
    auto_augment.translate_y_rel: _translate_y,
    auto_augment.rotate: _rotate,
}
