"""Data sets, transforms and loaders for training and validation."""

import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import create_dataset, create_transform
from timm.data.dataset import IterableImageDataset
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder

from samplers import TrainBatchSampler
from sepvit_lib.common.class_names import canonical, listed, order_of, read_class_map
from sepvit_lib.common.class_weights import BALANCED
from sepvit_lib.common.errors import MachineError, UserError, setting
from sepvit_lib.common.packages import require
from sepvit_lib.common.processes import get_rank, get_world_size, print_main
from sepvit_lib.common.storage import is_storage_error
from sepvit_lib.pipeline.data_sets.archive import Archive
from sepvit_lib.pipeline.data_sets.base import ImageFiles, Images, classes_of
from sepvit_lib.pipeline.data_sets.class_folders import ClassFolders
from sepvit_lib.pipeline.data_sets.inaturalist import INaturalist
from sepvit_lib.pipeline.data_sets.libraries import Cifar100, from_library, import_hugging_face
from sepvit_lib.pipeline.data_sets.table import ALL, SEPARATOR, Table, split_name
from sepvit_lib.pipeline.image_files import IMAGE_SUFFIXES, Encoded, decode, describe_skipped, is_hidden
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.pipeline.readers import read_exactly_once, shards_of
from sepvit_lib.pipeline.samples import ImageData, TrainSamples, ValSamples, collate
from sepvit_lib.pipeline.scaled_decoding import CropDecoder
from sepvit_lib.pipeline.splits import validation_part
from sepvit_lib.pipeline.streams import TrainStream, ValStream
from sepvit_lib.run.state import Precision
from sepvit_lib.run.watchdog import ignore_preemption

T = TypeVar("T", bound=ImageFiles)
IMAGENET_FOLDERS = {True: ("train", "ILSVRC2012_img_train"), False: ("val", "ILSVRC2012_img_val")}
READERS = ("wds", "hfds", "hfids", "tfds", "torch")  # prefixes that select one of timm's readers
# Arguments for timm's readers: find images of all formats, but leave decoding to `sepvit_lib.pipeline.image_files`.
READER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "wds": dict(input_key=";".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))),
    "hfids": dict(input_img_mode=""),
}
TABLE = "csv/"  # prefix that selects a CSV or TSV file
STREAMS = ("wds", "hfids", "tfds")  # readers of streaming data sets
FEW_IMAGES = 5  # classes with fewer images are named
SMALL_INPUT = 32  # side in pixels up to which training images are padded and cropped, not resized
# Regular expressions for policies, and for the valid sections of the names of automatic augmentations with these
# policies. timm silently ignores invalid sections.
AUGMENTATIONS = {
    "rand": r"(m|n|mmax)\d+|mstd\d+(\.\d+)?|p\d+(\.\d+)?|inc[01]|t[a-z0-9]+",
    "augmix": r"(m|w|d)\d+|mstd\d+(\.\d+)?|a\d+(\.\d+)?|b[01]",
    "(original|v0)r?|3a": r"mstd\d+(\.\d+)?",
}
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@dataclass(frozen=True)
class DataSettings:
    """Settings of the data set.

    Attributes:
        data_set: one of `DATA_SETS`, or a name for timm that begins with one of `READERS` and a slash.
        data_path: folder of the data set.
        class_map: file with the order of the classes, in timm's format; "" to sort them by name.
        inat_category: level of iNaturalist's taxonomy, one of `INAT_CATEGORIES`.
        num_classes: number of classes, for readers that do not report it.
        train_split: name of the training split, for timm's readers.
        val_split: name of the validation split.
        train_num_samples: number of training images, for readers that do not report it.
        val_num_samples: number of validation images.
        batch_size: images per batch. timm's readers round each worker's share up to a multiple of this number.
        seed: the run's seed.
        in_chans: channels of the images; None for 3. With other numbers, NumPy files are images, too.
        val_fraction: share of the images for validation, if the data set has no validation images; None for none.
        split_seed: seed of the split by `val_fraction`.
        path_column: name of the column of a table with the paths of the images.
        label_column: name of the column with the labels.
        split_column: name of the column with the names of splits, if there is one.
        group_column: name of the column with groups that are not split, if there is one.
        weight_column: name of the column with the weights of training images in the loss, if there is one.
        multi_label: whether an image of a table may have several labels, or none.
        ignore_classes: names of classes whose images are not used.
        is_labelled: whether the labels are used. If not, the training folder needs no class folders.
    """

    data_set: str
    data_path: str
    class_map: str
    inat_category: str
    num_classes: int | None
    train_split: str
    val_split: str
    train_num_samples: int | None
    val_num_samples: int | None
    batch_size: int
    seed: int
    in_chans: int | None
    val_fraction: float | None
    split_seed: int
    path_column: str
    label_column: str
    split_column: str
    group_column: str
    weight_column: str
    multi_label: bool
    ignore_classes: Sequence[str]
    is_labelled: bool = True

    @property
    def arrays(self) -> bool:
        """Whether NumPy files are images, too."""
        return self.in_chans not in (None, 3)


