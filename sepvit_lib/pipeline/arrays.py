"""Images with any number of channels: TIFF files, NumPy arrays, and pictures in greyscale or with transparency."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import lacking
from sepvit_lib.pipeline.image_files import DEEP_MODES, Encoded, decode, open_image

NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of the files; TIFF and BigTIFF


def decode_channels(source: Encoded, channels: int, orientation: str) -> Tensor:
    """Decode an image with any number of channels.

    Unsigned integers are scaled to 0 to 1; other values are kept. A picture is converted to greyscale for one channel;
    in other cases, its channels are those of the file, in the orientation of the file.

    Args:
        source: content of a TIFF file, a NumPy file (C × H × W or H × W × C) or a picture; or a decoded picture.
        channels: number of channels.
        orientation: orientation of greyscale pictures; see `sepvit_lib.pipeline.image_files.decode`.

    Returns:
        float32, C × H × W.

    Raises:
        UserError: tifffile is not installed.
        ValueError: the number of channels differs, or a value is not finite.
        Exception: whatever the libraries raise for an unreadable image.
    """
    values = _read(source, channels, orientation)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or channels not in (values.shape[0], values.shape[2]):
        shape = " × ".join(map(str, values.shape))
        raise ValueError(f"its shape is {shape}, without an axis of {channels} channels")
    if values.shape[0] != channels:
        values = values.transpose(2, 0, 1)  # C × H × W
    scale = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    image = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) / scale
    if not image.isfinite().all():
        raise ValueError("has non-finite values")
    return image


def _read(source: Encoded, channels: int, orientation: str) -> np.ndarray:
    """Read a file's values, H × W, C × H × W or H × W × C."""
    if isinstance(source, bytes) and source.startswith(NUMPY):
        return np.asarray(np.load(io.BytesIO(source), allow_pickle=False))
    if isinstance(source, bytes) and source.startswith(TIFF):
        if problem := lacking("tifffile", extra="tiff"):
            raise UserError(problem)
        import tifffile

        return np.asarray(tifffile.imread(io.BytesIO(source)))
    image = open_image(io.BytesIO(source)) if isinstance(source, bytes) else source
    if channels == 1 and not image.mode.startswith(DEEP_MODES):
        image = decode(image, orientation).convert("L")
    return np.asarray(image)


def as_picture(image: Image.Image | Tensor) -> Image.Image:
    """Convert an image to RGB, to show it. Of more than two channels, the first three are shown, each in its range."""
    if isinstance(image, Image.Image):
        return image
    shown = image[:3] if len(image) > 2 else image[:1].expand(3, -1, -1)
    low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    pixels = (shown - low) / (high - low).clamp(min=1e-12) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
