"""Checks of COCO's annotation files, before a data set is built from one."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sepvit_lib.training.classes import canonical
from sepvit_lib.training.errors import UserError

MOST_NAMES = 12  # in a message

# What mmdet and pycocotools need of each entry, by the name of its list.
REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "file_name": str,
    "name": str,
    "height": (int, float),
    "width": (int, float),
}


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number. JSON files may hold NaN and Infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def has_finite_box(mark: Mapping[str, Any]) -> bool:
    """Whether the box of an annotation is of finite numbers."""
    return all(map(is_finite, mark.get("bbox", ())))


def sound_polygons(mask: Sequence[Any]) -> list[Any]:
    """Return the polygons of a mask that enclose something: of three corners at least, at finite coordinates."""
    return [
        one
        for one in mask
        if isinstance(one, list)
        and len(one) >= 6
        and len(one) % 2 == 0
        and not any(isinstance(value, float) and not math.isfinite(value) for value in one)
    ]


def has_usable_mask(mark: Mapping[str, Any]) -> bool:
    """Whether an annotation has a polygon or run lengths that can be decoded."""
    mask = mark.get("segmentation")
    return bool(mask.get("counts") and mask.get("size") if isinstance(mask, dict) else sound_polygons(mask or ()))


def listed(names: Sequence[Any]) -> str:
    """List names for a message. Of many, only the first are shown."""
    shown = ", ".join(map(str, names[:MOST_NAMES]))
    return shown if len(names) <= MOST_NAMES else f"{shown}, … ({len(names)} in all)"


def read_annotations(path: str, what: str) -> dict[str, Any]:
    """Read an annotation file.

    Args:
        path: the file.
        what: what it is and its path, for messages.

    Raises:
        UserError: it is missing, truncated or not COCO's format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{what}: not JSON, or truncated ({error})") from None
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"a {type(content).__name__}"
        raise UserError(f"{what}: {kind}, not COCO's format, an object with images, annotations and categories")
    return content


def check_annotations(
    what: str,
    content: Mapping[str, Any],
    classes: Sequence[str],
    needs_masks: bool,
    needs_objects: bool,
    filters: Mapping[str, Any],
) -> list[str]:
    """Refuse annotations that are incomplete or do not fit the classes.

    Args:
        what: the file, for messages.
        content: the file's content.
        classes: names of the data set's classes.
        needs_masks: whether the model or its evaluation needs a mask of each object.
        needs_objects: whether there have to be objects, for training or evaluation.
        filters: which images mmdet leaves out, its `filter_cfg`.

    Returns:
        warnings.

    Raises:
        UserError: they do not fit.
    """
    _check_entries(what, content, needs_objects)
    _check_categories(what, content, classes)
    names = {category["id"]: category["name"] for category in content["categories"]}
    marks = content.get("annotations") or []
    unknown = [mark for mark in marks if mark["category_id"] not in names]
    if unknown and len(unknown) == len(marks):
        raise UserError(
            f"{what}: {len(unknown)} annotations are of category {unknown[0]['category_id']!r}, which its "
            f"categories have not: {listed([*names])}"
        )
    marks = [mark for mark in marks if mark["category_id"] in names]
    infinite = [mark["id"] for mark in marks if not has_finite_box(mark)]
    marks = [mark for mark in marks if has_finite_box(mark)]
    wanted = set(map(canonical, classes))
    chosen = [mark for mark in marks if canonical(names[mark["category_id"]]) in wanted]
    if needs_objects and not chosen:
        finite = " with a finite box" if infinite else ""
        raise UserError(f"{what}: none of its {len(marks)} annotations{finite} is of the classes {listed(classes)}")
    images = {image["id"] for image in content["images"]}
    lost = [mark["image_id"] for mark in marks if mark["image_id"] not in images]
    if lost and len(lost) == len(marks):
        raise UserError(
            f"{what}: no annotation is of its images, the first is of image_id {lost[0]!r}; image_id is "
            "the id of an image"
        )
    if needs_masks and (bare := [mark for mark in chosen if _is_used(mark) and not mark.get("segmentation")]):
        raise UserError(
            f"{what}: {len(bare)} of {len(chosen)} annotations have no segmentation, the first is "
            f"{bare[0]['id']}; a model with masks needs it, RetinaNet does not"
        )
    small = _check_kept_images(what, content, chosen, filters)
    left_out = Counter(name for mark in marks if canonical(name := names[mark["category_id"]]) not in wanted)
    warnings = [f"{len(lost)} annotations are of no image, the first of image_id {lost[0]!r}"] if lost else []
    if unknown:
        warnings.append(
            f"{len(unknown)} annotations are left out, of categories that it does not list, such as "
            f"{unknown[0]['category_id']!r}"
        )
    if left_out:
        warnings.append(
            f"{left_out.total()} annotations are left out, of categories that are not classes: "
            f"{listed(sorted(left_out))}"
        )
    if small:
        warnings.append(
            f"{small} of its {len(images)} images are smaller than {filters['min_size']} pixels, and left "
            "out by filter_cfg"
        )
    if infinite:
        warnings.append(
            f"{len(infinite)} annotations have a box that is not finite and are skipped, the first is {infinite[0]}"
        )
    met = {canonical(names[mark["category_id"]]) for mark in chosen if _is_used(mark)}
    unmet = [name for name in classes if canonical(name) not in met]
    return warnings + _warnings_of_objects(chosen, unmet if needs_objects else (), needs_masks)


