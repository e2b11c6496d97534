"""Data sets, transforms and loaders for training and evaluation."""

import argparse
import importlib
import json
import math
import random
import sys
import tarfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder, VisionDataset
from torchvision.datasets.folder import default_loader

from samplers import DistributedEvalSampler, RepeatedAugmentationSampler
from utils import UserError, get_rank, get_world_size

IMAGENET_FOLDERS = {True: ("train", "ILSVRC2012_img_train"), False: ("val", "ILSVRC2012_img_val")}
DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19")
READERS = ("wds", "hfds", "hfids", "tfds", "torch")  # timm's
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@dataclass
class ImageData:
    """A data set and its classes: their number, and their names where the data set has any."""

    dataset: Dataset
    num_classes: int
    classes: list[str] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def build_dataset(is_train: bool, args: argparse.Namespace) -> ImageData:
    """The training or validation images of `--data-set` in `--data-path`, with their transform.

    Raises:
        UserError: there is no such data set there, or it lacks images.
    """
    root = Path(args.data_path)
    transform = build_transform(is_train, args)
    if "/" in args.data_set:
        return _timm_dataset(is_train, args, transform)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    if args.data_set == "IMNET":
        return _imagenet(root, is_train, transform)
    if args.data_set == "CIFAR":
        try:
            dataset = CIFAR100(str(root), train=is_train, transform=transform)
        except RuntimeError:
            raise UserError(f"--data-path {root}: no intact CIFAR-100 there (expected cifar-100-python/)") from None
        return ImageData(dataset, len(dataset.classes), dataset.classes)
    year = {"INAT": 2018, "INAT19": 2019}[args.data_set]
    dataset = INaturalist(root, is_train, year, args.inat_category, transform)
    return ImageData(dataset, len(dataset.classes), dataset.classes)


def _imagenet(root: Path, is_train: bool, transform: Any) -> ImageData:
    """A folder of class folders, or train.tar and val.tar of them."""
    names = IMAGENET_FOLDERS[is_train]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    archive = root / f"{names[0]}.tar"
    if folder is None and archive.is_file():
        return _archive(archive, transform)
    if folder is None:
        raise UserError(
            f"--data-path {root}: no {names[0]}/ folder there "
            "(expected train/ and val/, ILSVRC2012_img_train/ and ILSVRC2012_img_val/, or train.tar and val.tar)"
        )
    try:
        dataset = ImageFolder(str(folder), transform=transform)
    except FileNotFoundError as error:  # no class folder at all, or class folders without images
        raise UserError(f"--data-path {folder}: {str(error).splitlines()[0].split(' Supported')[0]}") from None
    return ImageData(dataset, len(dataset.classes), dataset.classes)


def _archive(path: Path, transform: Any) -> ImageData:
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
    dataset.transform = transform
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


def _timm_dataset(is_train: bool, args: argparse.Namespace, transform: Any) -> ImageData:
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
    dataset.transform = transform
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
        transform: of the images.

    Raises:
        UserError: a file is missing or no JSON, or the images are not there.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str, transform: Any = None) -> None:
        super().__init__(str(root), transform=transform)
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
        image = default_loader(path)
        return image if self.transform is None else self.transform(image), target


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
    """Shuffled batches of this process's share; the last incomplete one is dropped.

    Raises:
        UserError: there is not one whole batch.
    """
    dataset, world_size, rank = data.dataset, get_world_size(), get_rank()
    if isinstance(dataset, IterableDataset):
        _check_shards(dataset, args)
        dataset.set_loader_cfg(num_workers=args.num_workers)
        sampler = None
    elif args.repeated_aug:
        sampler = RepeatedAugmentationSampler(dataset, world_size, rank, args.seed)
    else:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)
    loader = _loader(dataset, args, args.batch_size, sampler, drop_last=True)
    if len(loader) == 0:
        share = len(dataset if sampler is None else sampler)
        raise UserError(
            f"--batch-size {args.batch_size}: larger than the {share} training images of a process; "
            "choose a smaller one, or fewer processes" + (", or --no-repeated-aug" if args.repeated_aug else "")
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
    elif args.dist_eval:
        sampler = DistributedEvalSampler(dataset, get_world_size(), get_rank())
    return _loader(dataset, args, int(1.5 * args.batch_size), sampler, drop_last=False)


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


def _loader(dataset: Dataset, args: argparse.Namespace, batch_size: int, sampler: Any, drop_last: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.device(args.device).type == "cuda",
        drop_last=drop_last,
        persistent_workers=args.num_workers > 0,
    )


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Choose an epoch's shuffle."""
    for part in (loader.sampler, loader.dataset):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators; loader workers derive theirs from torch's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
