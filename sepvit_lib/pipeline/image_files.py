"""Find and decode image files, in the same way for all commands."""

import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sepvit_lib.common.class_names import canonical
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import lacking

T = TypeVar("T")

# Formats that Pillow decodes itself. For some other formats, it starts external programs, such as Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")
DEEP_MODES = ("I", "F")  # prefixes of modes with one channel of more than 8 bits: I, I;16…, F
NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of the files; TIFF and BigTIFF
STORED, EXIF = ORIENTATIONS = ("stored", "exif")  # pixels as in the file, or upright
MAX_SUFFIXES = 5  # listed in a message
MAX_HEADERS = 500  # images whose orientation is checked before training
UPRIGHT = 1  # the EXIF orientation of an image that is stored upright

Image.init()  # loads the decoders; some may be missing from Pillow
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
ARRAY_SUFFIX = ".npy"  # NumPy arrays, for images with other than three channels

Encoded = bytes | Image.Image  # an image file's content, or an image decoded by its data set

# ----------------------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> bytes:
    """Read an image file without decoding it.

    Raises:
        OSError: the file cannot be read, or is a pipe or a device, where reading could block forever.
    """
    _check_regular(path)
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _check_regular(path: str | Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`, without decoding its pixels. Raises the errors of Pillow and `read_file`."""
    if isinstance(source, (str, Path)):
        _check_regular(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images below the size limit, and about metadata
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(source: Encoded, orientation: str = STORED, channels: int = 3) -> Any:
    """Decode an image to RGB, 8 bits per channel; with other than 3 channels, to a tensor (`decode_channels`).

    16-bit and float values are scaled to 0 to 255, transparent parts become white, and an animation yields its first
    frame. For other images, the result is that of Pillow's `convert("RGB")`.

    Args:
        source: an image file's content, or an image.
        orientation: 'stored' to keep the stored pixels as they are; 'exif' to turn the image upright, as its EXIF
            orientation specifies.
        channels: number of channels.

    Raises:
        Exception: whatever Pillow raises for an unreadable image.
    """
    if channels != 3:
        return decode_channels(source, channels, orientation)
    image = open_image(io.BytesIO(source)) if isinstance(source, bytes) else source
    if orientation == EXIF and orientation_of(image) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(DEEP_MODES):
        image = _scaled_to_8_bits(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
    return image.convert("RGB")


def decode_channels(source: Encoded, channels: int, orientation: str) -> Tensor:
    """Decode an image with any number of channels.

    Unsigned integers are divided by the largest value of their type; other values are kept. For one channel, images
    that Pillow decodes are converted to greyscale, except for 16-bit and float images, which keep their values. In all
    other cases, the channels are those of the file, and EXIF orientations are ignored.

    Args:
        source: content of a TIFF file, a NumPy file (C × H × W or H × W × C) or a picture; or a decoded picture.
        channels: number of channels.
        orientation: orientation of greyscale pictures; see `decode`.

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
        raise ValueError(f"shape {shape}: neither the first nor the last axis has {channels} channels")
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
    """Convert an image to RGB for display: three channels, or else the first. Each is scaled from its own range."""
    if isinstance(image, Image.Image):
        return image
    shown = image[:3] if len(image) > 2 else image[:1].expand(3, -1, -1)
    low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    pixels = (shown - low) / (high - low).clamp(min=1e-12) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; `UPRIGHT` if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return value if value in range(1, 9) else UPRIGHT


def orientation_for(reading: Mapping[str, Any] | None) -> str:
    """Choose the orientation for prediction: 'stored' if training ignored EXIF rotations, otherwise 'exif'.

    Args:
        reading: the checkpoint's record of how the training images were read; None if it has none.
    """
    return STORED if reading and reading["orientation"] == STORED and reading.get("turned") else EXIF


def evenly_spaced(entries: Sequence[T], max_count: int) -> list[T]:
    """Select at most `max_count` entries, evenly spaced."""
    count = min(max_count, len(entries))
    return [entries[number * len(entries) // count] for number in range(count)]


def count_turned(files: Iterable[Callable[[], Any]]) -> dict[str, int]:
    """Count images whose EXIF orientation is not upright. Checks the first `MAX_HEADERS` images, without decoding them.

    Args:
        files: functions that return a path or an open file.

    Returns:
        `turned`, the number of such images, and `sampled`, the number of images checked, without unreadable images.
    """
    turned = sampled = 0
    for file in islice(files, MAX_HEADERS):
        with suppress(Exception), open_image(file()) as image:  # Pillow's decoders raise errors of any type
            turned += orientation_of(image) != UPRIGHT
            sampled += 1
    return dict(turned=turned, sampled=sampled)


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a grey image with more than 8 bits to 0 to 255.

    Integers are assumed to have 16 bits, or 8 bits in mode I if no value exceeds 255. Floats are multiplied by 255 if
    all are within 0 to 1. In other cases, values are scaled from the image's own range.
    """
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if image.mode == "I" and high <= 255 else 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = np.nan_to_num((values - low) / max(high - low, 1e-12), posinf=1, neginf=0) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def reason_of(error: Exception) -> str:
    """Describe why an image could not be read, in a few words."""
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or damaged"
    return " ".join(str(error).split()) or type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def describe_skipped(skipped: Counter[str]) -> str:
    """Describe skipped files, for a warning.

    Args:
        skipped: number of files by suffix.
    """
    counts = ", ".join(f"{number} {suffix}" for suffix, number in skipped.most_common(MAX_SUFFIXES))
    return f"skipped {skipped.total()} files without an image suffix: {counts}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, such as `._x.png` or `.ipynb_checkpoints`. Hidden ones are ignored."""
    return name.startswith(".")


def is_image(name: str | Path, arrays: bool = False) -> bool:
    """Whether a file's name is that of an image: not hidden, with an image format's suffix or, for `arrays`, .npy."""
    name = os.path.basename(name)
    suffix = os.path.splitext(name)[1].lower()
    return not is_hidden(name) and (suffix in IMAGE_SUFFIXES or (arrays and suffix == ARRAY_SUFFIX))


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and its visible subfolders at any depth, each with its visible files. Follows links.

    Folders and files are sorted by their names in composed Unicode form, so that a copy on a Mac has the same order.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not _is_cycle(os.path.join(parent, name))]
        found.append((parent, sorted((name for name in files if not is_hidden(name)), key=canonical)))
    yield from sorted(found, key=lambda entry: canonical(entry[0]))


def _is_cycle(folder: str) -> bool:
    """Whether a folder is a link to one of its parents."""
    if not os.path.islink(folder):
        return False
    target, parent = Path(os.path.realpath(folder)), Path(os.path.realpath(os.path.dirname(folder)))
    return target in (parent, *parent.parents)


def images_in(folder: str | Path, arrays: bool = False) -> tuple[list[str], Counter[str]]:
    """List the images in a folder, recursively. NumPy files are images only if `arrays`.

    Returns:
        their paths, and the number of other visible files by suffix.

    Raises:
        OSError: a folder cannot be read.
    """
    files = [os.path.join(parent, name) for parent, names in walk(folder) for name in names]
    images = [file for file in files if is_image(file, arrays)]
    others = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files if not is_image(file, arrays))
    return images, others
