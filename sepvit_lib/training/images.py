"""One reading of image files for all commands: which files are images, and what their pixels are."""

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
from PIL import ExifTags, Image, ImageOps

from sepvit_lib.training.classes import canonical

T = TypeVar("T")

# Formats that Pillow decodes in memory by itself. For some others it starts programs, which work on files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")
DEEP_MODES = ("I", "F")  # and I;16…: one channel of more than 8 bits
STORED, EXIF = ORIENTATIONS = ("stored", "exif")  # pixels as in the file, or upright
MAX_SUFFIXES = 5  # in a message
MAX_HEADERS = 500  # images whose orientation is looked up before training
UPRIGHT = 1  # the EXIF orientation of an image that is stored upright

Image.init()  # loads the decoders, of which Pillow may lack some
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)

Encoded = bytes | Image.Image  # an image file's content, or an image of a data set that decodes by itself

# ----------------------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> bytes:
    """Read an image file without decoding it.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which could block forever.
    """
    _check_regular(path)
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _check_regular(path: str | Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`, without decoding its pixels. Raises what Pillow and `read_file` raise."""
    if isinstance(source, (str, Path)):
        _check_regular(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes below the limit, and metadata
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(source: Encoded, orientation: str = STORED) -> Image.Image:
    """Decode an image to RGB, 8 bits per channel.

    Values of 16 bits and floats are scaled to 0 to 255, transparent parts are white, and of an animation the first
    frame is taken. Pixels of ordinary images are those of Pillow's `convert("RGB")`.

    Args:
        source: an image file's content, or an image.
        orientation: 'stored', or 'exif' to turn the image upright by its EXIF orientation.

    Raises:
        Exception: whatever Pillow raises for an image that is unreadable.
    """
    image = open_image(io.BytesIO(source)) if isinstance(source, bytes) else source
    if orientation == EXIF and orientation_of(image) != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(DEEP_MODES):
        image = _scaled_to_8_bits(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
    return image.convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1, upright, if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return value if value in range(1, 9) else UPRIGHT


def orientation_for(reading: Mapping[str, Any] | None) -> str:
    """Orientation in which a network's images are predicted: upright, unless it was trained on turned ones as stored.

    Args:
        reading: how its training images were read, from its checkpoint; None if that is unknown.
    """
    return STORED if reading and reading["orientation"] == STORED and reading.get("turned") else EXIF


def evenly_spaced(entries: Sequence[T], most: int) -> list[T]:
    """Return some of many entries, evenly spaced, or all of a few."""
    count = min(most, len(entries))
    return [entries[number * len(entries) // count] for number in range(count)]


def count_turned(files: Iterable[Callable[[], Any]]) -> dict[str, int]:
    """Count the images whose EXIF orientation is not upright, among the first `MAX_HEADERS`. Pixels are not decoded.

    Args:
        files: functions that give a path or an open file.

    Returns:
        `turned` images among the `sampled` ones. Unreadable ones are skipped.
    """
    turned = sampled = 0
    for file in islice(files, MAX_HEADERS):
        with suppress(Exception), open_image(file()) as image:  # Pillow's decoders raise errors of any type
            turned += orientation_of(image) != UPRIGHT
            sampled += 1
    return dict(turned=turned, sampled=sampled)


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a grey image with more than 8 bits to 0 to 255.

    Integers have 16 bits in every common format. Floats from 0 to 1 are taken as such, others by their own range.
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
    """Describe files that are no images, for a warning.

    Args:
        skipped: their number by suffix.
    """
    counts = ", ".join(f"{number} {suffix}" for suffix, number in skipped.most_common(MAX_SUFFIXES))
    return f"skipped {skipped.total()} files without an image suffix: {counts}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, such as `._x.png` and `.ipynb_checkpoints`. It is nobody's image or class."""
    return name.startswith(".")


def is_image(name: str | Path) -> bool:
    """Whether a file is an image, by its name."""
    name = os.path.basename(name)
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and the folders in it that are not hidden, each with its visible files. Links are followed.

    Folders and files are sorted by name, in the composed form of Unicode: a copy on a Mac has the same order.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not _is_cycle(os.path.join(place, name))]
        found.append((place, sorted((name for name in files if not is_hidden(name)), key=canonical)))
    yield from sorted(found, key=lambda entry: canonical(entry[0]))


def _is_cycle(folder: str) -> bool:
    """Whether a folder is a link to a folder that it is in."""
    if not os.path.islink(folder):
        return False
    target, parent = Path(os.path.realpath(folder)), Path(os.path.realpath(os.path.dirname(folder)))
    return target in (parent, *parent.parents)


class ImageFiles:
    """A data set of image files.

    Attributes:
        root: a folder that exists whenever the storage is available.
        classes: names of the classes.
        samples: paths and labels of the images.
        skipped: number of other visible files by suffix.
    """

    root: str
    classes: list[str]
    samples: list[tuple[str, int]]
    skipped: Counter[str]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> bytes:
        """Read an image's file. See `read_file`."""
        return read_file(self.samples[index][0])


def images_in(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """List the images in a folder and in its folders.

    Returns:
        their paths, and the number of other visible files by suffix.

    Raises:
        OSError: a folder cannot be read.
    """
    files = [os.path.join(place, name) for place, names in walk(folder) for name in names]
    others = Counter(os.path.splitext(file)[1].lower() or "no suffix" for file in files if not is_image(file))
    return [file for file in files if is_image(file)], others
