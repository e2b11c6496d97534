"""Data sets and samples as loader workers read them.

Everything that is pickled for the workers is here or in `training.streams`. Spawned workers (macOS, Windows) import the
classes by name, and there the name `datasets` may belong to Hugging Face's library (`import_hugging_face`).
"""

import hashlib
import importlib
import json
import os
import pickle
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.datasets import CIFAR100, ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from samplers import Draw
from training.augmentation import Crop, CropBatch, collate_crops
from training.decoding import Encoded
from training.errors import MachineError, UserError, setting
from training.readers import archive_labels, shards_of
from training.storage import PAUSES, is_storage_error, with_retries
from training.unreadable import Replacements, UnreadableImageError
from utils import Stream, derived_seed, seed_cpu

OWN_DATASETS = Path(__file__).resolve().parent.parent / "datasets.py"


@dataclass(frozen=True)
class ImageData:
    """A data set of images, its classes, and the transform of its images.

    Attributes:
        dataset: images without transform, and their labels.
        num_classes: number of classes.
        classes: names of the classes, None if the data set has none.
        transform: transform of the images.
        decode: decodes an image file for the transform, and may draw random numbers; None: the data set decodes.
        is_hugging_face: whether Hugging Face's library reads the images.
    """

    dataset: Any
    num_classes: int
    classes: list[str] | None = None
    transform: Any = None
    decode: Callable[[Encoded], Any] | None = None
    is_hugging_face: bool = False

    def __len__(self) -> int:
        return len(self.dataset)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def load_image(path: str) -> Image.Image:
    """Load an image file, RGB.

    Raises:
        OSError: the image is unreadable, or is a pipe or a device, which could block for ever.
    """
    _check_regular(path)
    return default_loader(path)


