"""The fast loader's batches on the device: flips, RandAugment, normalisation and random erasing.

Each operation equals timm's operation on PIL images at the same strength, to a grey level (tested). Nothing here waits
for a GPU: what depends on the pixels is computed there, and indices, groups and regions come from the loader.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import equalize

from sepvit_lib.training.augmentation import FLIP, CropBatch, Region
from sepvit_lib.training.preprocessing import Preprocessing
from sepvit_lib.training.shifts import cubic_weights
from sepvit_lib.training.state import Precision

LUMA = (19595, 38470, 7471)  # weights of red, green and blue in PIL's grey values, in 65,536ths


class DeviceAugmentation:
    """Make normalised images of batches of crops, on the device.

    Args:
        precision: the device, and the images' memory format.
        remode: fill of erased regions: 'const' (zero), 'rand' (one normal colour a region) or 'pixel' (normal noise).
        preprocessing: has the mean and standard deviation.
    """

    def __init__(self, precision: Precision, remode: str, preprocessing: Preprocessing) -> None:
        self.precision = precision
        self.remode = remode
        mean, std = (
            torch.tensor(values, device=precision.device)[:, None, None]
            for values in (preprocessing.mean, preprocessing.std)
        )
        self.mean, self.std = 255 * mean, 255 * std

    def __call__(self, batch: CropBatch) -> Tensor:
        """Augment, normalise and erase. Fills of erased regions are drawn by the device's generator.

        Args:
            batch: crops of H × W pixels, in pinned memory if the copy is not to be waited for.

        Returns:
            images, B × 3 × H × W, on the device.
        """
        batch = batch.to(self.precision.device)
        return self.erase(self.normalise(augment(batch)), batch.regions)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images, B × 3 × H × W, uint8."""
        images = images.contiguous(memory_format=self.precision.memory_format)  # as bytes, a quarter of the work
        return images.float().sub_(self.mean).div_(self.std)

    def erase(self, images: Tensor, regions: list[tuple[int, Region]]) -> Tensor:
        """Fill regions of normalised images, in place, one after the other. Returns the images."""
        for index, (top, left, bottom, right) in regions:
            pixels = images[index, :, top:bottom, left:right]
            if self.remode == "const":
                pixels.zero_()
            else:
                shape = pixels.shape if self.remode == "pixel" else (3, 1, 1)
                pixels.copy_(torch.randn(shape, device=images.device))
        return images


def augment(batch: CropBatch) -> Tensor:
    """Apply the operations of a batch. Returns images, B × 3 × H × W, uint8."""
    images = batch.pixels.permute(0, 3, 1, 2)
    if batch.groups:
        images = images.contiguous()
    for kind, first, end in batch.groups:
        indices = batch.indices[first:end]
        images.index_copy_(0, indices, OPERATIONS[kind](images[indices], batch.values[first:end]))
    return images


# ----------------------------------------------------------------------------------------------------------------------
# Operations
# ----------------------------------------------------------------------------------------------------------------------
# Each takes images, n × 3 × H × W, uint8, and their values, n × VALUES, float32, and returns images, uint8.


def strength_of(values: Tensor) -> Tensor:
    """The first value of each image, n × 1 × 1 × 1."""
    return values[:, :1, None, None]


def grey(images: Tensor) -> Tensor:
    """Grey values as PIL computes them, n × 1 × H × W, int32."""
    red, green, blue = images.int().split(1, dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 32768) >> 16


def blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Move from another image (factor 0) to an image (factor 1) and beyond. PIL rounds down."""
    return (other + factor * (images.float() - other)).clamp(0, 255).to(torch.uint8)


def flip(images: Tensor, values: Tensor) -> Tensor:
    """Flip horizontally."""
    return images.flip(3)


def auto_contrast(images: Tensor, values: Tensor) -> Tensor:
    """Stretch each channel to 0 … 255. A channel of one value is kept."""
    least, most = images.amin((2, 3), keepdim=True).int(), images.amax((2, 3), keepdim=True).int()
    stretched = (images.int() - least) * 255 // (most - least).clamp(min=1)
    return torch.where(most > least, stretched, images).to(torch.uint8)


def equalized(images: Tensor, values: Tensor) -> Tensor:
    """Equalise the histogram of each channel."""
    return equalize(images)


def invert(images: Tensor, values: Tensor) -> Tensor:
    """Negative."""
    return 255 - images


def posterize(images: Tensor, values: Tensor) -> Tensor:
    """Keep a number of bits, the highest ones."""
    mask = 256 - 2 ** (8 - strength_of(values).clamp(0, 8))
    return images & mask.to(torch.uint8)


def solarize(images: Tensor, values: Tensor) -> Tensor:
    """Invert values from a threshold on."""
    return torch.where(images < strength_of(values), images, 255 - images)


def solarize_add(images: Tensor, values: Tensor) -> Tensor:
    """Add to values below 128."""
    brighter = (images + strength_of(values)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def color(images: Tensor, values: Tensor) -> Tensor:
    """Change the saturation."""
    return blend(grey(images), images, strength_of(values))


def contrast(images: Tensor, values: Tensor) -> Tensor:
    """Change the contrast about the mean grey value."""
    values_of_grey = grey(images)
    pixels = values_of_grey[0].numel()
    mean = (2 * values_of_grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded
    return blend(mean, images, strength_of(values))


def brightness(images: Tensor, values: Tensor) -> Tensor:
    """Change the brightness."""
    return blend(torch.zeros_like(images[:, :1, :1, :1]), images, strength_of(values))


def sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Change the sharpness. PIL's smooth image weighs the pixel by 5, its 8 neighbours by 1, and keeps the border."""
    whole = images.float()
    smooth = whole.clone()
    neighbours = F.avg_pool2d(whole, 3, stride=1, divisor_override=1)
    smooth[:, :, 1:-1, 1:-1] = ((neighbours + 4 * whole[:, :, 1:-1, 1:-1]) / 13 + 0.5).floor()
    return blend(smooth, images, strength_of(values))


def affine_bilinear(images: Tensor, values: Tensor) -> Tensor:
    """Affine transform with bilinear interpolation."""
    return affine(images, values, first=0, weights_of=linear_weights)


def affine_bicubic(images: Tensor, values: Tensor) -> Tensor:
    """Affine transform with bicubic interpolation."""
    return affine(images, values, first=-1, weights_of=cubic_weights)


def linear_weights(part: Tensor) -> list[Tensor]:
    """Weights of the two pixels around a place, which is at `part` between them."""
    return [1 - part, part]


def affine(images: Tensor, values: Tensor, first: int, weights_of: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Affine transform, as PIL does it: pixels whose place lies outside the image take the fill, others interpolate.

    torch's `grid_sample` has another bicubic kernel (a = -0.75).

    Args:
        images: n × 3 × H × W, uint8.
        values: n × 9: the matrix, row by row, which maps places in the result to places in the image; the fill.
        first: offset of the first pixel of the interpolation's kernel.
        weights_of: weights of the kernel's pixels.
    """
    channels, height, width = images.shape[1:]
    a, b, c, d, e, f = values[:, :6, None, None].unbind(1)
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    column, row = a * x + b * y + c, d * x + e * y + f  # n × H × W
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    left, top = (column - 0.5).floor(), (row - 0.5).floor()
    across, down = weights_of(column - 0.5 - left), weights_of(row - 0.5 - top)
    flat = images.flatten(2)
    result = torch.zeros(images.shape, device=images.device)
    for i, weight_of_row in enumerate(down):
        start = (top.long() + first + i).clamp(0, height - 1) * width
        for j, weight_of_column in enumerate(across):
            place = start + (left.long() + first + j).clamp(0, width - 1)
            pixels = flat.gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)
            result += pixels * (weight_of_row * weight_of_column)[:, None]
    fill = values[:, 6:, None, None]
    return torch.where(inside[:, None], result.clamp(0, 255), fill).to(torch.uint8)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "affine_bicubic": affine_bicubic,
    "affine_bilinear": affine_bilinear,
    "auto_contrast": auto_contrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalized,
    FLIP.kind: flip,
    "invert": invert,
    "posterize": posterize,
    "sharpness": sharpness,
    "solarize": solarize,
    "solarize_add": solarize_add,
}
