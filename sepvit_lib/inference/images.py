"""Find images by file, folder or pattern; read them upright, in RGB."""

import glob
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.image_files import (
    EXIF,
    IMAGE_SUFFIXES,
    decode,
    describe_skipped,
    images_in,
    is_image,
    read_file,
    reason_of,
)

PLACEHOLDER = "IMAGE"  # name of the image arguments in help and messages

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_image(
    source: str | Path | bytes | Image.Image, what: str, orientation: str = EXIF, channels: int = 3
) -> Image.Image | Tensor:
    """Read an image, by default upright. See `sepvit_lib.pipeline.image_files.decode`.

    Args:
        source: a path, a file's content, or a decoded image.
        what: name of the image in messages.
        orientation: 'exif' to turn the image upright, 'stored' to keep the stored pixels as they are.
        channels: number of channels.

    Returns:
        an image in RGB; with other than 3 channels, float32, C × H × W (see `decode_channels`).

    Raises:
        UserError: the source is not an image, is damaged, or is too large to be decoded safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            return decode(read_file(source) if isinstance(source, str | Path) else source, orientation, channels)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any type for damaged files
        raise UserError(f"{what}: cannot be read ({reason_of(error)})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Finding
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """An input image for prediction.

    Attributes:
        path: file of the image.
        inner: path of the image relative to the folder that the user named, or to the common folder of a pattern's
            matches. For a single file, the file's name.
    """

    path: Path
    inner: Path

    def picture(self, out: Path) -> Path:
        """Path of the image's picture: `inner` in the folder `out`, with the suffix .png."""
        return out / self.inner.with_suffix(".png")


def find_images(names: Sequence[str], arrays: bool = False) -> list[Task]:
    """Find images by file, folder (recursively) or glob pattern. Each image is listed once.

    Args:
        names: files, folders and patterns. `**` in a pattern matches folders at any depth.
        arrays: whether NumPy files are images, too.

    Raises:
        UserError: a file does not exist, a folder cannot be read, or a folder or pattern has no image.
    """
    found: dict[str, Task] = {}
    for task in (task for name in names for task in _find(name, arrays)):
        found.setdefault(os.path.abspath(task.path), task)
    return list(found.values())


def _find(name: str, arrays: bool) -> Iterator[Task]:
    path = Path(name)
    if path.is_dir():
        try:
            files, skipped = images_in(path, arrays)
        except OSError as error:
            raise UserError(f"{PLACEHOLDER} {error.filename}: cannot be read ({error.strerror})") from None
        if not files:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{PLACEHOLDER} {path}: a folder without images (files ending in {endings})")
        if skipped:
            print(f"WARNING: {PLACEHOLDER} {path}: {describe_skipped(skipped)}", file=sys.stderr, flush=True)
        for file in map(Path, files):
            yield Task(file, file.relative_to(path))
    elif not path.exists() and glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        found = [match for match in matches if match.is_file() and is_image(match, arrays)]
        if not found:
            raise UserError(f"{PLACEHOLDER} {name}: no image matches this pattern")
        base = Path(os.path.commonpath([file.parent for file in found]))
        for file in found:
            yield Task(file, file.relative_to(base))
    elif path.exists():
        yield Task(path, Path(path.name))
    else:
        raise UserError(f"{PLACEHOLDER} {path}: no such file")


def check_pictures(tasks: Sequence[Task], out: Path, overwrite: bool) -> None:
    """Before anything is written, refuse pictures that would overwrite a file or each other.

    Args:
        tasks: the images.
        out: folder of their pictures.
        overwrite: whether existing pictures may be replaced.

    Raises:
        UserError: a picture would overwrite a file that it must not.
    """
    images = {task.path.resolve() for task in tasks}
    sources: dict[Path, Path] = {}
    for task in tasks:
        picture = task.picture(out)
        other = sources.setdefault(picture, task.path)
        if other != task.path:
            advice = "rename one, or pass the folder that contains both"
            raise UserError(f"{PLACEHOLDER} {task.path}: would get the same picture as {other}, {picture}; {advice}")
        if picture.resolve() in images:
            raise UserError(f"{setting('out', out)}: would overwrite {PLACEHOLDER} {picture}; choose another folder")
        if picture.exists() and not overwrite:
            advice = f"choose another folder, or pass {setting('overwrite')}"
            raise UserError(f"{setting('out', out)}: {picture} exists; {advice}")
