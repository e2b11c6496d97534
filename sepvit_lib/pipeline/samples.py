"""Data sets and samples, as read by loader workers.

Everything pickled for the workers is here or in `sepvit_lib.pipeline.streams`. Spawned workers (macOS, Windows) import
the classes by name, and there `datasets` may be Hugging Face's library (`import_hugging_face`).
"""

import hashlib
import importlib
import io
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from timm.data.dataset import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.datasets import CIFAR100, DatasetFolder

from sepvit_lib.common.class_names import canonical, check_map, listed, order_of
from sepvit_lib.common.errors import MachineError, UserError, setting
from sepvit_lib.common.processes import print_main
from sepvit_lib.common.randomness import SampleIndex, Stream, derived_seed, seed_cpu
from sepvit_lib.common.storage import PAUSES, is_storage_error, with_retries
from sepvit_lib.pipeline.archives import Archive
from sepvit_lib.pipeline.image_files import (
    IMAGE_SUFFIXES,
    MAX_HEADERS,
    Encoded,
    ImageFiles,
    decode,
    evenly_spaced,
    images_in,
    is_hidden,
    read_file,
)
from sepvit_lib.pipeline.readers import first_images, shards_of
from sepvit_lib.pipeline.unreadable import Replacements, UnreadableImageError

BY_CLASS_MAP = "the class map numbers the classes; they are matched by number"
NO_NAMES = "class names unknown; classes are matched by number"
OWN_DATASETS = Path(__file__).resolve().parents[2] / "datasets.py"


@dataclass(frozen=True)
class ImageData:
    """A data set of images, its classes, and the transform of its images.

    Attributes:
        dataset: image files and their labels.
        num_classes: number of classes.
        classes: names of the classes, None if the data set has none.
        decode: decodes an image file for the transform, and may draw random numbers.
        transform: transform of the decoded images.
        outputs: the network's output index for each label of the data set; None if they are the same.
        class_map: file that numbers the classes; "" to number them by name.
        is_hugging_face: whether Hugging Face's library reads the images.
    """

    dataset: Any
    num_classes: int
    classes: list[str] | None = None
    decode: Callable[[Encoded], Any] = decode
    transform: Any = None
    outputs: Sequence[int] | None = None
    class_map: str = ""
    is_hugging_face: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def matched(self, held: Sequence[str] | None, what: str, quietly: bool = False) -> "ImageData":
        """Match the classes with a network's by name, to map labels to its outputs.

        Classes with unknown names, or numbered by a class map, are matched by number.

        Args:
            held: names of the network's classes, in the order of its outputs; None if they are unknown.
            what: the network, for messages.
            quietly: do not print how they were matched.

        Raises:
            UserError: the names differ, or the class map contradicts them.
        """
        if held is None or self.classes is None:
            if not quietly:
                print_main(f"{what}: {NO_NAMES}")
            return self
        if self.class_map:
            check_map(self.class_map, self.classes, held, what)
            return self
        way_out = f"use a data set with the same classes, or {setting('class_map', 'FILE')} for renamed folders"
        data = setting("data_path", *filter(None, [getattr(self.dataset, "root", "")]))
        outputs = order_of(held, self.classes, what, data, way_out)
        if outputs is None:
            return self
        if not quietly:
            print_main(f"{what}: the data set has the same classes in a different order; they are matched by name")
        return self.renumbered(outputs, held)

    def renumbered(self, order: Sequence[int], classes: Sequence[str]) -> "ImageData":
        """Renumber the classes.

        Args:
            order: the new number of each class.
            classes: names of the classes in the new order.
        """
        outputs = range(len(order)) if self.outputs is None else self.outputs
        return replace(self, num_classes=len(classes), classes=list(classes), outputs=[order[n] for n in outputs])


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


