"""Checks of a config's data sets before training: their files, their annotations, and their classes."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS

from sepvit_lib.dense.annotations import check_annotations, listed, read_annotations
from sepvit_lib.dense.classes import check_classes
from sepvit_lib.dense.loading import LARGEST, LoadReadableLabels, checked_steps
from sepvit_lib.dense.parts import (
    COCO,
    LOADERS,
    LOADS_LABELS,
    SEGMENTATION,
    as_list,
    class_name,
    classes_of,
    data_sets,
    dicts,
    has_step,
    is_elsewhere,
    is_kind,
    is_remote,
    orientation_in,
    orientations_in,
    resolve,
    step_name,
)
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.images import IMAGE_SUFFIXES, evenly_spaced, is_hidden, open_image, orientation_of
from sepvit_lib.training.processes import get_world_size, on_main_process, on_processes, print_main
from sepvit_lib.training.unreadable import UnreadableImageError, unreadable_limit

# Label maps that are read to find classes that no pixel has, and how many of them a class should have for itself: among
# many classes, some are rare.
MAX_LABELS, LABELS_PER_CLASS = 200, 10


def check_data(cfg: Config, *loaders: str) -> None:
    """Refuse data that are missing or do not fit, before anything is built.

    Pixels are not read.

    Args:
        cfg: the config.
        loaders: names of the data loaders that will be used: 'train_dataloader', ….

    Raises:
        UserError: files are missing, classes disagree, or annotations do not fit. The line names them.
    """
    check_types(cfg, *loaders)
    check_classes(cfg, loaders)
    check_orientations(cfg)
    found = [(loader, node, kind) for loader in loaders for node, kind in data_sets(cfg, loader)]

    def check_all_places() -> None:
        for loader, node, _ in found:
            check_places(loader, node)

    def check_all_contents() -> None:
        for loader, node, kind in found:
            if is_kind(kind, SEGMENTATION):
                check_segmentation(cfg, loader, node, kind)
            elif class_name(kind) in COCO:
                check_coco(cfg, loader, node, kind)

    on_processes(check_all_places, here=True)  # each machine has its own files
    on_main_process(check_all_contents)


def check_types(cfg: Config, *loaders: str) -> None:
    """Refuse data sets of an unknown type.

    Raises:
        UserError: names the type.
    """
    for loader in loaders:
        dataset = (cfg.get(loader) or {}).get("dataset") or {}
        if resolve(DATASETS, dataset) is None:
            raise UserError(
                f"{loader}.dataset.type={dataset.get('type')}: no such data set; the registries have "
                "BaseSegDataset, CocoDataset and those of custom_imports"
            )


def check_orientations(cfg: Config) -> None:
    """Refuse pipelines that read images in different orientations.

    Raises:
        UserError: they do.
    """
    found = {part: orientations_in(cfg[part]) for part in (*LOADERS, "tta_pipeline", "custom_hooks") if cfg.get(part)}
    if len(set().union(*found.values())) > 1:
        stated = ", ".join(f"{part} {' and '.join(sorted(values))}" for part, values in found.items() if values)
        hint = "set it at the top of the config, for all of them"
        raise UserError(f"orientation of LoadImageFromFile: differs between pipelines ({stated}); {hint}")


def check_reading(cfg: Config, checkpoint: Mapping[str, Any], what: str) -> None:
    """Refuse to test a network on images in a different orientation from those that it was trained on.

    Args:
        cfg: the config.
        checkpoint: the network's checkpoint.
        what: flag and path, for messages.

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
    """Return what a loader is for: 'train', 'val', 'test'."""
    return loader.removesuffix("_dataloader")


def check_places(loader: str, node: Mapping[str, Any]) -> None:
    """Refuse missing or empty folders, and a missing annotation file.

    Args:
        loader: the data set's loader.
        node: the data set's settings.

    Raises:
        UserError: one is missing or empty.
    """
    root = node.get("data_root") or ""
    if is_elsewhere(node):
        return
    places = [value for value in (node.get("data_prefix") or {}).values() if value]
    for place in [root, *(os.path.join(root, place) for place in places)]:
        if place and not os.path.isdir(place):
            raise UserError(_no_data(loader, place, "no such folder"))
    listing = node.get("ann_file")
    if isinstance(listing, str) and listing and not os.path.exists(os.path.join(root, listing)):
        raise UserError(_no_data(loader, os.path.join(root, listing), "no such file"))
    if places and not any(os.scandir(os.path.join(root, places[0]))):
        raise UserError(_no_data(loader, os.path.join(root, places[0]), "an empty folder"))


def _no_data(loader: str, place: str, problem: str) -> str:
    hint = "put the data set there, or name its folder with --cfg-options data_root=DIR"
    return f"{part_of(loader)} data {place}: {problem}; {hint}"


def files_below(folder: str) -> set[str]:
    """Return the paths of all files in a folder and its folders, relative to it."""
    found: set[str] = set()
    for place, _, files in os.walk(folder, followlinks=True):
        inner = os.path.relpath(place, folder)
        found.update(files if inner == "." else (os.path.join(inner, file) for file in files))
    return found


