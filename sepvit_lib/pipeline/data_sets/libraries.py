"""Data sets read by torchvision or by timm's readers."""

import importlib
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from timm.data.dataset import ImageDataset, IterableImageDataset
from torchvision.datasets import CIFAR100, DatasetFolder

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.data_sets.base import ImageFiles, Images, check_label
from sepvit_lib.pipeline.image_files import Encoded
from sepvit_lib.pipeline.readers import first_images, shards_of

OWN_DATASETS = Path(__file__).resolve().parents[3] / "datasets.py"


def import_hugging_face() -> None:
    """Import Hugging Face's package `datasets`, which timm's reader needs, in place of this project's datasets.py.

    Raises:
        UserError: the package is not installed.
    """
    own = sys.modules.get("datasets")
    if own is not None and getattr(own, "__file__", None) != str(OWN_DATASETS):
        return
    path = list(sys.path)
    sys.modules.pop("datasets", None)
    sys.path = [entry for entry in path if Path(entry).resolve() != OWN_DATASETS.parent]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        if own is not None:
            sys.modules["datasets"] = own
        needs = f"needs Hugging Face's library ({error}): pip install datasets"
        raise UserError(f"{setting('data_set', 'hfds/…')}: {needs}") from None
    finally:
        sys.path = path


class TorchvisionImages(Images):
    """Images of a torchvision data set. torchvision decodes the images.

    Args:
        dataset: the data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.root, self.classes = dataset, str(dataset.root), getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def encoded(self, index: int) -> tuple[Encoded, int]:
        """Return an image and its label."""
        return self.dataset[index]

    def identity(self) -> Iterator[bytes]:
        """Yield the name of the data set's Python class, and the number of images."""
        yield json.dumps([type(self.dataset).__name__, len(self)]).encode()

    def labels(self) -> Sequence[int] | None:
        """Label of each image; None if torchvision does not list them."""
        return list(map(int, self.dataset.targets)) if hasattr(self.dataset, "targets") else None

    def files(self) -> Iterator[Callable[[], Any]]:
        """Yield nothing: there are no files to open."""
        return iter(())


class Cifar100(TorchvisionImages):
    """CIFAR-100 from torchvision."""

    def identity(self) -> Iterator[bytes]:
        """Yield the pixels."""
        yield self.dataset.data.tobytes()


class ReaderImages(Images):
    """Images that one of timm's readers reads by index (hfds/…).

    timm's own `ImageDataset` would replace an unreadable image silently.

    Args:
        dataset: timm's data set.
        root: the data set's folder.
    """

    def __init__(self, dataset: ImageDataset, root: str) -> None:
        self.reader, self.check_label, self.root = dataset.reader, dataset.target_transform, root

    def __len__(self) -> int:
        return len(self.reader)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the content of an image's file, and its label."""
        file, label = self.reader[index]
        with file:
            return file.read(), self.check_label(label)

    def name(self, index: int) -> str:
        """Path of an image, or the reader's name for it."""
        return self.reader.filename(index)

    def identity(self) -> Iterator[bytes]:
        """Yield the name of the reader's Python class, and the number of images."""
        yield json.dumps([type(self.reader).__name__, len(self)]).encode()

    def labels(self) -> Sequence[int] | None:
        """Label of each image."""
        return list(self.reader.dataset.with_format(None)[self.reader.label_key][:])

    def file(self, index: int) -> Any:
        """File object of an image."""
        return self.reader[index][0]


class ImageStream(IterableImageDataset):
    """Streaming data set of one of timm's readers (wds/…, hfids/…, tfds/…), for `sepvit_lib.pipeline.streams`.

    Args:
        dataset: timm's data set.
        root: the data set's folder.
    """

    classes = skipped = None

    def __init__(self, dataset: IterableImageDataset, root: str) -> None:
        super().__init__(root, reader=dataset.reader, target_transform=dataset.target_transform)
        self.root = root

    def identity(self) -> Iterator[bytes]:
        """Yield the name of the reader's Python class, the number of images, and the names of the shards, if any."""
        yield json.dumps([type(self.reader).__name__, len(self), *(shards_of(self) or ())]).encode()

    def labels(self) -> None:
        """Return None: labels are unknown until all images are read."""

    def files(self) -> Iterator[Callable[[], Any]]:
        """Yield functions that return open files of a webdataset's first images; nothing for other readers."""
        if shards_of(self):
            with suppress(
                OSError, EOFError, ValueError, tarfile.TarError, UserError
            ):  # a shard is unreadable; training reports it
                for content in first_images(self.reader):
                    yield partial(BytesIO, content)


def from_library(dataset: Any, root: str, num_classes: int) -> Images | ImageStream:
    """Adapt a data set that timm's `create_dataset` returned, and refuse labels outside the range of the classes.

    Args:
        dataset: the data set.
        root: the data set's folder.
        num_classes: number of classes.
    """
    dataset.target_transform = partial(check_label, num_classes=num_classes)
    if isinstance(dataset, IterableImageDataset):
        return ImageStream(dataset, root)
    if isinstance(dataset, ImageDataset):
        return ReaderImages(dataset, root)
    if isinstance(dataset, DatasetFolder):
        files = ImageFiles()
        files.root, files.samples, files.classes = str(dataset.root), dataset.samples, dataset.classes
        return files
    return Cifar100(dataset) if isinstance(dataset, CIFAR100) else TorchvisionImages(dataset)