@dataclass(frozen=True)
class TransformSettings:
    """Settings of the transforms.

    Attributes:
        preprocessing: transform of validation images. Training uses its size, mean and standard deviation.
        orientation: 'stored', or 'exif' to turn images upright.
        scale: smallest and largest area of the random crop, as a share of the image.
        ratio: smallest and largest aspect ratio of the random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of colour jitter, which most automatic augmentations turn off.
        aa: timm's name of an automatic augmentation, "" for none.
        train_interpolation: interpolation of the random crop.
        reprob: probability of random erasing.
        remode: fill of the erased regions.
        recount: number of erased regions per image.
        loader: 'faithful' or 'fast'.
        no_aug: transform training images like validation images.
    """

    preprocessing: Preprocessing
    orientation: str
    scale: Sequence[float]
    ratio: Sequence[float]
    hflip: float
    color_jitter: float
    aa: str
    train_interpolation: str
    reprob: float
    remode: str
    recount: int
    loader: str
    no_aug: bool


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of the loaders.

    Attributes:
        batch_size: training images per rank and batch.
        accum_steps: batches that each rank accumulates per step.
        repeated_aug: use repeated augmentation.
        seed: the run's seed.
        num_workers: loader workers per rank.
        pin_mem: load into pinned memory, for CUDA.
        device: the device.
        dist_eval: split the validation images across ranks.
        data_set: the data set, for messages.
        sampler: 'random', or 'balanced' to draw all classes equally often.
    """

    batch_size: int
    accum_steps: int
    repeated_aug: bool
    seed: int
    num_workers: int
    pin_mem: bool
    device: str
    dist_eval: bool
    data_set: str
    sampler: str


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


def find_dataset(is_train: bool, settings: DataSettings) -> ImageData:
    """Find the training or validation images.

    Args:
        is_train: find the training images; otherwise, the validation images.
        settings: settings of the data set.

    Raises:
        UserError: the data set is missing or incomplete.
        MachineError: the storage does not respond.
    """
    data_path = setting("data_path", settings.data_path)
    try:
        data = _find_images(is_train, settings)
    except OSError as error:
        what = f"{data_path}: {error.filename} cannot be read ({error.strerror})"
        if is_storage_error(error, settings.data_path):
            raise MachineError(what) from None
        raise UserError(f"{what}; correct its permissions, or choose another folder") from None
    if settings.num_classes and data.num_classes != settings.num_classes:
        raise UserError(
            f"{setting('num_classes', settings.num_classes)}: {settings.data_path} has {data.num_classes} "
            "classes; omit it: only timm's readers may need it"
        )
    if settings.class_map:
        data = _numbered(data, settings.class_map)
    if settings.is_labelled and not settings.multi_label:  # each of several labels may be absent
        _check_number(data)
    report_images(data, f"{settings.data_path}, {'training' if is_train else 'validation'} images")
    return data


def _numbered(data: ImageData, class_map: str) -> ImageData:
    """Number the classes of a data set as in a class map.

    Raises:
        UserError: the classes have no names, or the class map does not fit.
    """
    if data.classes is None:
        raise UserError(f"{setting('class_map', class_map)}: the classes of the data set have no names; omit it")
    classes, outputs = read_class_map(class_map, data.classes, setting("data_path"))
    return replace(data.renumbered(outputs, classes), class_map=class_map)


def _check_number(data: ImageData) -> None:
    """Refuse a single class, which any network predicts correctly.

    Raises:
        UserError: there is a single class. The message names the subfolders of its folder, which may be the classes.
    """
    if data.num_classes > 1:
        return
    name = (data.classes or ["0"])[0]
    folder, hint = Path(data.dataset.root, name), "add another class folder"
    if inner := sorted(path.name for path in folder.glob("*/") if not is_hidden(path.name)):
        hint = f"its folders ({listed(inner)}) may be the classes: move them one level up"
    raise UserError(f"{setting('data_path', folder.parent)}: a single class, {name}, leaves nothing to learn; {hint}")


def report_images(data: ImageData, what: str) -> None:
    """Warn of files that are skipped, and of classes without images or with few.

    Args:
        data: the data set.
        what: description of the data set, for the warnings.
    """
    if data.dataset.skipped:
        print_main(f"WARNING: {what}: {describe_skipped(data.dataset.skipped)}")
    counts, names = data.label_counts(), data.classes or list(map(str, range(data.num_classes)))
    if not counts:
        return
    missing = [name for number, name in enumerate(names) if number not in counts]
    few = [name for number, name in enumerate(names) if 0 < counts[number] < FEW_IMAGES]
    for many, classes in (("no", missing), (f"fewer than {FEW_IMAGES}", few)):
        if classes:
            print_main(f"WARNING: {many} {what} for {len(classes)} of {len(names)} classes: {listed(classes)}")


def prepared(data: ImageData, is_train: bool, settings: TransformSettings) -> ImageData:
    """Set the decoder and the transform of a data set's images.

    Raises:
        UserError: timm does not know the automatic augmentation, a decoder is not installed, or the loader does not
            support the number of channels.
    """
    transform, channels = build_transform(is_train, settings), settings.preprocessing.channels
    decoder: Callable[[Encoded], Any] = partial(decode, orientation=settings.orientation, channels=channels)
    if channels != 3 and settings.loader == "fast":
        raise UserError(f"{setting('loader', 'fast')}: supports only 3 channels, not {channels}; use faithful")
    if is_train and settings.loader == "fast":
        steps, _ = split_transform(transform)
        if isinstance(steps[0], RandomResizedCropAndInterpolation):
            decoder = CropDecoder(steps.pop(0), settings.orientation)
        transform = transforms.Compose([*steps, transforms.PILToTensor()])
    return replace(data, decode=decoder, transform=transform)


def _find_images(is_train: bool, settings: DataSettings) -> ImageData:
    root = Path(settings.data_path)
    if settings.data_set.startswith(TABLE):
        dataset: Images = _table(is_train, settings)
    elif "/" in settings.data_set:
        return _timm_dataset(is_train, settings)
    elif not root.is_dir():
        raise UserError(f"{setting('data_path', root)}: no such folder")
    else:
        dataset = DATA_SETS[settings.data_set](root, is_train, settings)
    if settings.ignore_classes and isinstance(dataset, ImageFiles):
        without_classes(dataset, settings.ignore_classes, is_train)
    return ImageData(dataset, len(dataset.classes or ()), dataset.classes, multi_label=settings.multi_label)


def _table(is_train: bool, settings: DataSettings) -> Table:
    """Read a split from a CSV or TSV file."""
    what = setting("data_set", settings.data_set)
    columns = {name: getattr(settings, f"{name}_column") for name in ("path", "label", "split", "group", "weight")}
    file, folder = Path(settings.data_set.removeprefix(TABLE)), Path(settings.data_path)
    table = Table(file, folder, columns, what, settings.multi_label)
    if is_train and any(SEPARATOR in name for name in table.classes):
        print_main(
            f"WARNING: {what}: labels contain {SEPARATOR}; for several labels per image, pass {setting('multi_label')}"
        )
    table.weights = table.weights if is_train else ()
    if settings.multi_label and not table.classes:
        raise UserError(f"{what}: no image has a label")
    if is_train and settings.multi_label and all(len(classes_of(label)) < 2 for label in table.labels()):
        print_main(f"WARNING: {what}: no image has several labels; they must be separated by {SEPARATOR}")
    if is_train and table.weights:
        print_main(f"{what}: the loss of each training image is multiplied by column {settings.weight_column}")
    if settings.val_fraction is not None:
        if any(table.splits):
            way_out = f"omit it, or pass {setting('split_column', repr(''))} to ignore the column"
            raise UserError(f"{setting('val_fraction', settings.val_fraction)}: {what} has its own splits; {way_out}")
        return split_off(table, table.groups, is_train, settings)
    wanted = split_name(settings.train_split if is_train else settings.val_split)
    kept = [index for index, split in enumerate(table.splits) if wanted in (split, ALL)]
    if not kept and not any(table.splits):
        ways_out = f"{setting('val_fraction', 0.2)}, or {setting('val_split', ALL)} to evaluate on all images"
        raise UserError(f"{what}: has no column {settings.split_column}; set {ways_out}")
    if not kept:
        raise UserError(f"{what}: no image of split {wanted}, but of {listed(sorted(set(table.splits)))}")
    table.keep(kept)
    return table


def split_off(dataset: T, groups: Sequence[str], is_train: bool, settings: DataSettings) -> T:
    """Keep the part of a data set's images that `--val-fraction` chooses for training, or for validation."""
    is_val = validation_part(dataset.labels(), groups, settings.val_fraction or 0.0, settings.split_seed)
    dataset.keep([index for index, val in enumerate(is_val) if val != is_train])
    if not len(dataset):
        raise UserError(f"{setting('val_fraction', settings.val_fraction)}: too few images, or groups, to split")
    return dataset