def missing_files(paths: Sequence[str], folder: str) -> list[str]:
    """Return which of some paths do not exist. Those in the folder are looked up in its listing."""
    present = files_below(folder) if os.path.isdir(folder) else set()
    return [path for path in paths if os.path.relpath(path, folder) not in present and not os.path.isfile(path)]


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation
# ----------------------------------------------------------------------------------------------------------------------


def check_segmentation(cfg: Config, loader: str, node: Mapping[str, Any], kind: Any) -> None:
    """Refuse a segmentation data set without images, or with images without labels. Warn of images left out.

    Args:
        cfg: the config.
        loader: its loader.
        node: its settings.
        kind: its class.

    Raises:
        UserError: images or labels are missing.
    """
    if is_elsewhere(node):
        return
    settings = {key: value for key, value in node.items() if key not in ("type", "_scope_")}
    settings |= dict(pipeline=[], lazy_init=True)
    try:
        dataset = kind(**settings)
    except TypeError as error:
        raise UserError(f"{loader}.dataset: {error}") from None
    for key in ("img_suffix", "seg_map_suffix"):
        if not isinstance(value := getattr(dataset, key), str):
            hint = "for several, use a data set for each, in a ConcatDataset"
            raise UserError(f"{loader}.dataset.{key}={value!r}: takes one suffix, a text; {hint}")
    folder, suffix, part = dataset.data_prefix["img_path"], dataset.img_suffix, part_of(loader)
    samples = dataset.load_data_list()
    images = [sample["img_path"] for sample in samples]
    if dataset.ann_file:
        if lost := missing_files(images, folder):
            words = f"{len(lost)} of its {len(images)} images are missing, the first is {lost[0]}"
            hint = f"its lines are names of images below {folder}, without {suffix}"
            raise UserError(f"{part} data {dataset.ann_file}: {words}; {hint}")
    else:
        _check_suffixes(loader, folder, suffix, len(images))
    if not images:
        raise UserError(f"{part} data {dataset.ann_file or folder}: names no image; add some, or remove the loader")
    labels = [sample["seg_map_path"] for sample in samples if sample.get("seg_map_path")]
    if labels and has_step(node, *LOADS_LABELS):
        lost = missing_files(labels, dataset.data_prefix["seg_map_path"])
        if lost:
            image = images[labels.index(lost[0])]
            words = f"{len(lost)} of {len(labels)} are missing, the first is {os.path.basename(lost[0])}, of {image}"
            hint = f"labels have their image's name with seg_map_suffix={dataset.seg_map_suffix!r}"
            raise UserError(f"{part} labels {dataset.data_prefix['seg_map_path']}: {words}; {hint}")
        if part == "train":
            warn_of_unmet_classes(node, samples, classes_of(node, kind) or (), dataset.data_prefix["seg_map_path"])
    if part != "train":
        check_batches(loader, cfg[loader].get("batch_size", 1), node, samples)


def _check_suffixes(loader: str, folder: str, suffix: str, count: int) -> None:
    """Refuse a folder whose images all have another suffix. Warn if some have."""
    visible = [file for file in files_below(folder) if not any(map(is_hidden, Path(file).parts))]
    suffixes = Counter(Path(file).suffix for file in visible if not file.endswith(suffix))
    others = {name: number for name, number in suffixes.most_common() if name.lower() in IMAGE_SUFFIXES}
    found = ", ".join(f"{number} in {name}" for name, number in others.items())
    if count == 0 and others:
        raise UserError(
            f"{part_of(loader)} data {folder}: no image ends in {suffix}, {found}; set "
            f"img_suffix={next(iter(others))!r} in the config"
        )
    if count == 0:
        raise UserError(f"{part_of(loader)} data {folder}: no image ends in {suffix}; set img_suffix in the config")
    if others:
        print_main(
            f"WARNING: {part_of(loader)} data {folder}: {count} images end in {suffix}; others are left out: {found}"
        )


def warn_of_unmet_classes(
    node: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], names: Sequence[str], folder: str
) -> None:
    """Warn of classes that no label has, such as those of masks of 0 and 255. Of many labels, a sample is read.

    A sample is silent about rare classes among many.

    Args:
        node: the settings of a training data set.
        samples: its images and labels.
        names: its classes.
        folder: its labels' folder, for the message.
    """
    if len(samples) > MAX_LABELS and len(names) * LABELS_PER_CLASS > MAX_LABELS:
        return
    step = next(step for step in dicts(node.get("pipeline")) if step_name(step) in LOADS_LABELS)
    load = LoadReadableLabels(imdecode_backend=step.get("imdecode_backend", "pillow"))
    chosen = evenly_spaced(samples, MAX_LABELS)
    counts = np.zeros(LARGEST + 1, dtype=np.int64)
    for sample in chosen:
        with suppress(UnreadableImageError):  # training names it
            counts += np.bincount(load.transform(dict(sample))["gt_seg_map"].ravel(), minlength=len(counts))
    if unmet := [name for number, name in enumerate(names) if not counts[number]]:
        labels = f"{len(chosen)} of its {len(samples)} label maps" if len(chosen) < len(samples) else "its label maps"
        ignored = f"; {LARGEST} is ignored" if counts[LARGEST] else ""
        print_main(f"WARNING: train labels {folder}: no pixel of the classes {listed(unmet)} in {labels}{ignored}")