def _warnings_of_objects(chosen: Sequence[Mapping[str, Any]], unmet: Sequence[str], needs_masks: bool) -> list[str]:
    """Describe annotations from which nothing is learned.

    Args:
        chosen: the annotations of the classes.
        unmet: classes without any that is learned from.
        needs_masks: whether the model or its evaluation needs a mask of each object.
    """
    used = [mark for mark in chosen if _is_used(mark)]
    maskless = [mark["id"] for mark in used if mark.get("segmentation") and not has_usable_mask(mark)]
    warnings = []
    if needs_masks and maskless:
        warnings.append(
            f"{len(maskless)} annotations have a mask that encloses nothing and are ignored, the first is {maskless[0]}"
        )
    if chosen and not used:
        warnings.append(f"all {len(chosen)} annotations are crowds or empty boxes, from which nothing is learned")
    elif unmet:
        warnings.append(f"no annotation is of the classes {listed(unmet)}")
    return warnings


def _check_entries(what: str, content: Mapping[str, Any], needs_objects: bool) -> None:
    """Refuse lists that are missing, and entries without a required key."""
    for key, required in REQUIRED.items():
        entries = content.get(key)
        if not entries and key == "annotations" and isinstance(entries, (list, type(None))) and not needs_objects:
            continue
        if not isinstance(entries, list) or not entries:
            state = "has no" if entries is None or isinstance(entries, list) else "has, but not as a list,"
            raise UserError(f"{what}: {state} {key}; COCO's format is an object with {', '.join(REQUIRED)}")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f"{what}: {key}[{number}] is {entry!r:.40}, not an object with {', '.join(required)}")
            if missing := [name for name in required if entry.get(name) is None]:
                raise UserError(f"{what}: {key}[{number}] has no {' and no '.join(missing)}")
            for name in TYPES.keys() & required:
                if not isinstance(entry[name], TYPES[name]):
                    raise UserError(
                        f"{what}: {key}[{number}] has {name} {entry[name]!r:.40}, not "
                        f"{'a text' if TYPES[name] is str else 'a number'}"
                    )
        _check_ids(what, key, [entry["id"] for entry in entries])
    for mark in content.get("annotations") or []:
        box = mark["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)):
            raise UserError(
                f"{what}: annotation {mark['id']} has bbox {box!r:.60}, not four numbers: x, y, width and height"
            )


def _check_ids(what: str, key: str, ids: list[Any]) -> None:
    """Refuse ids that are not whole numbers, or not unique. Those of images may be texts."""
    allowed = (int, str) if key == "images" else (int,)
    if others := [value for value in ids if not isinstance(value, allowed)]:
        raise UserError(f"{what}: {key} have ids such as {others[0]!r}; ids are whole numbers")
    if len(set(ids)) < len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise UserError(f"{what}: several of its {key} have the id {twice!r}; ids are unique")


def _check_categories(what: str, content: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Refuse categories that do not fit the classes. The line has both lists."""
    names = [category["name"] for category in content["categories"]]
    if twice := [name for name, count in Counter(map(canonical, names)).items() if count > 1]:
        raise UserError(f"{what}: has several categories named {listed(twice)}")
    known = set(map(canonical, names))
    if missing := [name for name in classes if canonical(name) not in known]:
        both = f"the classes are {listed(classes)}; the file's categories are {listed(names)}"
        hint = "set metainfo = dict(classes=…) to names of the file"
        raise UserError(f"{what}: no category is named {listed(missing)}: {both}; {hint}")


def _check_kept_images(
    what: str, content: Mapping[str, Any], chosen: Iterable[Mapping[str, Any]], filters: Mapping[str, Any]
) -> int:
    """Refuse a file of which mmdet's filters leave no image. Returns how many are left out because they are small."""
    with_objects = {mark["image_id"] for mark in chosen}
    least = filters.get("min_size", 0)
    large = [image for image in content["images"] if min(image["width"], image["height"]) >= least]
    if not large:
        raise UserError(
            f"{what}: all {len(content['images'])} images are smaller than {least} pixels, and filter_cfg "
            f"leaves them out; set train_dataloader.dataset.filter_cfg.min_size=0"
        )
    if filters.get("filter_empty_gt") and not any(image["id"] in with_objects for image in large):
        raise UserError(f"{what}: no image has annotations of the classes; image_id of an annotation is an image's id")
    return len(content["images"]) - len(large)


def _is_used(mark: Mapping[str, Any]) -> bool:
    """Whether mmdet learns from an annotation. It leaves out crowds and boxes smaller than a pixel."""
    _, _, width, height = mark["bbox"]
    area = mark.get("area")
    is_empty = width < 1 or height < 1 or (area is not None and area <= 0)
    return not (mark.get("iscrowd") or mark.get("ignore") or is_empty)