def without_classes(dataset: ImageFiles, names: Sequence[str], is_train: bool) -> None:
    """Drop classes, and images that only have these classes.

    Raises:
        UserError: the training images have no such class.
    """
    ignored, classes = [canonical(name) for name in names], list(dataset.classes)
    unknown = [name for name in ignored if name not in classes]
    if unknown and is_train:
        raise UserError(f"{setting('ignore_classes', *names)}: no class {unknown[0]}, but {listed(classes)}")
    dataset.classes = [name for name in classes if name not in ignored]
    numbers = {classes.index(name): number for number, name in enumerate(dataset.classes)}
    left = [tuple(numbers[one] for one in classes_of(label) if one in numbers) for _, label in dataset.samples]
    kept = [index for index, (_, label) in enumerate(dataset.samples) if left[index] or label == ()]
    dataset.keep(kept)
    pairs = zip(dataset.samples, (left[index] for index in kept))
    dataset.samples = [(path, own if isinstance(label, tuple) else own[0]) for (path, label), own in pairs]


def _imagenet(root: Path, is_train: bool, settings: DataSettings) -> Images:
    """Read a split from a folder of class folders, or from an archive of class folders (train.tar, val.tar)."""
    splits_off, val_names = settings.val_fraction is not None, (*IMAGENET_FOLDERS[False], "val.tar")
    if splits_off and any((root / name).exists() for name in val_names):
        what = setting("val_fraction", settings.val_fraction)
        raise UserError(f"{what}: {setting('data_path', root)} has validation images; omit it, or move them away")
    names = IMAGENET_FOLDERS[is_train or splits_off]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    archive = root / f"{names[0]}.tar"
    if folder is None and not archive.is_file():
        raise UserError(
            f"{setting('data_path', root)}: no {names[0]}/ folder "
            "(expected train/ and val/, ILSVRC2012_img_train/ and ILSVRC2012_img_val/, or train.tar and val.tar)"
        )
    dataset: ImageFiles
    if folder is None:
        dataset = _archive(archive, settings)
    else:
        dataset = ClassFolders(str(folder), settings.arrays, settings.is_labelled)
    if not splits_off:
        return dataset
    return split_off(dataset, list(map(dataset.inner_name, range(len(dataset)))), is_train, settings)


