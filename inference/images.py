"""Images as people keep them: found by name, folder or pattern, read upright and in RGB, and the pictures of them."""

import glob
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from training.errors import UserError, setting

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PLACEHOLDER = "IMAGE"  # what the commands call an image in their help
# Formats that Pillow decodes in memory by itself. For some others it starts programs, which work on files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")
DEEP_MODES = ("I", "F")  # and I;16…: one channel of more than 8 bits

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_image(source: str | Path | BinaryIO, what: str) -> Image.Image:
    """Read an image as people see it: RGB, upright.

    The EXIF orientation is applied, transparent parts are white, 16-bit values are scaled to 8 bits, CMYK is converted
    by its colour profile, and of an animation the first frame is taken. Plain RGB and grey files have the pixels that
    validation reads.

    Args:
        source: a path, or an open file.
        what: names the image in messages.

    Raises:
        UserError: it is not an image, is damaged, or is too large to be decoded safely.
    """
    try:
        if isinstance(source, (str, Path)) and not stat.S_ISREG(os.stat(source).st_mode):
            raise OSError("not a file")  # a pipe could block for ever
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes below the limit, and metadata
            with open_image(source) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise UserError(f"{what}: cannot be read (too large for this machine's memory)") from None
    except Exception as error:  # Pillow's decoders raise errors of any type for damaged files
        raise UserError(f"{what}: cannot be read ({_reason(error)})") from None


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`, without decoding its pixels. Raises what Pillow raises."""
    Image.init()  # loads the decoders, of which Pillow may lack some
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or damaged"
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an upright image to RGB."""
    if image.mode.startswith(DEEP_MODES):
        image = _scaled_to_8_bits(image)
    if image.mode == "CMYK" and (profile := image.info.get("icc_profile")):
        with suppress(ImageCms.PyCMSError, OSError):  # without a usable profile, Pillow's formula
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB") or image
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a grey image with more than 8 bits to 0 to 255.

    Integers have 16 bits in every common format. Floats from 0 to 1 are taken as such, others by their own range.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if image.mode == "I" and high <= 255 else 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = np.nan_to_num((values - low) / max(high - low, 1e-12)) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# Finding
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """An image to predict.

    Attributes:
        path: its file.
        inner: its path inside the folder that was named, or its file's name.
    """

    path: Path
    inner: Path

    def picture(self, out: Path) -> Path:
        """The file of its picture in a folder. Pictures of a folder's images keep its structure."""
        return out / self.inner.with_suffix(".png")


def find_images(names: Sequence[str]) -> list[Task]:
    """Find images by their files, their folders (and folders in these) or glob patterns. Each is found once.

    Args:
        names: what the user named. A pattern's ** matches folders of any depth.

    Raises:
        UserError: there is no such file, or a folder or pattern has no image.
    """
    found: dict[str, Task] = {}
    for task in (task for name in names for task in _find(name)):
        found.setdefault(os.path.abspath(task.path), task)
    return list(found.values())


def _find(name: str) -> Iterator[Task]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{PLACEHOLDER} {path}: a folder without images (files ending in {endings})")
        for file in files:
            yield Task(file, file.relative_to(path))
    elif not path.exists() and glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        files = [match for match in matches if match.is_file() and match.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"{PLACEHOLDER} {name}: no image matches this pattern")
        base = Path(os.path.commonpath([file.parent for file in files]))
        for file in files:
            yield Task(file, file.relative_to(base))
    elif path.exists():
        yield Task(path, Path(path.name))
    else:
        raise UserError(f"{PLACEHOLDER} {path}: no such file")


def check_pictures(tasks: Sequence[Task], out: Path, overwrite: bool) -> None:
    """Refuse pictures that would overwrite a file or each other, before anything is written.

    Args:
        tasks: the images.
        out: folder of their pictures.
        overwrite: whether earlier pictures may be replaced.

    Raises:
        UserError: a picture would overwrite a file that it must not.
    """
    images = {task.path.resolve() for task in tasks}
    places: dict[Path, Path] = {}
    for task in tasks:
        picture = task.picture(out)
        other = places.setdefault(picture, task.path)
        if other != task.path:
            raise UserError(f"{PLACEHOLDER} {task.path}: would get the same picture as {other}, {picture}; rename one, "
                            "name the folder that holds both, or predict them into two folders")  # fmt: skip
        if picture.resolve() in images:
            raise UserError(f"{setting('out', out)}: would overwrite {PLACEHOLDER} {picture}; name another folder")
        if picture.exists() and not overwrite:
            raise UserError(f"{setting('out', out)}: {picture} exists; name another folder, or replace it with "
                            f"{setting('overwrite')}")  # fmt: skip
