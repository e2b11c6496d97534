"""Tar archives of class folders, or of one archive per class."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from timm.utils import natural_key

from sepvit_lib.common.class_names import canonical
from sepvit_lib.pipeline.data_sets.base import ImageFiles, Images, Label
from sepvit_lib.pipeline.image_files import is_hidden, is_image

# Subclasses of tarfile.HeaderError that its documentation does not list (Python 3.10 to 3.12).
END_OF_ARCHIVE = tarfile.EOFHeaderError  # type: ignore[attr-defined]
TRUNCATED = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


class CheckedTarInfo(tarfile.TarInfo):
    """Tar member that reports a damaged archive. tarfile's own members treat a broken header as the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "CheckedTarInfo":
        """Read the next member's header.

        Raises:
            tarfile.ReadError: there is neither an intact header nor an end-of-archive mark.
        """
        try:
            return super().fromtarfile(archive)
        except END_OF_ARCHIVE:
            raise
        except TRUNCATED:
            raise tarfile.ReadError("truncated: it has no end-of-archive mark") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged: {error}") from None


class Archive(ImageFiles):
    """Images in a tar archive, in natural order. A class is a folder, or an archive inside the archive.

    Args:
        path: the archive.
        arrays: whether NumPy files are images, too.

    Raises:
        tarfile.TarError: the file is damaged or not an archive.
        OSError: the file cannot be read.
    """

    skipped: Counter[str]
    file = Images.file  # opens the image's content in memory

    def __init__(self, path: Path, arrays: bool = False) -> None:
        self.path, self.root, self.arrays = path, str(path.parent), arrays
        self.skipped = Counter()
        with tarfile.open(path, "r:", tarinfo=CheckedTarInfo) as archive:
            found = sorted(self._images(archive), key=lambda image: natural_key(image[0]))
        self.classes = sorted({label for _, label, _, _ in found})
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(name, labels[label]) for name, label, _, _ in found]
        self._extents = [(start, size) for _, _, start, size in found]

    def _images(self, archive: tarfile.TarFile, inner: str = "", start: int = 0) -> Iterator[tuple[str, str, int, int]]:
        """Yield each image's name, the name of its class, and the offset and size of its file in bytes.

        Args:
            archive: the archive, or one inside it.
            inner: class of the images that are in no folder.
            start: offset of the archive in bytes.
        """
        own = []
        for member in archive:
            folder, name = os.path.split(os.path.normpath(member.path))
            if not member.isfile() or any(is_hidden(part) for part in Path(member.path).parts):
                continue
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == ".tar":
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:", tarinfo=CheckedTarInfo) as part:
                    yield from self._images(part, stem, start + member.offset_data)
            elif is_image(name, self.arrays):
                own.append(
                    (member.path, canonical(os.path.basename(folder)) or inner, start + member.offset_data, member.size)
                )
            else:
                self.skipped[suffix.lower() or "no suffix"] += 1
        yield from own

    def encoded(self, index: int) -> tuple[bytes, Label]:
        """Return the content of an image's file, and its label.

        Raises:
            OSError: the archive cannot be read.
        """
        start, size = self._extents[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size), self.samples[index][1]

    def inner_name(self, index: int) -> str:
        """Name of an image in the archive."""
        return canonical(self.samples[index][0])

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only some of the images."""
        super().keep(indices)
        self._extents = [self._extents[index] for index in indices]

    def identity(self) -> Iterator[bytes]:
        """Yield each image's name in the archive, and its label."""
        return (os.fsencode(f"{canonical(name)}\0{label}\n") for name, label in self.samples)