def _archive(path: Path, settings: DataSettings) -> Archive:
    """Read a tar archive of class folders. Classes are sorted by name, as in a folder."""
    what = setting("data_path", path)
    try:
        dataset = Archive(path, settings.arrays)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{what}: not an archive of class folders, or damaged ({error})") from None
    if not dataset.samples or dataset.classes == [""]:
        raise UserError(f"{what}: contains no image in class folders")
    return dataset


def _cifar(root: Path, is_train: bool, settings: DataSettings) -> Images:
    try:
        return Cifar100(CIFAR100(str(root), train=is_train))
    except RuntimeError:
        what = setting("data_path", root)
        raise UserError(f"{what}: no intact CIFAR-100 found (expected cifar-100-python/)") from None


def _inaturalist(root: Path, is_train: bool, settings: DataSettings) -> Images:
    year = {"INAT": 2018, "INAT19": 2019}[settings.data_set]
    return INaturalist(root, is_train, year, settings.inat_category)


# The function that reads a data set, for each value of --data-set. Values with a slash select timm's readers instead.
DATA_SETS: dict[str, Callable[[Path, bool, DataSettings], Images]] = dict(
    IMNET=_imagenet, CIFAR=_cifar, INAT=_inaturalist, INAT19=_inaturalist
)


def _timm_dataset(is_train: bool, settings: DataSettings) -> ImageData:
    """Read a data set with one of timm's readers: wds/…, hfds/…, hfids/…, tfds/…, torch/…"""
    split = settings.train_split if is_train else settings.val_split
    name, root = settings.data_set, settings.data_path
    what = f"{setting('data_set', name)}, split {split}, in {setting('data_path', root)}"
    if name.startswith("wds/"):
        require(what, "webdataset", extra="webdataset")
    is_hugging_face = name.startswith("hf")
    if is_hugging_face:
        import_hugging_face()
    num_samples = settings.train_num_samples if is_train else settings.val_num_samples
    others = READER_ARGUMENTS.get(name.split("/")[0], {}) | dict(
        batch_size=settings.batch_size, num_samples=num_samples
    )
    # timm warns about a missing info.json, which is optional, and about errors that are reported here.
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.ERROR)
    try:
        dataset = create_dataset(name, root, split, is_training=is_train, seed=settings.seed, **others)
    except Exception as error:  # each reader's library raises its own exception types
        raise UserError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if type(dataset) is ImageFolder:
        folders = ClassFolders(str(dataset.root), settings.arrays)
        return ImageData(folders, len(folders.classes), folders.classes)
    shards = shards_of(dataset) or () if name.startswith("wds/") else ()
    missing = [shard for shard in shards if ":" not in shard and not (Path(root) / shard).is_file()]
    if missing:
        raise UserError(f"{what}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}, …)")
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    num_classes = settings.num_classes or len(class_to_idx)
    if not num_classes:
        raise UserError(f"{what}: its reader does not report the number of classes; set {setting('num_classes')}")
    classes = sorted(class_to_idx, key=lambda name: class_to_idx[name])
    return ImageData(
        from_library(dataset, root, num_classes), num_classes, classes or None, is_hugging_face=is_hugging_face
    )


