"""Check a config's data sets before they are used: files, labels, and annotations in COCO's format."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from sepvit_lib.common.class_names import canonical, listed
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import on_main_process, on_processes, print_main
from sepvit_lib.mm.build import build_errors
from sepvit_lib.mm.check_classes import check_classes
from sepvit_lib.mm.config_lookup import (
    COCO,
    LOADERS,
    LOADS_LABELS,
    SEGMENTATION,
    class_name,
    classes_of,
    data_sets,
    dicts,
    folders_of,
    has_step,
    is_elsewhere,
    is_kind,
    orientation_in,
    orientations_in,
    step_name,
)
from sepvit_lib.mm.image_loading import MAX_LABEL, LoadReadableLabels
from sepvit_lib.pipeline.image_files import IMAGE_SUFFIXES, evenly_spaced, is_hidden
from sepvit_lib.pipeline.unreadable import UnreadableImageError, unreadable_limit

# Label maps are sampled to find classes without pixels: at most MAX_LABELS, and at least LABELS_PER_CLASS per class.
# With fewer, rare classes could be missing from the sample by chance.
MAX_LABELS, LABELS_PER_CLASS = 200, 10
LISTS = ("images", "annotations", "categories")  # in a file of COCO's format


def check_data(cfg: Config, *loaders: str) -> None:
    """Refuse missing or inconsistent data before anything is built.

    Images are not decoded. At most `MAX_LABELS` label maps of the training set are read.

    Args:
        cfg: the config.
        loaders: names of the data loaders that will be used: 'train_dataloader', ….

    Raises:
        UserError: files are missing, class names or numbers of classes differ, or annotations do not match the images.
    """
    check_classes(cfg, loaders)
    check_orientations(cfg)
    found = [
        (loader, node, kind) for loader in loaders for node, kind in data_sets(cfg, loader) if not is_elsewhere(node)
    ]

    def check_all_paths() -> None:
        for loader, node, _ in found:
            check_paths(part_of(loader), node)

    def check_all_contents() -> None:
        for loader, node, kind in found:
            if is_kind(kind, SEGMENTATION):
                check_segmentation(part_of(loader), node, kind)
            elif class_name(kind) in COCO:
                with build_errors(f"{loader}.dataset"):
                    check_coco(cfg, part_of(loader), node, kind)

    on_processes(check_all_paths, here=True)  # each machine has its own files
    on_main_process(check_all_contents)


def check_orientations(cfg: Config) -> None:
    """Refuse pipelines that read images in different orientations.

    Raises:
        UserError: the orientations differ.
    """
    found = {part: orientations_in(cfg[part]) for part in (*LOADERS, "tta_pipeline", "custom_hooks") if cfg.get(part)}
    if len(set().union(*found.values())) > 1:
        stated = ", ".join(f"{part} {' and '.join(sorted(values))}" for part, values in found.items() if values)
        hint = "set it at the top of the config, for all of them"
        raise UserError(f"orientation of LoadImageFromFile: differs between pipelines ({stated}); {hint}")


def check_reading(cfg: Config, checkpoint: Mapping[str, Any], what: str) -> None:
    """Refuse to test a network on images that are read in a different orientation than its training images were.

    The orientations may differ if no training image had an EXIF orientation.

    Args:
        cfg: the config.
        checkpoint: the network's checkpoint.
        what: flag and path of the checkpoint, for messages.

    Raises:
        UserError: the orientations differ.
    """
    reading = checkpoint.get("reading") or {}
    own = orientation_in(cfg.test_dataloader)
    if reading.get("turned") and reading["orientation"] != own:
        trained = reading["orientation"]
        raise UserError(
            f"{what}: was trained on images with orientation={trained!r}, the config has {own!r}; set it "
            f"with --cfg-options orientation={trained}"
        )


def part_of(loader: str) -> str:
    """Return the split of a loader: 'train', 'val' or 'test'."""
    return loader.removesuffix("_dataloader")


def check_paths(part: str, node: Mapping[str, Any]) -> None:
    """Refuse missing folders, and a missing annotation file.

    Args:
        part: 'train', 'val' or 'test'.
        node: the data set's settings.

    Raises:
        UserError: a folder or the file is missing.
    """
    root, listing = node.get("data_root") or "", node.get("ann_file") or ""
    folders = [root, *folders_of(node)]
    problems = {folder: "no such folder" for folder in folders if folder and not os.path.isdir(folder)}
    if listing and not os.path.exists(path := os.path.join(root, listing)):
        problems[path] = "no such file"
    for missing, problem in problems.items():
        hint = "put the data set there, or set its folder with --cfg-options data_root=DIR"
        raise UserError(f"{part} data {missing}: {problem}; {hint}")


def missing_files(paths: Sequence[str], folder: str) -> list[str]:
    """Return those of the paths that do not exist. The folder is listed once, which is faster than checking each."""
    present = files_below(folder)
    return [path for path in paths if os.path.relpath(path, folder) not in present and not os.path.isfile(path)]


def files_below(folder: str) -> set[str]:
    """Return the paths of all files below a folder, relative to it."""
    walked = os.walk(folder, followlinks=True)
    return {os.path.relpath(os.path.join(parent, file), folder) for parent, _, files in walked for file in files}


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation
# ----------------------------------------------------------------------------------------------------------------------


def unread(node: Mapping[str, Any], kind: Any) -> Any:
    """Build a data set without its pipeline, and without reading its annotations."""
    settings = {key: value for key, value in node.items() if key not in ("type", "_scope_")}
    return kind(**settings | dict(pipeline=[], lazy_init=True))


def check_segmentation(part: str, node: Mapping[str, Any], kind: Any) -> None:
    """Refuse a segmentation data set without images, or with images without labels. Warn of skipped images.

    Args:
        part: 'train', 'val' or 'test'.
        node: the data set's settings.
        kind: the data set's Python class.

    Raises:
        UserError: images or labels are missing.
    """
    with build_errors(f"{part}_dataloader.dataset"):
        dataset = unread(node, kind)
        samples = dataset.load_data_list()
    folder, suffix = dataset.data_prefix["img_path"], dataset.img_suffix
    images = [sample["img_path"] for sample in samples]
    if dataset.ann_file and (lost := missing_files(images, folder)):
        words = f"{len(lost)} of its {len(images)} images are missing, the first is {lost[0]}"
        hint = f"each line must be the name of an image below {folder}, without {suffix}"
        raise UserError(f"{part} data {dataset.ann_file}: {words}; {hint}")
    visible = [file for file in files_below(folder) if not any(map(is_hidden, Path(file).parts))]
    others = Counter(Path(file).suffix for file in visible if not file.endswith(suffix) and not dataset.ann_file)
    found = ", ".join(f"{count} in {name}" for name, count in others.items() if name.lower() in IMAGE_SUFFIXES)
    if not images:
        hint = f"set img_suffix in the data set; the folder has images: {found}" if found else "add some"
        raise UserError(f"{part} data {dataset.ann_file or folder}: no image ends in {suffix}; {hint}")
    if found:
        print_main(f"WARNING: {part} data {folder}: {len(images)} images end in {suffix}; others are skipped: {found}")
    labels = [sample["seg_map_path"] for sample in samples if sample.get("seg_map_path")]
    if not labels or not has_step(node, *LOADS_LABELS):
        return
    label_folder = dataset.data_prefix["seg_map_path"]
    if lost := missing_files(labels, label_folder):
        words = f"{len(lost)} of {len(labels)} are missing, the first is {lost[0]}, for {images[labels.index(lost[0])]}"
        hint = f"labels have their image's name with seg_map_suffix={dataset.seg_map_suffix!r}"
        raise UserError(f"{part} labels {label_folder}: {words}; {hint}")
    if part == "train":
        warn_of_unmet_classes(node, samples, classes_of(node, kind) or (), label_folder)


def warn_of_unmet_classes(
    node: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], names: Sequence[str], folder: str
) -> None:
    """Warn of classes that no label map contains, such as class 1 of binary masks stored as 0 and 255.

    At most `MAX_LABELS` label maps are read, evenly spaced. Does nothing if there are too many classes for this.

    Args:
        node: the settings of a training data set.
        samples: paths of the data set's images and labels.
        names: names of its classes.
        folder: folder of its labels, for the message.
    """
    if len(samples) > MAX_LABELS and len(names) * LABELS_PER_CLASS > MAX_LABELS:
        return
    step = next(step for step in dicts(node.get("pipeline")) if step_name(step) in LOADS_LABELS)
    load = LoadReadableLabels(imdecode_backend=step.get("imdecode_backend", "pillow"))
    chosen = evenly_spaced(samples, MAX_LABELS)
    met: set[int] = set()
    for sample in chosen:
        with suppress(UnreadableImageError):  # training reports it
            met.update(np.unique(load.transform(dict(sample))["gt_seg_map"]).tolist())
    if unmet := [name for number, name in enumerate(names) if number not in met]:
        ignored = f"; {MAX_LABEL} is ignored" if MAX_LABEL in met else ""
        labels = f"{len(chosen)} of its {len(samples)} label maps"
        print_main(f"WARNING: train labels {folder}: no pixel of the classes {listed(unmet)} in {labels}{ignored}")


# ----------------------------------------------------------------------------------------------------------------------
# COCO
# ----------------------------------------------------------------------------------------------------------------------


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number. JSON files may contain NaN and Infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def has_finite_box(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation's box consists of four finite numbers. True if there is no box."""
    box = annotation.get("bbox", (0, 0, 0, 0))
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_finite, box))


