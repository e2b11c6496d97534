"""Images and labels as loader workers read them: data sets, samples, and what happens to images that are unreadable.

All that travels to the workers is here or in `training.streams`. Where workers are spawned (macOS, Windows), they
import its classes by name, and the name `datasets` may be Hugging Face's library's there (`import_hugging_face`).
"""

import hashlib
import importlib
import json
import os
import pickle
import stat
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.datasets import CIFAR100, ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from samplers import Draw
from utils import (
    PAUSES,
    MachineError,
    Stream,
    UserError,
    derived_seed,
    is_of_storage,
    patiently,
    seed_everything,
)

REPLACEMENTS = 10  # images tried in place of one that cannot be read
NAMES_END = "\0"  # between the names of a batch's unreadable images: a name may hold any other character
OWN_DATASETS = Path(__file__).resolve().parent.parent / "datasets.py"


@dataclass
class ImageData:
    """A data set of images and what is to be done with them.

    Attributes:
        dataset: the images as they are, and their labels.
        num_classes: number of classes.
        classes: names of the classes, where the data set has any.
        transform: of the images.
        is_hugging_face: whether Hugging Face's library reads the images.
    """

    dataset: Dataset
    num_classes: int
    classes: list[str] | None = None
    transform: Any = None
    is_hugging_face: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def load_image(path: str) -> Image.Image:
    """Load an image file, RGB.

    Raises:
        OSError: it cannot be read; or it is a pipe or a device, where reading would wait for ever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return default_loader(path)


class ClassFolders(ImageFolder):
    """A folder of class folders of images, as torchvision reads it, but for folders that cannot be read: it skips them.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no class folder.
        UserError: a class folder holds no images.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, loader=load_image)

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Paths and labels of all images, in torchvision's order."""

        def refuse(error: OSError) -> None:
            raise error

        samples, empty = [], []
        for name, label in sorted(class_to_idx.items()):
            before = len(samples)
            for folder, _, files in sorted(os.walk(os.path.join(directory, name), onerror=refuse, followlinks=True)):
                images = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
                samples += [(os.path.join(folder, image), label) for image in images]
            if len(samples) == before:
                empty.append(name)
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise UserError(f"--data-path {directory}: no image in the class folders {', '.join(empty[:3])}{more} "
                            f"(images end in {', '.join(IMG_EXTENSIONS)})")  # fmt: skip
        return samples


class INaturalist(VisionDataset):
    """iNaturalist 2018 and 2019 at one level of the taxonomy.

    Classes are numbered in the order in which the training annotations first name them. The images lie at the JSON's
    `<split>/<kingdom>/<category id>/<file>`, or without the kingdom folder.

    Args:
        root: folder with train<year>.json, val<year>.json, categories.json and the images.
        train: training or validation images.
        year: 2018 or 2019.
        category: level of the taxonomy, one of `datasets.INAT_CATEGORIES`.

    Raises:
        UserError: a file is missing or no JSON, or the images are not there.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str) -> None:
        super().__init__(str(root))
        try:
            self._read_annotations(root, train, year, category)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--data-path {root}: annotations are not as iNaturalist's ({error!r})") from None
        if not self.samples or not Path(self.samples[0][0]).is_file():
            raise UserError(f"--data-path {root}: no image at {self.samples[0][0] if self.samples else 'all'}")

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
        raise UserError(f"--data-path {path.parent}: {path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--data-path {path.parent}: {path.name} is not JSON ({error})") from None


def check_label(label: int, num_classes: int) -> int:
    """Refuse a label that is no class's."""
    if not 0 <= label < num_classes:
        raise UserError(f"--num-classes {num_classes}: an image is labelled {label}; labels are numbered from 0")
    return label


def import_hugging_face() -> None:
    """Import Hugging Face's package `datasets`, which timm's reader needs, in place of this project's file of its name.

    Raises:
        UserError: it is not installed.
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
        sys.modules["datasets"] = own
        raise UserError(f"--data-set hfds/…: needs Hugging Face's library ({error}): pip install datasets") from None
    finally:
        sys.path = path


def fingerprint(data: ImageData) -> str:
    """A hash of which images a data set holds and what they show, of names and labels, not of pixels."""
    dataset = data.dataset
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    if hasattr(dataset, "samples"):
        for path, target in dataset.samples:
            digest.update(os.fsencode(f"{path.removeprefix(str(dataset.root))}\0{target}\n"))
    elif isinstance(dataset, CIFAR100):
        digest.update(dataset.data.tobytes())
    elif isinstance(getattr(dataset, "reader", None), ReaderImageInTar):
        for sample, target in zip(dataset.reader.samples, dataset.reader.targets):
            digest.update(os.fsencode(f"{sample[0].path}\0{target}\n"))
    else:
        reader = getattr(dataset, "reader", dataset)
        files = getattr(getattr(reader, "split_info", None), "filenames", ())
        digest.update(json.dumps([type(reader).__name__, len(dataset), *files]).encode())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Archives
# ----------------------------------------------------------------------------------------------------------------------


class CheckedTarInfo(tarfile.TarInfo):
    """Member of a tar archive that has to be whole. Python takes a broken header, or none, for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Read the next member's header.

        Raises:
            tarfile.ReadError: there is neither one nor the mark of the archive's end.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise tarfile.ReadError("truncated: it has no mark of its end") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged: {error}") from None