def match_splits(train: ImageData, val: ImageData) -> ImageData:
    """Match the validation set's classes with the training set's, so that a label means the same in both.

    Returns:
        the validation set, renumbered if necessary.

    Raises:
        UserError: the classes differ.
    """
    if train.classes is None or val.classes is None:
        return val
    splits = "the training images", "the validation images", "both need the same class folders"
    outputs = order_of(train.classes, val.classes, *splits)
    return val if outputs is None else val.renumbered(outputs, train.classes)


# ----------------------------------------------------------------------------------------------------------------------
# Transforms
# ----------------------------------------------------------------------------------------------------------------------


def build_transform(is_train: bool, settings: TransformSettings) -> Any:
    """Build DeiT's transforms: timm's augmentation for training, resize and centre crop for validation.

    Automatic augmentation and colour jitter need images in RGB. With other channels, they are off.

    Raises:
        UserError: timm does not know the automatic augmentation.
    """
    preprocessing = settings.preprocessing
    if is_train and not settings.no_aug:
        _check_augmentation(settings.aa)
        others: dict[str, Any] = dict(mean=preprocessing.mean, std=preprocessing.std, color_jitter=0.0)
        if preprocessing.channels == 3:
            others |= dict(color_jitter=settings.color_jitter, auto_augment=settings.aa or None)
        others |= dict(scale=tuple(settings.scale), ratio=tuple(settings.ratio), hflip=settings.hflip)
        others |= dict(re_prob=settings.reprob, re_mode=settings.remode, re_count=settings.recount)
        try:
            transform = create_transform(preprocessing.size, True, interpolation=settings.train_interpolation, **others)
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"{setting('aa', settings.aa)}: unknown to timm ({error})") from None
        if max(preprocessing.size) <= SMALL_INPUT:
            transform.transforms[0] = transforms.RandomCrop(preprocessing.size, padding=4, pad_if_needed=True)
        return transform
    return preprocessing.transform()


