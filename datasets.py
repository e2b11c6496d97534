"""Data sets, transforms and loaders for training and evaluation."""

import argparse
import hashlib
import importlib
import json
import math
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder, VisionDataset
from torchvision.datasets.folder import default_loader

from faults import ignore_preemption
from samplers import DistributedEvalSampler, Draw, TrainBatchSampler
from utils import (
    PAUSES,
    MachineError,
    Stream,
    UserError,
    derived_seed,
    get_rank,
    get_world_size,
    is_of_storage,
    patiently,
    seed_everything,
)

IMAGENET_FOLDERS = {True: ("train", "ILSVRC2012_img_train"), False: ("val", "ILSVRC2012_img_val")}
DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19")
REPLACEMENTS = 10  # images tried in place of one that cannot be read
READERS = ("wds", "hfds", "hfids", "tfds", "torch")  # timm's
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@dataclass
class ImageData:
    """A data set of images as they are, its classes (their number, and their names where it has any), and what is to be
    done with the images."""

    dataset: Dataset
    num_classes: int
    classes: list[str] | None = None
    transform: Any = None


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def build_dataset(is_train: bool, args: argparse.Namespace) -> ImageData:
    """The training or validation images of `--data-set` in `--data-path`, with their transform.

    Raises:
        UserError: there is no such data set there, or it lacks images.
    """
    transform = build_transform(is_train, args)
    return replace(_find_images(is_train, args), transform=transform)


def _find_images(is_train: bool, args: argparse.Namespace) -> ImageData:
    root = Path(args.data_path)
    if "/" in args.data_set:
        return _timm_dataset(is_train, args)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    if args.data_set == "IMNET":
        return _imagenet(root, is_train)
    if args.data_set == "CIFAR":
        try:
            dataset = CIFAR100(str(root), train=is_train)
        except RuntimeError:
            raise UserError(f"--data-path {root}: no intact CIFAR-100 there (expected cifar-100-python/)") from None
        return ImageData(dataset, len(dataset.classes), dataset.classes)
    year = {"INAT": 2018, "INAT19": 2019}[args.data_set]
    dataset = INaturalist(root, is_train, year, args.inat_category)
    return ImageData(dataset, len(dataset.classes), dataset.classes)


def _imagenet(root: Path, is_train: bool) -> ImageData:
    """A folder of class folders, or train.tar and val.tar of them."""
    names = IMAGENET_FOLDERS[is_train]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    archive = root / f"{names[0]}.tar"
    if folder is None and archive.is_file():
        return _archive(archive)
    if folder is None:
        raise UserError(
            f"--data-path {root}: no {names[0]}/ folder there "
            "(expected train/ and val/, ILSVRC2012_img_train/ and ILSVRC2012_img_val/, or train.tar and val.tar)"
        )
    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folder at all, or class folders without images
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].split(' Supported')[0]}") from None
    return ImageData(dataset, len(dataset.classes), dataset.classes)