def sound_polygons(mask: Sequence[Any]) -> list[Any]:
    """Return the valid polygons of a mask: those with at least three corners and only finite coordinates."""
    polygons = [one for one in mask if isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0]
    return [one for one in polygons if not any(isinstance(x, float) and not math.isfinite(x) for x in one)]


def has_usable_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation has a valid polygon or a run-length encoding."""
    mask = annotation.get("segmentation")
    return bool(mask.get("counts") and mask.get("size") if isinstance(mask, dict) else sound_polygons(mask or ()))


def check_coco(cfg: Config, part: str, node: Mapping[str, Any], kind: Any) -> None:
    """Refuse COCO annotations that are damaged, or do not match the classes or images. Warn of skipped annotations.

    Args:
        cfg: the config.
        part: 'train', 'val' or 'test'.
        node: the data set's settings.
        kind: the data set's Python class.

    Raises:
        UserError: the annotations are damaged or do not match.
    """
    root, names = node.get("data_root") or "", classes_of(node, kind) or ()
    path = os.path.join(root, node.get("ann_file") or "")
    what = f"{part} annotations {path}"
    evaluators = [] if part == "train" else [one for one in dicts(cfg.get(f"{part}_evaluator")) if one.get("ann_file")]
    for one in evaluators if len([*data_sets(cfg, f"{part}_dataloader")]) == 1 else ():
        if os.path.realpath(one["ann_file"]) != os.path.realpath(path):
            raise UserError(
                f"{part}_evaluator.ann_file={one['ann_file']}: the data set's ann_file is {path}; set the same file"
            )
    needs_objects = part == "train" or any(not one.get("format_only") for one in evaluators)
    content = read_annotations(path, what, needs_objects)
    check_categories(what, content, names)
    if needs_objects:
        check_objects(what, content, names, has_step(node, "LoadAnnotations", "LoadReadableInstances", with_mask=True))
    folder = os.path.join(root, (node.get("data_prefix") or {}).get("img", ""))
    images = [os.path.join(folder, image["file_name"]) for image in content["images"]]
    limit = unreadable_limit("skip", len(images)) if part == "train" else 0  # training replaces a few unreadable images
    if len(lost := missing_files(images, folder)) > limit:
        words = f"{len(lost)} of its {len(images)} images are missing, the first is {lost[0]}"
        raise UserError(f"{what}: {words}; put them there, or set data_prefix=dict(img=FOLDER)")


def read_annotations(path: str, what: str, needs_objects: bool) -> dict[str, Any]:
    """Read an annotation file.

    Args:
        path: the file.
        what: name of the file in messages.
        needs_objects: whether annotations are required.

    Raises:
        UserError: the file is missing, truncated or not in COCO's format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{what}: cannot be read, not JSON, or truncated ({error})") from None
    for key in LISTS:
        entries = content.get(key) if isinstance(content, dict) else None
        if key == "annotations" and not entries and not needs_objects:
            continue
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{what}: has no {key}; COCO's format is an object with the lists {', '.join(LISTS)}")
        if key != "annotations" and len({entry["id"] for entry in entries}) < len(entries):
            raise UserError(f"{what}: several of its {key} have the same id")
    return content