def split_transform(transform: Any) -> tuple[list[Any], list[Any]]:
    """Split a training transform into the steps that the fast loader's workers run and those that the device runs.

    Returns:
        the steps before MaybeToTensor, and the steps from Normalize on.

    Raises:
        UserError: there is no MaybeToTensor with Normalize right after it.
    """
    steps = transform.transforms
    kinds = [type(step) for step in steps]
    end = kinds.index(MaybeToTensor) if MaybeToTensor in kinds else 0
    if kinds[end : end + 2] == [MaybeToTensor, transforms.Normalize]:
        return steps[:end], steps[end + 1 :]
    raise UserError(
        f"{setting('loader', 'fast')}: the transform needs MaybeToTensor with Normalize right after it; put other "
        "steps before MaybeToTensor or after Normalize, or use faithful"
    )


class DeviceTransform:
    """The last steps of a training transform, from Normalize on, which run on the device.

    Random erasing takes a whole batch, as in timm's prefetcher. Other steps take one image at a time. All steps may use
    the random number generators of Python, NumPy, torch and the device. The training loop seeds them for each batch
    (`Stream.STEP`), so the erased regions depend neither on the process that computes the batch nor on interruptions.

    Args:
        transform: the training transform.
        precision: the device, and the images' memory format.
    """

    def __init__(self, transform: Any, precision: Precision) -> None:
        self.precision = precision
        _, (normalise, *self.steps) = split_transform(transform)
        for step in self.steps:
            if isinstance(step, RandomErasing):
                step.device = precision.device
        self.mean, self.std = (
            255 * torch.as_tensor(values, device=precision.device)[:, None, None]
            for values in (normalise.mean, normalise.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Transform images, B × 3 × H × W, uint8."""
        images = self.precision.images(images).float().sub_(self.mean).div_(self.std)
        for step in self.steps:
            if isinstance(step, RandomErasing):
                images = step(images)
            else:
                images = self.precision.images(torch.stack([step(image) for image in images]))
        return images


def _check_augmentation(name: str) -> None:
    """Refuse an automatic augmentation whose name has a section that timm would ignore.

    Raises:
        UserError: the name has such a section, or timm does not know its policy.
    """
    policy, *sections = name.split("-")
    pattern = next((sections for begin, sections in AUGMENTATIONS.items() if re.fullmatch(begin, policy)), None)
    if name and pattern is None:
        raise UserError(
            f"{setting('aa', name)}: unknown to timm; names begin with rand, augmix, original, originalr, v0, v0r or 3a"
        )
    if unknown := [section for section in sections if pattern and not re.fullmatch(pattern, section)]:
        raise UserError(
            f"{setting('aa', name)}: {policy} has no section {unknown[0] or '-'}; a valid name is rand-m9-mstd0.5-inc1"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------------------------------


def build_train_loader(data: ImageData, settings: LoaderSettings, samples: TrainSamples | None = None) -> DataLoader:
    """Build a loader of this rank's training batches, shuffled and augmented.

    An incomplete last step is dropped. For a streaming data set, only an incomplete last batch is dropped.

    Args:
        data: the images.
        settings: settings of the loader.
        samples: samples to load in place of the images.

    Raises:
        UserError: an epoch has no complete step, or the labels that the sampler needs are unknown.
    """
    labels = data.dataset.labels() if settings.sampler == BALANCED else []
    if labels is None:
        raise UserError(f"{setting('sampler', BALANCED)}: the labels are unknown before reading the images; omit it")
    if isinstance(data.dataset, IterableDataset):
        _check_shards(data.dataset, settings)
        data.dataset.set_loader_cfg(num_workers=settings.num_workers)  # type: ignore[attr-defined] # timm's
        stream = TrainStream(data, settings.seed)
        loader = _loader(stream, settings, batch_size=settings.batch_size, drop_last=True)
    else:
        samples = samples or TrainSamples(data, settings.seed)
        step = settings.batch_size, settings.accum_steps, get_world_size(), get_rank()
        sampler = TrainBatchSampler(samples, *step, settings.seed, settings.repeated_aug, labels)
        loader = _loader(samples, settings, batch_sampler=sampler)
    if len(loader) == 0:
        raise UserError(_no_step(len(data), get_world_size(), settings))
    return loader


def _no_step(images: int, processes: int, settings: LoaderSettings) -> str:
    """Error message for an epoch without a complete step, with the settings that determine the size of a step."""
    step_size = settings.batch_size * settings.accum_steps * processes
    factors = [setting("batch_size", settings.batch_size), setting("accum_steps", settings.accum_steps)]
    factors += [f"{processes} processes"] if processes > 1 else []
    epoch, way_out = f"the {images} training images", "choose smaller values"
    if settings.repeated_aug:
        epoch = f"the {images // 256 * 256} of {epoch} that repeated augmentation takes"
        way_out += f", or {setting('no_repeated_aug')}"
    return f"{' × '.join(factors)}: a step takes {step_size} images, more than {epoch}; {way_out}"


def _check_shards(dataset: Any, settings: LoaderSettings) -> None:
    """Refuse a webdataset with fewer shards than loader workers: a worker without a shard would wait forever."""
    shards = shards_of(dataset)
    readers = get_world_size() * max(1, settings.num_workers)
    if shards is not None and len(shards) < readers:
        raise UserError(
            f"{setting('num_workers', settings.num_workers)}: {settings.data_set} has {len(shards)} training shards, "
            f"fewer than the {readers} loader workers of all processes; choose fewer workers or write more shards"
        )


def build_val_loader(data: ImageData, settings: LoaderSettings) -> DataLoader:
    """Build a loader of validation batches, 1.5 times as large as training batches.

    The loader loads all images or, with `dist_eval`, this rank's share.
    """
    dataset, sampler = data.dataset, None
    if isinstance(dataset, IterableImageDataset):
        read_exactly_once(dataset, settings.dist_eval)
        dataset.set_loader_cfg(num_workers=settings.num_workers)
        dataset = ValStream(data)
    else:
        dataset = ValSamples(data)
        if settings.dist_eval:  # torch's DistributedSampler would repeat samples, to give all processes equally many
            sampler = range(get_rank(), len(dataset), get_world_size())
    return _loader(dataset, settings, batch_size=int(1.5 * settings.batch_size), sampler=sampler)


def _loader(dataset: Dataset, settings: LoaderSettings, **batches: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=settings.num_workers,
        pin_memory=settings.pin_mem and torch.device(settings.device).type == "cuda",
        worker_init_fn=ignore_preemption,
        persistent_workers=settings.num_workers > 0,
        collate_fn=collate,
        **batches,
    )


def epoch_batches(
    loader: DataLoader, epoch: int, step: int, accum_steps: int, tick: Callable[[str], None]
) -> Iterator[Any]:
    """Iterate over a training epoch's batches, starting at a given step.

    Args:
        loader: loader of training batches.
        epoch: the epoch.
        step: step in the epoch to start from.
        accum_steps: batches that each rank accumulates per step.
        tick: called with the position while a streaming data set skips to the step.
    """
    if isinstance(loader.batch_sampler, TrainBatchSampler):
        loader.batch_sampler.set_epoch(epoch, step)
        return iter(loader)
    if isinstance(loader.dataset, TrainStream):
        loader.dataset.set_epoch(epoch)
    batches = iter(loader)
    for number in range(min(step * accum_steps, len(loader))):  # to skip batches of a stream, read them
        tick(f"epoch {epoch}, skipping batch {number}")
        next(batches)
    return batches