def _archive(path: Path) -> ImageData:
    """A tar archive of class folders, its classes numbered as those of a folder: by name."""
    what = f"--data-path {path}"
    try:
        dataset = create_dataset("", root=str(path))
        classes = sorted(dataset.reader.class_name_to_idx)
        # timm orders numbers in names by value; a large archive takes long to scan again: only where that differs
        if classes != list(dataset.reader.class_name_to_idx):
            dataset = create_dataset("", root=str(path), class_map={name: i for i, name in enumerate(classes)})
    except (tarfile.TarError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{what}: no archive of class folders ({error})") from None
    if classes == [""]:
        raise UserError(f"{what}: its images lie in no class folders")
    return ImageData(dataset, len(classes), classes)


def _import_hugging_face() -> None:
    """Put Hugging Face's package `datasets`, which timm's reader imports, in the place of this file of its name."""
    own = sys.modules.get("datasets")
    if own is not None and getattr(own, "__file__", None) != __file__:
        return
    path = list(sys.path)
    sys.modules.pop("datasets", None)
    sys.path = [entry for entry in path if Path(entry).resolve() != Path(__file__).resolve().parent]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = own
        raise UserError(f"--data-set hfds/…: needs Hugging Face's library ({error}): pip install datasets") from None
    finally:
        sys.path = path


def _timm_dataset(is_train: bool, args: argparse.Namespace) -> ImageData:
    """A data set of timm's readers: wds/…, hfds/…, hfids/…, tfds/…, torch/…"""
    split = args.train_split if is_train else args.val_split
    what = f"--data-set {args.data_set}, split {split}, in --data-path {args.data_path}"
    if args.data_set.startswith("hf"):
        _import_hugging_face()
    try:
        dataset = create_dataset(
            args.data_set,
            root=args.data_path,
            split=split,
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
            num_samples=args.train_num_samples if is_train else args.val_num_samples,
        )
    except Exception as error:  # each reader's library has its own
        raise UserError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    shards = dataset.reader.split_info.filenames if args.data_set.startswith("wds/") else ()
    missing = [shard for shard in shards if ":" not in shard and not (Path(args.data_path) / shard).is_file()]
    if missing:
        raise UserError(f"{what}: {len(missing)} of {len(shards)} shards are not there ({missing[0]}, …)")
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    num_classes = args.num_classes or len(class_to_idx)
    if not num_classes:
        raise UserError(f"{what}: does not tell the number of its classes; name it with --num-classes")
    dataset.target_transform = partial(_check_label, num_classes=num_classes)
    return ImageData(dataset, num_classes, list(class_to_idx) or None)


def _check_label(label: int, num_classes: int) -> int:
    """Refuse a label that is no class's."""
    if not 0 <= label < num_classes:
        raise UserError(f"--num-classes {num_classes}: an image is labelled {label}; labels are numbered from 0")
    return label


class INaturalist(VisionDataset):
    """iNaturalist 2018 and 2019 at one level of the taxonomy.

    Classes are numbered in the order in which the training annotations first name them. The images lie at the JSON's
    `<split>/<kingdom>/<category id>/<file>`, or without the kingdom folder.

    Args:
        root: folder with train<year>.json, val<year>.json, categories.json and the images.
        train: training or validation images.
        year: 2018 or 2019.
        category: level of the taxonomy, one of `INAT_CATEGORIES`.

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
        return default_loader(path), target


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--data-path {path.parent}: {path.name} cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--data-path {path.parent}: {path.name} is not JSON ({error})") from None


def check_same_classes(train: ImageData, val: ImageData) -> None:
    """Refuse training and validation sets whose classes differ: their numbers would not mean the same.

    Raises:
        UserError: they differ.
    """
    if train.classes == val.classes:
        return
    differing = sorted(set(train.classes or []) ^ set(val.classes or []))
    raise UserError(
        f"--data-path: {len(differing)} classes are in the training or the validation images alone "
        f"({', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}); both need the same class folders"
    )


def fingerprint(data: ImageData) -> str:
    """A hash of which images a data set holds and what they show, of names and labels, not of pixels."""
    dataset = data.dataset
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    if hasattr(dataset, "samples"):
        for path, target in dataset.samples:
            digest.update(f"{path.removeprefix(str(dataset.root))}\0{target}\n".encode())
    elif isinstance(dataset, CIFAR100):
        digest.update(dataset.data.tobytes())
    elif isinstance(getattr(dataset, "reader", None), ReaderImageInTar):
        for sample, target in zip(dataset.reader.samples, dataset.reader.targets):
            digest.update(f"{sample[0].path}\0{target}\n".encode())
    else:
        reader = getattr(dataset, "reader", dataset)
        files = getattr(getattr(reader, "split_info", None), "filenames", ())
        digest.update(json.dumps([type(reader).__name__, len(dataset), *files]).encode())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


class UnreadableImageError(UserError):
    """An image is missing or broken.

    Attributes:
        name: of the image, its path where it has one.
        is_of_storage: it may be neither, as the storage does not answer.
    """

    name: str
    is_of_storage: bool

    @classmethod
    def of(cls, name: str, error: Exception, is_of_storage: bool = False) -> "UnreadableImageError":
        """That of an image, by what reading it raised."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        way_out = "" if is_of_storage else "; repair it or take it out"
        unreadable = cls(f"image {name}: cannot be read ({reason}){way_out}")
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

    def __len__(self) -> int:
        return len(self.dataset)


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
        """Image, label, and the images that could not be read, a line each: another one of the set is in their place.

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
        return self.transform(image), target, "\n".join(unreadable)


class ValStream(Samples, IterableDataset):
    """Validation samples of a data set that is read in turn; one that cannot be read is named."""

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self._images(lambda error: None):
            yield self.transform(image), target

    def _images(self, leave_out: Callable[[UnreadableImageError], Any], seed: int = 0) -> Iterator[tuple[Any, int]]:
        """Images as they are, and their labels.

        Args:
            leave_out: whether the next image is to be taken in place of one that cannot be read; webdatasets alone
                can do so.
            seed: of a webdataset's shuffle.

        Raises:
            UnreadableImageError: an image cannot be read, and is not to be left out.
        """
        if isinstance(self.dataset.reader, ReaderWds):
            _open_webdataset(self.dataset.reader, leave_out, seed)
        number = 0
        try:
            for sample in self.dataset:
                yield sample
                number += 1
        except (OSError, SyntaxError) as error:  # as broken images raise
            raise UnreadableImageError.of(f"number {number} of a worker's", error) from None


def _open_webdataset(reader: ReaderWds, leave_out: Callable[[UnreadableImageError], Any], seed: int) -> None:
    """Make the reader of a webdataset begin anew, by a seed and with names for images that cannot be read.

    By itself it draws its worker's only seed from how many random numbers were drawn before, and shuffles on through
    the epochs: in a run that goes on from a checkpoint, other images. What it cannot read it leaves out.
    """
    if reader.worker_info is None:
        reader._lazy_init()  # learns which worker it is
    reader.worker_seed = seed
    reader._lazy_init()
    for stage in reader.ds.pipeline:
        if getattr(stage, "args", ()) and isinstance(stage.args[0], partial):
            stage.args = (partial(_decoded, stage.args[0]),)
            stage.kw["handler"] = partial(_handle_unreadable, leave_out)


def _decoded(decode: Callable[[dict], dict], sample: dict[str, Any]) -> dict[str, Any]:
    """A webdataset's sample, decoded."""
    try:
        return decode(sample)
    except (TypeError, WdsTargetKeyError):  # not the image's fault
        raise
    except Exception as error:  # what broken images raise depends on their format, and how they are broken
        raise UnreadableImageError.of(f"{sample['__url__']}: {sample['__key__']}", error) from None


def _handle_unreadable(leave_out: Callable[[UnreadableImageError], Any], error: Exception) -> bool:
    if isinstance(error, UnreadableImageError) and leave_out(error):
        return True
    raise error


class TrainStream(ValStream):
    """Training samples of a data set that is read in turn, augmented by random numbers that follow from the seed, the
    epoch, and which sample of which worker and process it is.

    Args:
        data: the images and their transform.
        seed: the run's.
    """

    def __init__(self, data: ImageData, seed: int) -> None:
        super().__init__(data)
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers live longer than an epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose an epoch's shuffle."""
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        """Image, label, and the images before it that could not be read, a line each.

        Raises:
            UserError: none of several images can be read.
        """
        worker = get_worker_info()
        place = (self.epoch.item(), get_rank(), worker.id if worker else 0)
        unreadable: list[str] = []

        def leave_out(error: UnreadableImageError) -> bool:
            unreadable.append(error.name)
            if len(unreadable) > REPLACEMENTS:
                raise UserError(f"image {unreadable[0]}: cannot be read, nor can {REPLACEMENTS} others behind it")
            return True

        images = self._images(leave_out, derived_seed(Stream.SHUFFLE, self.seed, *place))
        for number, (image, target) in enumerate(images):
            seed_everything(Stream.AUGMENTATION, self.seed, *place, number)
            yield self.transform(image), target, "\n".join(unreadable)
            unreadable.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Transforms
# ----------------------------------------------------------------------------------------------------------------------


def build_transform(is_train: bool, args: argparse.Namespace) -> Any:
    """DeiT's transforms: timm's augmentation in training, resize and centre crop in evaluation.

    Raises:
        UserError: timm does not know `--aa`.
    """
    size = args.input_size
    if is_train:
        try:
            transform = create_transform(
                input_size=size,
                is_training=True,
                scale=tuple(args.scale),
                ratio=tuple(args.ratio),
                hflip=args.hflip,
                color_jitter=args.color_jitter,
                auto_augment=args.aa or None,
                interpolation=args.train_interpolation,
                re_prob=args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"--aa {args.aa}: no automatic augmentation of timm's ({error})") from None
        if size <= 32:
            transform.transforms[0] = transforms.RandomCrop(size, padding=4, pad_if_needed=True)
        return transform
    steps = [
        transforms.Resize(int(size * 256 / 224), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    return transforms.Compose(steps)


# ----------------------------------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------------------------------


def build_train_loader(data: ImageData, args: argparse.Namespace) -> DataLoader:
    """Shuffled, augmented batches of this process's share; the last incomplete step is dropped.

    Raises:
        UserError: there is not one whole step.
    """
    world_size = get_world_size()
    if isinstance(data.dataset, IterableDataset):
        _check_shards(data.dataset, args)
        data.dataset.set_loader_cfg(num_workers=args.num_workers)
        batches = dict(batch_size=args.batch_size, drop_last=True)
        loader = _loader(TrainStream(data, args.seed), args, **batches)
    else:
        samples = TrainSamples(data, args.seed)
        sampler = TrainBatchSampler(
            samples, args.batch_size, args.accum_steps, world_size, get_rank(), args.seed, args.repeated_aug
        )
        loader = _loader(samples, args, batch_sampler=sampler)
    if len(loader) == 0:
        raise UserError(
            f"--batch-size {args.batch_size}: larger than the {len(loader.dataset) // (world_size * args.accum_steps)} "
            "training images of a process and step; choose a smaller one, or fewer processes"
            + (", or --no-repeated-aug" if args.repeated_aug else "")
        )
    return loader


def _check_shards(dataset: IterableImageDataset, args: argparse.Namespace) -> None:
    """Refuse a webdataset with fewer shards than readers: those without one would wait for ever."""
    shards = len(dataset.reader.split_info.filenames) if hasattr(dataset.reader, "split_info") else None
    readers = get_world_size() * max(1, args.num_workers)
    if shards is not None and shards < readers:
        raise UserError(
            f"--num_workers {args.num_workers}: {args.data_set} has {shards} training shards, fewer than the {readers} "
            "loader workers of all processes; choose fewer workers or write more shards"
        )


def build_val_loader(data: ImageData, args: argparse.Namespace) -> DataLoader:
    """Batches of 1.5 × the training's, of all validation images, or (`--dist-eval`) of this process's share."""
    dataset, sampler = data.dataset, None
    if isinstance(dataset, IterableImageDataset):
        _read_exactly_once(dataset, args.dist_eval)
        dataset.set_loader_cfg(num_workers=args.num_workers)
        dataset = ValStream(data)
    else:
        dataset = ValSamples(data)
        if args.dist_eval:
            sampler = DistributedEvalSampler(dataset, get_world_size(), get_rank())
    return _loader(dataset, args, batch_size=int(1.5 * args.batch_size), sampler=sampler)


def _read_exactly_once(dataset: IterableImageDataset, split_shards: bool) -> None:
    """Make a timm reader give each validation sample once.

    On several processes timm's readers cut every share to the same length, which repeats and loses samples. Here each
    process reads as if it were alone: its own shards of a webdataset, or everything from the other readers.
    """
    reader = dataset.reader
    if getattr(reader, "dist_num_replicas", 1) == 1:
        return
    if split_shards and hasattr(reader, "split_info"):
        shards = reader.split_info.filenames[reader.dist_rank :: reader.dist_num_replicas]
        reader.split_info = replace(reader.split_info, filenames=shards)
        reader.num_samples = math.ceil((reader.num_samples or 0) / reader.dist_num_replicas)
    reader.dist_rank, reader.dist_num_replicas = 0, 1


def _loader(dataset: Dataset, args: argparse.Namespace, **batches: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.device(args.device).type == "cuda",
        worker_init_fn=ignore_preemption,
        persistent_workers=args.num_workers > 0,
        **batches,
    )


def epoch_batches(
    loader: DataLoader, epoch: int, step: int, accum_steps: int, tick: Callable[[str], None]
) -> Iterator[Any]:
    """A training epoch's batches from a step on; `tick` is told how far the way there is."""
    if isinstance(loader.batch_sampler, TrainBatchSampler):
        loader.batch_sampler.set_epoch(epoch, step)
        return iter(loader)
    if isinstance(loader.dataset, TrainStream):
        loader.dataset.set_epoch(epoch)
    batches = iter(loader)
    for number in range(min(step * accum_steps, len(loader))):  # what is read in turn has to be read again
        tick(f"epoch {epoch}, batch {number}, read again")
        next(batches)
    return batches