def check_categories(what: str, content: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Refuse categories that do not contain each class exactly once.

    If a class is missing, the message lists the classes and the file's categories.

    Args:
        what: the file, for messages.
        content: the file's content.
        classes: names of the data set's classes.

    Raises:
        UserError: a class is missing, or several categories have its name.
    """
    names = [str(category["name"]) for category in content["categories"]]
    counts = Counter(map(canonical, names))
    if missing := [name for name in classes if not counts[canonical(name)]]:
        both = f"the classes are {listed(classes)}; the file's categories are {listed(names)}"
        hint = "set metainfo = dict(classes=…) in the data sets to names in the file"
        raise UserError(f"{what}: no category is named {listed(missing)}: {both}; {hint}")
    if twice := [name for name in classes if counts[canonical(name)] > 1]:
        raise UserError(f"{what}: several categories are named {listed(twice)}")


def check_objects(what: str, content: Mapping[str, Any], classes: Sequence[str], needs_masks: bool) -> None:
    """Refuse annotations without usable objects. Warn of skipped annotations.

    Args:
        what: the file, for messages.
        content: the file's content.
        classes: names of the data set's classes.
        needs_masks: whether each object needs a mask.

    Raises:
        UserError: no annotation is usable, or masks are needed and no usable annotation has one.
    """
    wanted, objects = set(map(canonical, classes)), content["annotations"]
    known = {category["id"] for category in content["categories"] if canonical(str(category["name"])) in wanted}
    images = {image["id"] for image in content["images"]}
    used = [one for one in objects if one["category_id"] in known and one["image_id"] in images and has_finite_box(one)]
    if not used:
        raise UserError(f"{what}: none of its {len(objects)} annotations is an object of the classes {listed(classes)}")
    if skipped := len(objects) - len(used):
        reasons = "their category is not a class, their image is not listed, or their box is not finite"
        print_main(f"WARNING: {what}: {skipped} of its {len(objects)} annotations are skipped: {reasons}")
    if needs_masks and not any(map(has_usable_mask, used)):
        raise UserError(f"{what}: no annotation has a segmentation; a model with masks needs it, RetinaNet does not")
