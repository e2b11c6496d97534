"""Interface of a data set of images.

Each data set is a subclass of `Images` or `ImageFiles` in its own module, with an entry in `datasets.DATA_SETS`. The
instances are pickled for loader workers.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sepvit_lib.common.class_names import canonical
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.image_files import MAX_HEADERS, Encoded, evenly_spaced, read_file

Label = int | tuple[int, ...]  # the class of an image, or its classes


def classes_of(label: Label) -> tuple[int, ...]:
    """The classes of an image."""
    return label if isinstance(label, tuple) else (label,)


class Images:
    """Labelled images, read by index. The label of an image is its class, or in multi-label data sets its classes.

    Attributes:
        root: a folder that exists whenever the storage is available.
        classes: names of the classes; None if they are unknown.
        skipped: number of visible files that are not images, by suffix; None if unknown.
        weights: weight of each image in the training loss; empty if all are 1.
    """

    root: str = "."
    classes: list[str] | None = None
    skipped: Counter[str] | None = None
    weights: Sequence[float] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[Encoded, Label]:
        """Return an image and its label: the content of the image's file, or a decoded image if there are no files."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name of an image, for messages."""
        return f"number {index}"

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these images, wherever they are stored: usually names and labels.

        A run is not resumed automatically if these bytes have changed.
        """
        raise NotImplementedError

    def labels(self) -> Sequence[Label] | None:
        """Label of each image; None if finding the labels would require reading all images."""
        return None

    def files(self) -> Iterator[Callable[[], Any]]:
        """Yield, for a sample of the images, functions that return a path or an open file, for `count_turned`."""
        yield from (partial(self.file, index) for index in evenly_spaced(range(len(self)), MAX_HEADERS))

    def file(self, index: int) -> Any:
        """Path or open file of an image."""
        return io.BytesIO(self.encoded(index)[0])  # type: ignore[arg-type] # without a file, this fails and is skipped


class ImageFiles(Images):
    """Labelled image files.

    Attributes:
        samples: paths and labels of the images.
    """

    classes: list[str]
    samples: list[tuple[str, Label]]

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, index: int) -> tuple[bytes, Label]:
        """Return the content of an image's file, and its label. See `read_file`."""
        path, label = self.samples[index]
        return read_file(path), label

    def name(self, index: int) -> str:
        """Path of an image."""
        return self.samples[index][0]

    def identity(self) -> Iterator[bytes]:
        """Yield each image's path below the root, and its label; then the weights."""
        for path, label in self.samples:
            yield os.fsencode(f"{canonical(path.removeprefix(self.root))}\0{label}\n")
        yield from (f"{weight}\n".encode() for weight in self.weights)

    def labels(self) -> Sequence[Label]:
        """Label of each image."""
        return [label for _, label in self.samples]

    def file(self, index: int) -> Any:
        """Path of an image."""
        return self.samples[index][0]

    def inner_name(self, index: int) -> str:
        """Path of an image below the root, the same on every machine."""
        return canonical(os.path.relpath(self.samples[index][0], self.root)).replace(os.sep, "/")

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only some of the images."""
        self.samples = [self.samples[index] for index in indices]
        self.weights = [self.weights[index] for index in indices] if self.weights else ()


def check_label(label: int, num_classes: int) -> int:
    """Return a label, after checking that it is below the number of classes and not negative."""
    if not 0 <= label < num_classes:
        raise UserError(f"{setting('num_classes', num_classes)}: an image is labelled {label}; labels start at 0")
    return label