def read_file(path: str) -> bytes:
    """Read an image file without decoding it.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which could block for ever.
    """
    _check_regular(path)
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _check_regular(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")


class ClassFolders(ImageFolder):
    """A folder of class folders of images. Unlike torchvision's, it does not skip unreadable folders.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: the folder has no class folder.
        UserError: a class folder has no images.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, loader=load_image)

    @staticmethod
    def make_dataset(
        directory: str, class_to_idx: dict[str, int], *unused: Any, **also_unused: Any
    ) -> list[tuple[str, int]]:
        """List paths and labels of all images, in torchvision's order."""

        def refuse(error: OSError) -> None:
            raise error

        samples: list[tuple[str, int]] = []
        empty: list[str] = []
        for name, label in sorted(class_to_idx.items()):
            before = len(samples)
            for folder, _, files in sorted(os.walk(os.path.join(directory, name), onerror=refuse, followlinks=True)):
                images = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
                samples += [(os.path.join(folder, image), label) for image in images]
            if len(samples) == before:
                empty.append(name)
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise UserError(f"{setting('data_path', directory)}: no image in the class folders "
                            f"{', '.join(empty[:3])}{more} (images end in {', '.join(IMG_EXTENSIONS)})")  # fmt: skip
        return samples


class INaturalist(VisionDataset):
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
        super().__init__(str(root))
        try:
            self._read_annotations(root, train, year, category)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{setting('data_path', root)}: annotations are not iNaturalist's ({error!r})") from None
        if not self.samples or not Path(self.samples[0][0]).is_file():
            place = self.samples[0][0] if self.samples else "all"
            raise UserError(f"{setting('data_path', root)}: no image at {place}")

    def _read_annotations(self, root: Path, train: bool, year: int, category: str) -> None:
        taxonomy = {entry.get("id", i): entry for i, entry in enumerate(_read_json(root / "categories.json"))}
        training = _read_json(root / f"train{year}.json")
        names = (str(taxonomy[annotation["category_id"]][category]) for annotation in training["annotations"])
        self.classes = list(dict.fromkeys(names))
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        images = (training if train else _read_json(root / f"val{year}.json"))["images"]
        with_kingdom: dict[Path, bool] = {}
        self.samples: list[tuple[str, int]] = []
        for image in images:
            split, kingdom, category_id, file = image["file_name"].split("/")[-4:]
            folder = root / split / kingdom
            if folder not in with_kingdom:
                with_kingdom[folder] = folder.is_dir()
            path = (folder if with_kingdom[folder] else root / split) / category_id / file
            self.samples.append((str(path), self.class_to_idx[str(taxonomy[int(category_id)][category])]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return load_image(path), target


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
    """Make the name `datasets` mean Hugging Face's package, which timm's reader needs, not this project's file.

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


def fingerprint(data: ImageData) -> str:
    """Hash the names and labels of a data set's images, not their pixels."""
    dataset = data.dataset
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    if hasattr(dataset, "samples"):
        for path, target in dataset.samples:
            digest.update(os.fsencode(f"{path.removeprefix(str(dataset.root))}\0{target}\n"))
    elif isinstance(dataset, CIFAR100):
        digest.update(dataset.data.tobytes())
    elif isinstance(getattr(dataset, "reader", None), ReaderImageInTar):
        for name, target in archive_labels(dataset.reader):
            digest.update(os.fsencode(f"{name}\0{target}\n"))
    else:
        reader = getattr(dataset, "reader", dataset)
        files = shards_of(dataset) or ()
        digest.update(json.dumps([type(reader).__name__, len(dataset), *files]).encode())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


def read_sample(
    dataset: Any, index: int, pauses: Sequence[int], decode: Callable[[Encoded], Any] | None = None
) -> tuple[Any, int]:
    """Read an image, without transform, and its label. Retries while the storage does not respond.

    Args:
        dataset: the data set.
        index: the image's index in it.
        pauses: seconds between the attempts.
        decode: decodes an image file; None: the data set does, to RGB.

    Raises:
        UnreadableImageError: the image is unreadable.
    """

    def read() -> tuple[Any, int]:
        if decode is not None:
            encoded, target = read_encoded(dataset, index)
            return decode(encoded), target
        if isinstance(dataset, ImageDataset):  # timm's own __getitem__ would replace an unreadable image silently
            file, target = dataset.reader[index]
            image = Image.open(file).convert("RGB")
            return image, dataset.target_transform(target) if dataset.target_transform else target
        return dataset[index]

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
    """Read an image's file and its label; or its image, from a data set that does not keep files."""
    if isinstance(dataset, (ClassFolders, INaturalist)):
        path, target = dataset.samples[index]
        return read_file(path), target
    if isinstance(dataset, ImageDataset):
        file, target = dataset.reader[index]
        with file:
            content = file.read()
        return content, dataset.target_transform(target) if dataset.target_transform else target
    return dataset[index]


class Samples(Dataset):
    """Base class of samples.

    Args:
        data: images and transform.
        seed: the run's seed, from which augmentation is derived.
    """

    def __init__(self, data: ImageData, seed: int = 0) -> None:
        self.dataset: Any = data.dataset
        self.transform = data.transform
        self.decode: Any = data.decode
        self.is_hugging_face = data.is_hugging_face
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

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
            image, target = read_sample(self.dataset, index, PAUSES)
        except UnreadableImageError as error:
            raise (MachineError(str(error)) if error.is_storage_error else error) from None
        return self.transform(image), target


class TrainSamples(Samples):
    """Training samples. Augmentation follows from the seed and the sample's place in the epoch."""

    def __getitem__(self, draw: Draw) -> tuple[Any, int, str]:
        """Return image, label, and the names of unreadable images that this one replaces.

        Raises:
            UserError: too many images are unreadable.
            MachineError: too many are, because the storage does not respond.
        """
        replacements, index, attempt = Replacements(), draw.index, 0
        pauses: Sequence[int] = PAUSES
        while True:
            seed_cpu(Stream.AUGMENTATION, self.seed, draw.epoch, draw.place)
            try:
                image, target = read_sample(self.dataset, index, pauses, self.decode)
                break
            except UnreadableImageError as error:
                replacements.add(error)
                pauses = () if error.is_storage_error else pauses  # do not wait again
                index = derived_seed(Stream.REPLACEMENT, self.seed, draw.epoch, draw.place, attempt) % len(self)
                attempt += 1
        return self.transform(image), target, replacements.take()


def collate(samples: list[Any]) -> list[Any]:
    """Collate samples into a batch. Images are a tensor, or a `CropBatch` of the fast loader.

    A loader worker moves the whole batch to shared memory here, where running out of shared memory raises an error. In
    the thread that sends the batch, the error would only be printed, and the batch lost.
    """
    if isinstance(samples[0][0], Crop):
        batch = [collate_crops([sample[0] for sample in samples]), *default_collate([s[1:] for s in samples])]
    else:
        batch = default_collate(samples)
    if get_worker_info() is not None:
        for part in batch:
            if isinstance(part, (Tensor, CropBatch)):
                part.share_memory_()
    return batch
