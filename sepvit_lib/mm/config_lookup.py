"""Look up the data sets of a config, their pipelines, and the heads that predict classes."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, Registry

from sepvit_lib.pipeline.image_files import EXIF, STORED

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
BASE = "mmengine.dataset.base_dataset.BaseDataset"
SEGMENTATION = "mmseg.datasets.basesegdataset.BaseSegDataset"
COCO = ("mmdet.datasets.coco.CocoDataset", "sepvit_lib.mm.coco_data_sets.CompleteCocoDataset")
LOADS_IMAGES = ("LoadImageFromFile", "LoadReadableImage")  # transforms that load images
LOADS_LABELS = ("LoadAnnotations", "LoadReadableLabels")  # transforms that load label maps
# Heads that predict the data set's classes. RPNs, which predict a single class, and heads for stuff are not included.
HEADS = ("decode_head", "auxiliary_head", "bbox_head", "mask_head", "roi_head.bbox_head", "roi_head.mask_head")
OTHER_HEADS = ("STDCHead",)  # have the same keys, but predict boundaries


def dicts(node: Any) -> Iterator[Any]:
    """Yield a config and all dicts inside it."""
    if isinstance(node, (dict, Config)):
        yield node
    for child in node.values() if isinstance(node, (dict, Config)) else node if isinstance(node, (list, tuple)) else ():
        yield from dicts(child)


def as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, and wrap anything else in a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def class_name(kind: type) -> str:
    """Return the full name of a class: its module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def resolve(registry: Registry, node: Mapping[str, Any]) -> type | None:
    """Return the class that a registry would build from a config dict; None if it has no such class."""
    kind = node.get("type")
    if isinstance(kind, str):
        with registry.switch_scope_and_registry(node.get("_scope_")) as scoped:
            kind = scoped.get(kind)
    return kind if isinstance(kind, type) else None


def is_kind(kind: type, name: str) -> bool:
    """Whether a class, or one of its base classes, has the given full name (see `class_name`)."""
    return any(class_name(parent) == name for parent in kind.__mro__)


def data_sets(cfg: Config, loader: str) -> Iterator[tuple[Any, Any]]:
    """Yield the settings and class of each data set of a loader, without wrappers such as `ConcatDataset`."""
    for node in dicts((cfg.get(loader) or {}).get("dataset")):
        kind = resolve(DATASETS, node)
        if kind is not None and is_kind(kind, BASE):
            yield node, kind


def inner_data_sets(dataset: Any) -> list[Any]:
    """Return the data sets that a built data set wraps directly; none if it is not a wrapper."""
    several = getattr(dataset, "datasets", None)
    return list(several) if several else [one for one in [getattr(dataset, "dataset", None)] if one is not None]


def stated_classes(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names that `metainfo.classes` of a config dict states; () if there are none.

    As in mmengine, `metainfo.classes` may also be the path of a file with one name per line.
    """
    stated = (node.get("metainfo") or {}).get("classes") or ()
    return tuple(list_from_file(stated) if isinstance(stated, str) and os.path.isfile(stated) else stated)


def classes_of(node: Mapping[str, Any], kind: Any) -> tuple[str, ...] | None:
    """Return the names of a data set's classes: those in `metainfo`, or the default ones. None if there are none.

    Args:
        node: the data set's settings.
        kind: the data set's Python class, which may have default class names.
    """
    names = stated_classes(node) or kind.METAINFO.get("classes")
    return tuple(names) if names else None


def is_elsewhere(node: Mapping[str, Any]) -> bool:
    """Whether a data set's files may be in remote storage, where no files are checked."""
    return "://" in (node.get("data_root") or "") or bool(node.get("backend_args"))


def folders_of(node: Mapping[str, Any]) -> list[str]:
    """Return the folders of a data set's images and labels."""
    root, prefixes = node.get("data_root") or "", node.get("data_prefix") or {}
    return [os.path.join(root, prefix) for prefix in prefixes.values() if prefix]


def step_name(step: Mapping[str, Any]) -> str:
    """Return the name of a transform's class, without its module."""
    return str(step.get("type")).rpartition(".")[2]


def has_step(node: Any, *types: str, **settings: Any) -> bool:
    """Whether a data set's pipeline has a transform of one of the given types with the given settings."""
    steps = [step for step in dicts(node.get("pipeline")) if step_name(step) in types]
    return any(all(step.get(key) == value for key, value in settings.items()) for step in steps)


def orientations_in(node: Any) -> set[str]:
    """Orientations in which the image-loading transforms in a part of a config read images."""
    return {step.get("orientation", STORED) for step in dicts(node) if step_name(step) in LOADS_IMAGES}


def orientation_in(node: Any) -> str:
    """Orientation in which a loader reads its images: 'exif' if a transform states it, otherwise 'stored'."""
    return EXIF if EXIF in orientations_in(node) else STORED


def heads_of(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the settings of each head that predicts the data set's classes."""
    model = cfg.get("model") or {}
    model = model.get("module", model)  # test-time augmentation wraps the model
    for name in HEADS:
        node: Any = model
        for part in name.split("."):
            node = (node.get(part) or {}) if isinstance(node, dict) else {}
        several = isinstance(node, (list, tuple))
        for number, head in enumerate(node if several else [node]):
            if isinstance(head, dict) and head and head.get("type") not in OTHER_HEADS:
                yield f"model.{name}.{number}" if several else f"model.{name}", head