def archive_damage(reader: ReaderImageInTar) -> str | None:
    """What is wrong with a tar archive after the last image that timm found in it; None where it is whole.

    The part before that was walked through from header to header, and an image's own bytes are decoded in reading.
    """
    images = [sample[0] for sample in reader.samples if sample[2] is None]
    inner: dict[int, list[tarfile.TarInfo]] = {}  # images of archives inside the archive, by where these begin
    archives = {}
    for image, _, archive in reader.samples:
        if archive is not None:
            inner.setdefault(archive.offset_data, []).append(image)
            archives[archive.offset_data] = archive
    try:
        with open(reader.root, "rb") as file:
            _check_rest(file, images + list(archives.values()))
        with tarfile.open(reader.root, "r:") as outer:
            for begin, members in inner.items():
                _check_rest(outer.extractfile(archives[begin]), members)
    except (tarfile.TarError, OSError) as error:
        return str(error)
    return None


def _check_rest(file: BinaryIO, members: Sequence[tarfile.TarInfo]) -> None:
    """Walk through an archive from its last known member to the mark of its end.

    Raises:
        tarfile.ReadError: it does not come to that.
    """
    last = max(members, key=lambda member: member.offset_data)
    blocks = -(-last.size // tarfile.BLOCKSIZE)
    file.seek(last.offset_data + blocks * tarfile.BLOCKSIZE)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedTarInfo) as rest:
        for _ in rest:
            pass


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


class UnreadableImageError(UserError):
    """An image, or an archive of them, is missing or broken.

    Attributes:
        name: of the image, its path where it has one.
        is_of_storage: it may be neither, as the storage does not answer.
    """

    name: str
    is_of_storage: bool

    @classmethod
    def of(
        cls, name: str, error: Exception, is_of_storage: bool = False, kind: str = "image"
    ) -> "UnreadableImageError":
        """That of an image or a shard, by what reading it raised."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        way_out = "" if is_of_storage else "; repair it or take it out"
        unreadable = cls(f"{kind} {name}: cannot be read ({reason}){way_out}")
        unreadable.name = name
        unreadable.is_of_storage = is_of_storage
        return unreadable


def read_sample(dataset: Dataset, index: int, pauses: Sequence[int]) -> tuple[Any, int]:
    """An image as it is, RGB, and its label; storage that does not answer is tried again after pauses (in seconds).

    Raises:
        UnreadableImageError: it cannot be read.
    """

    def read() -> tuple[Any, int]:
        if isinstance(dataset, ImageDataset):  # timm's, which would take the next image
            file, target = dataset.reader[index]
            image = Image.open(file).convert("RGB")
            return image, dataset.target_transform(target) if dataset.target_transform else target
        return dataset[index]

    folder = getattr(dataset, "root", ".")
    try:
        return patiently(read, folder, pauses)
    except UserError:
        raise
    except Exception as error:  # what broken images raise depends on their format, and how they are broken
        if hasattr(dataset, "samples"):
            name = dataset.samples[index][0]
        else:
            name = dataset.filename(index) if hasattr(dataset, "filename") else f"number {index}"
        raise UnreadableImageError.of(name, error, is_of_storage(error, folder)) from None


class Samples(Dataset):
    """What samples are made of.

    Args:
        data: the images and their transform.
    """

    def __init__(self, data: ImageData) -> None:
        self.dataset = data.dataset
        self.transform = data.transform
        self.is_hugging_face = data.is_hugging_face

    def __len__(self) -> int:
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """State for a spawned worker, in which Hugging Face's library has to be imported before its classes are."""
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
    """Validation samples; one that cannot be read is named."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and label.

        Raises:
            UnreadableImageError: the image cannot be read.
            MachineError: the storage does not answer.
        """
        try:
            image, target = read_sample(self.dataset, index, PAUSES)
        except UnreadableImageError as error:
            raise (MachineError(str(error)) if error.is_of_storage else error) from None
        return self.transform(image), target


class TrainSamples(ValSamples):
    """Training samples, augmented by random numbers that follow from the seed and the sample's place in the epoch.

    Args:
        data: the images and their transform.
        seed: the run's.
    """

    def __init__(self, data: ImageData, seed: int) -> None:
        super().__init__(data)
        self.seed = seed

    def __getitem__(self, draw: Draw) -> tuple[Any, int, str]:
        """Image, label, and the names of images that could not be read: another one of the set is in their place.

        Raises:
            UserError: none of several images can be read.
            MachineError: that is as the storage does not answer.
        """
        index, unreadable, pauses = draw.index, [], PAUSES
        for attempt in range(REPLACEMENTS + 1):
            try:
                image, target = read_sample(self.dataset, index, pauses)
                break
            except UnreadableImageError as error:
                unreadable.append(error.name)
                kind, pauses = (MachineError, ()) if error.is_of_storage else (UserError, pauses)
                index = derived_seed(Stream.REPLACEMENT, self.seed, draw.epoch, draw.place, attempt) % len(self)
        else:
            raise kind(f"image {unreadable[0]}: cannot be read, nor can {REPLACEMENTS} others taken in its place")
        seed_everything(Stream.AUGMENTATION, self.seed, draw.epoch, draw.place)
        return self.transform(image), target, NAMES_END.join(unreadable)


def collate(samples: list[Any]) -> list[Any]:
    """Make a batch of samples. A loader's worker puts all of it into shared memory here, where running out of that is
    an error of its own: in the thread that sends the batch it would be printed, and the batch lost."""
    batch = default_collate(samples)
    if get_worker_info() is not None:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()
    return batch