def check_batches(loader: str, batch_size: int, node: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse batches of images that the pipeline leaves at different sizes, which mmseg evaluates one by one only.

    Args:
        loader: the loader of validation or test images.
        batch_size: its batch size.
        node: the data set's settings.
        samples: its images, in their order.

    Raises:
        UserError: names the first image of such a batch.
    """
    if batch_size == 1:
        return
    steps = Compose(checked_steps(node.get("pipeline") or []))
    known: dict[tuple[Any, ...], Any] = {}

    def shape_of(sample: Mapping[str, Any]) -> Any:
        """Sizes of an image after the pipeline, which follow from that of the file."""
        with suppress(Exception):  # an unreadable image is named when it is evaluated
            with open_image(sample["img_path"]) as image:
                key = (*image.size, orientation_of(image))
            if key not in known:
                inputs = steps(dict(sample))["inputs"]  # several with test-time augmentation
                known[key] = [one.shape[-2:] for one in (inputs if isinstance(inputs, list) else [inputs])]
            return known[key]

    for rank in range(get_world_size()):
        own = samples[rank :: get_world_size()]
        for batch in (own[start : start + batch_size] for start in range(0, len(own), batch_size)):
            shapes = [shape for shape in map(shape_of, batch) if shape is not None]
            if any(shape != shapes[0] for shape in shapes):
                hint = "set batch_size=1, or resize all images to one size"
                first = f"{batch[0]['img_path']} and the next"
                raise UserError(f"{loader}.batch_size={batch_size}: images differ in size, such as {first}; {hint}")


# ----------------------------------------------------------------------------------------------------------------------
# COCO
# ----------------------------------------------------------------------------------------------------------------------


def check_coco(cfg: Config, loader: str, node: Mapping[str, Any], kind: Any) -> None:
    """Refuse COCO annotations that are damaged or do not fit the classes, images or model. Warn of those left out.

    Args:
        cfg: the config.
        loader: the data set's loader.
        node: its settings.
        kind: its class.

    Raises:
        UserError: they do not fit.
    """
    root, part = node.get("data_root") or "", part_of(loader)
    path = os.path.join(root, node.get("ann_file") or "")
    if is_elsewhere(node):
        return
    evaluators = [] if part == "train" else [one for one in dicts(cfg.get(f"{part}_evaluator")) if one.get("ann_file")]
    if len([*data_sets(cfg, loader)]) > 1:  # each evaluated by itself
        evaluators = [one for one in evaluators if os.path.abspath(one["ann_file"]) == os.path.abspath(path)]
    measured = [one for one in evaluators if not one.get("format_only")]
    has_masks = has_step(node, "LoadAnnotations", "LoadReadableInstances", with_mask=True)
    needs_masks = has_masks or any("segm" in as_list(one.get("metric")) for one in measured)
    what = f"{part} annotations {path}"
    content = read_annotations(path, what)
    warnings = check_annotations(
        what,
        content,
        classes_of(node, kind) or (),
        needs_masks,
        part == "train" or bool(measured),
        node.get("filter_cfg") or {} if part == "train" else {},
    )
    for warning in warnings:
        print_main(f"WARNING: {what}: {warning}")
    prefix = (node.get("data_prefix") or {}).get("img", "")
    folder = os.path.join(root, prefix)
    images = [os.path.join(folder, image["file_name"]) for image in content["images"]]
    if lost := missing_files(images, folder):
        words = f"{len(lost)} of its {len(images)} images are missing, the first is {lost[0]}"
        if part != "train" or len(lost) > unreadable_limit("skip", len(images)):
            raise UserError(f"{what}: {words}; put them there, or set data_prefix=dict(img=FOLDER)")
        print_main(f"WARNING: {what}: {words}")  # training counts them as unreadable
    for evaluator in evaluators:
        _check_evaluator(f"{part}_evaluator", evaluator["ann_file"], path, {image["id"] for image in content["images"]})


def _check_evaluator(name: str, path: str, of_dataset: str, images: set[Any]) -> None:
    """Refuse an evaluator whose annotations are of other images than the data set's."""
    if is_remote(path) or os.path.abspath(path) == os.path.abspath(of_dataset):
        return
    if not os.path.isfile(path):
        raise UserError(f"{name}.ann_file={path}: no such file; the data set's is {of_dataset}")
    held = read_annotations(path, f"{name}.ann_file={path}").get("images") or []
    if not images <= {image.get("id") for image in held}:
        raise UserError(
            f"{name}.ann_file={path}: has not all images of {of_dataset}, whose detections it evaluates; "
            "name the same file in both"
        )
