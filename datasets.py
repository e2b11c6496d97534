"""Data sets, transforms and loaders for training and evaluation."""

import argparse
import logging
import math
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_transform
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms
from torchvision.datasets import CIFAR100

from faults import ignore_preemption
from samplers import DistributedEvalSampler, TrainBatchSampler
from training.samples import (
    ClassFolders,
    ImageData,
    INaturalist,
    TrainSamples,
    ValSamples,
    archive_damage,
    check_label,
    collate,
    import_hugging_face,
)
from training.streams import TrainStream, ValStream
from utils import MachineError, UserError, get_rank, get_world_size, is_of_storage

IMAGENET_FOLDERS = {True: ("train", "ILSVRC2012_img_train"), False: ("val", "ILSVRC2012_img_val")}
DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19")
READERS = ("wds", "hfds", "hfids", "tfds", "torch")  # timm's
# The sections of `--aa`'s names that timm knows, by how they begin. It takes others silently.
AUGMENTATIONS = {
    "rand": r"(m|n|mmax)\d+|mstd\d+(\.\d+)?|p\d+(\.\d+)?|inc[01]|t[a-z0-9]+",
    "augmix": r"(m|w|d)\d+|mstd\d+(\.\d+)?|a\d+(\.\d+)?|b[01]",
    "(original|v0)r?|3a": r"mstd\d+(\.\d+)?",
}
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def build_dataset(is_train: bool, args: argparse.Namespace) -> ImageData:
    """The training or validation images of `--data-set` in `--data-path`, with their transform.

    Raises:
        UserError: there is no such data set there, or it lacks images.
    """
    transform = build_transform(is_train, args)
    try:
        data = _find_images(is_train, args)
    except OSError as error:
        what = f"--data-path {args.data_path}: {error.filename} cannot be read ({error.strerror})"
        if is_of_storage(error, args.data_path):
            raise MachineError(what) from None
        raise UserError(f"{what}; correct its permissions, or name another folder") from None
    if args.num_classes and data.num_classes != args.num_classes:
        raise UserError(f"--num-classes {args.num_classes}: {args.data_path} has {data.num_classes} classes; leave it "
                        "out, it is for timm's readers that do not tell")  # fmt: skip
    return replace(data, transform=transform)


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
        dataset = ClassFolders(str(folder))
    except FileNotFoundError:
        raise UserError(f"--data-path {folder}: no class folder there (expected one with images a class)") from None
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
        raise UserError(f"{what}: no archive of class folders, or damaged ({error})") from None
    if classes == [""]:
        raise UserError(f"{what}: its images lie in no class folders")
    if damage := archive_damage(dataset.reader):
        raise UserError(f"{what}: damaged after the {len(dataset)} images found in it ({damage}); take a whole copy")
    return ImageData(dataset, len(classes), classes)


def _timm_dataset(is_train: bool, args: argparse.Namespace) -> ImageData:
    """A data set of timm's readers: wds/…, hfds/…, hfids/…, tfds/…, torch/…"""
    split = args.train_split if is_train else args.val_split
    what = f"--data-set {args.data_set}, split {split}, in --data-path {args.data_path}"
    if args.data_set.startswith("hf"):
        import_hugging_face()
    # timm warns where there is no info.json beside the shards, which is optional, and of errors that are raised here
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
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
    dataset.target_transform = partial(check_label, num_classes=num_classes)
    return ImageData(dataset, num_classes, list(class_to_idx) or None, is_hugging_face=args.data_set.startswith("hf"))


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
        _check_augmentation(args.aa)
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


def _check_augmentation(name: str) -> None:
    """Refuse a name of an automatic augmentation with a section that timm would pass over.

    Raises:
        UserError: it has one, or is none of timm's.
    """
    policy, *sections = name.split("-")
    pattern = next((sections for begin, sections in AUGMENTATIONS.items() if re.fullmatch(begin, policy)), None)
    if name and pattern is None:
        raise UserError(f"--aa {name}: no automatic augmentation of timm's; they begin with rand, augmix, original, "
                        "originalr, v0, v0r or 3a")  # fmt: skip
    if unknown := [section for section in sections if not re.fullmatch(pattern, section)]:
        raise UserError(f"--aa {name}: {policy} has no section {unknown[0] or '-'}; one such as rand-m9-mstd0.5-inc1 "
                        "has a letter and a number in each")  # fmt: skip


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
        raise UserError(_no_step(len(loader.dataset), world_size, args))
    return loader


def _no_step(images: int, processes: int, args: argparse.Namespace) -> str:
    """Why there is not one whole step in an epoch, by the settings that make a step large."""
    factors = {"--batch-size": args.batch_size, "--accum-steps": args.accum_steps}
    named = [f"{flag} {value}" for flag, value in factors.items() if flag == "--batch-size" or value > 1]
    named += [f"{processes} processes"] if processes > 1 else []
    step = f"{' × '.join(named)}: a step takes {args.batch_size * args.accum_steps * processes} images"
    if args.repeated_aug and images >= math.prod(factors.values()) * processes:
        return (f"--repeated-aug: an epoch takes {images // 256 * 256} of the {images} training images, a multiple of "
                f"256, and {step}; take --no-repeated-aug or smaller steps")  # fmt: skip
    return f"{step}, more than the {images} training images; choose smaller ones"


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
        collate_fn=collate,
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