class ClassFolders(ImageFiles):
    """A folder with one folder of images per class. Folders whose names differ only in Unicode form are one class.

    Args:
        root: the folder.

    Raises:
        UserError: the folder has no class folder, or a class folder has no images.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.samples = []
        self.skipped = Counter()
        folders: dict[str, list[str]] = {}
        for entry in sorted(os.scandir(root), key=lambda entry: canonical(entry.name)):
            if entry.is_dir() and not is_hidden(entry.name):
                folders.setdefault(canonical(entry.name), []).append(entry.path)
        self.classes = list(folders)
        if not folders:
            raise UserError(
                f"{setting('data_path', root)}: contains no class folders (expected one folder of images per class)"
            )
        for label, paths in enumerate(folders.values()):
            for images, skipped in map(images_in, paths):
                self.samples += [(image, label) for image in images]
                self.skipped += skipped
        if empty := [self.classes[label] for label in sorted(set(range(len(folders))) - {n for _, n in self.samples})]:
            raise UserError(
                f"{setting('data_path', root)}: no images in the class folders {listed(empty)} (images end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))})"
            )


class INaturalist(ImageFiles):
    """iNaturalist 2018 and 2019 at one level of the taxonomy.

    Classes are numbered in the order of their first appearance in the training annotations. Images are at the path in
    the JSON, `<split>/<kingdom>/<category id>/<file>`, or at that path without the kingdom folder.

    Args:
        root: folder with train<year>.json, val<year>.json, categories.json and the images.
        train: whether to read the training or the validation images.
        year: 2018 or 2019.
        category: level of the taxonomy, one of `datasets.INAT_CATEGORIES`.

    Raises:
        UserError: a file is missing or is not JSON, or the images are missing.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str) -> None:
        self.root = str(root)
        try:
            self._read_annotations(root, train, year, category)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{setting('data_path', root)}: annotations are not iNaturalist's ({error!r})") from None
        if not self.samples or not Path(self.samples[0][0]).is_file():
            path = self.samples[0][0] if self.samples else "all"
            raise UserError(f"{setting('data_path', root)}: no image at {path}")

    def _read_annotations(self, root: Path, train: bool, year: int, category: str) -> None:
        taxonomy = {entry.get("id", i): entry for i, entry in enumerate(_read_json(root / "categories.json"))}
        training = _read_json(root / f"train{year}.json")
        names = (str(taxonomy[annotation["category_id"]][category]) for annotation in training["annotations"])
        self.classes = list(dict.fromkeys(names))
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        images = (training if train else _read_json(root / f"val{year}.json"))["images"]
        with_kingdom: dict[Path, bool] = {}
        self.samples = []
        for image in images:
            split, kingdom, category_id, file = image["file_name"].split("/")[-4:]
            folder = root / split / kingdom
            if folder not in with_kingdom:
                with_kingdom[folder] = folder.is_dir()
            path = (folder if with_kingdom[folder] else root / split) / category_id / file
            self.samples.append((str(path), self.class_to_idx[str(taxonomy[int(category_id)][category])]))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{setting('data_path', path.parent)}: {path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{setting('data_path', path.parent)}: {path.name} is not JSON ({error})") from None


def check_label(label: int, num_classes: int) -> int:
    """Refuse a label without a class."""
    if not 0 <= label < num_classes:
        raise UserError(f"{setting('num_classes', num_classes)}: an image is labelled {label}; labels start at 0")
    return label


def import_hugging_face() -> None:
    """Import Hugging Face's package `datasets`, which timm's reader needs, in place of this project's file.

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


def labels_of(dataset: Any) -> set[int] | None:
    """Labels that occur in a data set; None if they are unknown until it is read."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(dataset, "samples"):
        return {label for _, label in dataset.samples}
    if hasattr(reader, "dataset") and hasattr(reader, "label_key"):  # Hugging Face's
        return set(reader.dataset.unique(reader.label_key))
    return set(map(int, dataset.targets)) if hasattr(dataset, "targets") else None


def sampled_files(dataset: Any) -> Iterator[Callable[[], Any]]:
    """Yield functions that return image files for `count_turned`, evenly spaced or, in a webdataset, the first."""
    if shards_of(dataset):
        with suppress(OSError, EOFError, ValueError, tarfile.TarError, UserError):  # of shards; training reports them
            for content in first_images(dataset.reader):
                yield partial(io.BytesIO, content)
    elif isinstance(dataset, (ImageFiles, ImageDataset, DatasetFolder)):
        yield from (partial(_file, dataset, index) for index in evenly_spaced(range(len(dataset)), MAX_HEADERS))


def _file(dataset: Any, index: int) -> Any:
    """An image's file for `open_image`, which reads only its header."""
    if isinstance(dataset, ImageDataset):
        return dataset.reader[index][0]
    return io.BytesIO(dataset.read(index)) if isinstance(dataset, Archive) else dataset.samples[index][0]


def fingerprint(data: ImageData) -> str:
    """Hash the names and labels of a data set's images, not their pixels."""
    dataset = data.dataset
    digest = hashlib.sha256(json.dumps(data.classes and [canonical(name) for name in data.classes]).encode())
    if hasattr(dataset, "samples"):
        for path, target in dataset.samples:
            name = canonical(path if isinstance(dataset, Archive) else path.removeprefix(dataset.root))
            digest.update(os.fsencode(f"{name}\0{target}\n"))
    elif isinstance(dataset, CIFAR100):
        digest.update(dataset.data.tobytes())
    else:
        reader = getattr(dataset, "reader", dataset)
        files = shards_of(dataset) or ()
        digest.update(json.dumps([type(reader).__name__, len(dataset), *files]).encode())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


def read_sample(
    dataset: Any, index: int, pauses: Sequence[int], decode: Callable[[Encoded], Any] = decode
) -> tuple[Any, int]:
    """Read an untransformed image and its label. Retries while the storage does not respond.

    Args:
        dataset: the data set.
        index: the image's index in it.
        pauses: seconds between the attempts.
        decode: decodes an image file.

    Raises:
        UnreadableImageError: the image is unreadable.
    """

    def read() -> tuple[Any, int]:
        encoded, target = read_encoded(dataset, index)
        return decode(encoded), target

    folder = getattr(dataset, "root", ".")
    try:
        return with_retries(read, folder, pauses)
    except UserError:
        raise
    except Exception as error:  # the type depends on the image format and on the damage
        if hasattr(dataset, "samples"):
            name = dataset.samples[index][0]
        else:
            name = dataset.filename(index) if hasattr(dataset, "filename") else f"number {index}"
        raise UnreadableImageError.of(name, error, is_storage_error(error, folder)) from None


def read_encoded(dataset: Any, index: int) -> tuple[Encoded, int]:
    """Read an image file and its label, or the image if the data set does not keep files."""
    if isinstance(dataset, ImageFiles):
        return dataset.read(index), dataset.samples[index][1]
    if isinstance(dataset, DatasetFolder):  # of torchvision
        return read_file(dataset.samples[index][0]), dataset.samples[index][1]
    if isinstance(dataset, ImageDataset):  # timm's own __getitem__ would replace an unreadable image silently
        file, target = dataset.reader[index]
        with file:
            content = file.read()
        return content, dataset.target_transform(target) if dataset.target_transform else target
    return dataset[index]


class Samples(Dataset):
    """Base class for training and validation samples.

    Args:
        data: images and transform.
        seed: the run's seed, from which augmentation is derived.
    """

    def __init__(self, data: ImageData, seed: int = 0) -> None:
        self.dataset: Any = data.dataset
        self.transform = data.transform
        self.decode: Any = data.decode
        self.outputs = data.outputs
        self.is_hugging_face = data.is_hugging_face
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def output_of(self, target: int) -> int:
        """The network's output index for a label."""
        return target if self.outputs is None else self.outputs[target]

    def __getstate__(self) -> dict[str, Any]:
        """State for a spawned worker, which must import Hugging Face's library before it unpickles its classes."""
        state = dict(self.__dict__)
        if self.is_hugging_face:
            state["dataset"] = bytes(ForkingPickler.dumps(self.dataset))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["is_hugging_face"]:
            import_hugging_face()
            state["dataset"] = pickle.loads(state["dataset"])
        self.__dict__.update(state)


class ValSamples(Samples):
    """Validation samples. An unreadable image is an error."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image and label.

        Raises:
            UnreadableImageError: the image is unreadable.
            MachineError: the storage does not respond.
        """
        try:
            image, target = read_sample(self.dataset, index, PAUSES, self.decode)
        except UnreadableImageError as error:
            raise (MachineError(str(error)) if error.is_storage_error else error) from None
        return self.transform(image), self.output_of(target)


class TrainSamples(Samples):
    """Training samples. Augmentation is determined by the seed and the sample's position in the epoch."""

    def __getitem__(self, sample: SampleIndex) -> tuple[Any, int, str]:
        """Return image, label, and the names of unreadable images that this one replaces.

        Raises:
            UserError: too many images are unreadable.
            MachineError: too many images are unreadable because the storage does not respond.
        """
        replacements, index, attempt = Replacements(), sample.index, 0
        pauses: Sequence[int] = PAUSES
        while True:
            seed_cpu(Stream.AUGMENTATION, self.seed, sample.epoch, sample.position)
            try:
                image, target = read_sample(self.dataset, index, pauses, self.decode)
                break
            except UnreadableImageError as error:
                replacements.add(error)
                pauses = () if error.is_storage_error else pauses  # do not wait again
                index = derived_seed(Stream.REPLACEMENT, self.seed, sample.epoch, sample.position, attempt) % len(self)
                attempt += 1
        return self.transform(image), self.output_of(target), replacements.take()


def collate(samples: list[Any]) -> list[Any]:
    """Collate samples into a batch.

    A loader worker moves the whole batch to shared memory here, where running out of shared memory raises an error. In
    the thread that sends the batch, the error would only be printed, and the batch lost.
    """
    batch: list[Any] = default_collate(samples)
    if get_worker_info() is not None:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()
    return batch
