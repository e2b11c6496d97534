"""Check that a config's data sets, heads and checkpoint agree on the classes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from sepvit_lib.common.class_names import canonical, listed, order_of
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import print_main
from sepvit_lib.mm.config_lookup import (
    COCO,
    LOADS_LABELS,
    SEGMENTATION,
    class_name,
    classes_of,
    data_sets,
    dicts,
    heads_of,
    is_kind,
    stated_classes,
    step_name,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


def check_classes(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse a config whose parts disagree on the data or the classes.

    Args:
        cfg: the config.
        loaders: names of the data loaders that will be used.

    Raises:
        UserError: the parts disagree. The message states both values.
    """
    names: tuple[str, ...] | None = None
    first = ""
    for loader in loaders:
        for node, kind in data_sets(cfg, loader):
            own = _names_of(f"{loader}.dataset", node, kind)
            if names is not None and own is not None and own != names:
                raise UserError(
                    f"{loader}.dataset has the classes {listed(own)}, {first} has {listed(names)}; set the same "
                    "metainfo in all of them"
                )
            names, first = own or names, f"{loader}.dataset"
        _check_top(cfg, loader)
    if names is None:
        return
    for key, head in heads_of(cfg):
        if head.get("num_classes", len(names)) != len(names):
            raise UserError(
                f"{key}.num_classes={head['num_classes']}: the data set has {len(names)} classes, {listed(names)}; "
                "use that number, or set metainfo = dict(classes=…) in the data sets"
            )
        losses = [*dicts(head.get("loss_decode") or dict(type="CrossEntropyLoss"))]  # mmseg's default
        softmax = [one for one in losses if step_name(one) == "CrossEntropyLoss" and not one.get("use_sigmoid")]
        if head.get("out_channels") == 1 and softmax:
            hint = f"set {key}.loss_decode.use_sigmoid=True"
            raise UserError(f"{key}.out_channels=1: a softmax over one channel learns nothing; {hint}")


def _names_of(key: str, node: Mapping[str, Any], kind: Any) -> tuple[str, ...] | None:
    """Return a data set's classes. Refuse a single string, and fewer than two classes in segmentation."""
    stated = (node.get("metainfo") or {}).get("classes")
    if isinstance(stated, str) and not os.path.isfile(stated):
        hint = f"a single name needs a comma, ({stated!r},)"
        raise UserError(f"{key}.metainfo classes={stated!r}: takes a tuple, or a file of names; {hint}")
    names = classes_of(node, kind)
    if is_kind(kind, SEGMENTATION) and len(names or ()) < 2:
        held = f"a single class ({names[0]}) leaves nothing to learn" if names else "has no classes"
        raise UserError(
            f"{key}: {held}; set metainfo = dict(classes=('background', …)) and labels from 0; a single-channel head "
            "needs two classes, out_channels=1 and loss_decode.use_sigmoid=True"
        )
    return names


def _check_top(cfg: Config, loader: str) -> None:
    """Refuse top-level data settings that differ from those of all data sets of a loader.

    mmengine does not copy top-level settings into data sets, so they would have no effect. Empty values are ignored.
    """
    sets = [*data_sets(cfg, loader)]
    classes = [tuple(classes_of(node, kind) or ()) for node, kind in sets]
    stated: tuple[tuple[str, Any, list[Any]], ...] = (
        ("data_root", _root_of(cfg), [_root_of(node) for node, _ in sets]),
        ("metainfo", stated_classes(cfg), classes),
        ("classes", tuple(cfg.get("classes") or ()), classes),
    )
    for name, value, held in stated:
        if held and value and value not in held:
            raise UserError(
                f"{name} at the top of the config is {value!r}, but {loader}.dataset has {held[0]!r}; "
                "top-level values are not copied; set it in each data set, and the same at the top"
            )


def _root_of(node: Any) -> str:
    return str(node.get("data_root") or "").rstrip("/")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def classes_in(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in a checkpoint of mmengine or mmcv 1.x; None if it contains none."""
    meta = checkpoint.get("meta") or {}
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    return tuple(map(str, names)) if names else None


def has_other_classes(cfg: Config, checkpoint: Mapping[str, Any], loader: str) -> bool:
    """Whether a checkpoint's class names differ from a loader's, in any order. False if either names no classes."""
    held, names = classes_in(checkpoint), _classes_of_loader(cfg, loader)
    return None not in (held, names) and sorted(map(canonical, held or ())) != sorted(map(canonical, names or ()))


def match_classes(cfg: Config, checkpoint: Mapping[str, Any], what: str, loaders: Sequence[str]) -> None:
    """Renumber the data sets' classes in a checkpoint's order. Classes are matched by name.

    Args:
        cfg: the config, with the same classes in all data sets.
        checkpoint: the checkpoint.
        what: flag and path of the checkpoint, for messages.
        loaders: names of the data loaders that will be used.

    Raises:
        UserError: the names differ, or the classes of a data set cannot be renumbered.
    """
    held, names = classes_in(checkpoint), _classes_of_loader(cfg, loaders[0])
    if names is None:
        return
    if held is None:
        print_main(f"{what}: does not name its classes; they are matched by number")
        return
    hint = "set metainfo = dict(classes=…) in the data sets to the names that it was trained on"
    order = order_of(held, names, what, f"{loaders[0]}.dataset", hint)
    if held == names:
        return
    for loader in loaders:
        for node, kind in data_sets(cfg, loader):
            problem = f"{what}: its classes are in a different order than {loader}'s"
            _renumber(node, kind, held, order or [*range(len(names))], problem)
    if order is not None:
        print_main(f"{what}: its classes are in a different order than {loaders[0]}.dataset's; matched by name")


def _classes_of_loader(cfg: Config, loader: str) -> tuple[str, ...] | None:
    return next((classes_of(node, kind) for node, kind in data_sets(cfg, loader)), None)


def _renumber(node: Any, kind: Any, held: Sequence[str], order: list[int], problem: str) -> None:
    """Renumber the classes of one data set in a checkpoint's order.

    Args:
        node: the data set's settings.
        kind: the data set's Python class.
        held: the names of the classes, in the checkpoint's order and spelling.
        order: for each of the data set's classes, its index in the checkpoint.
        problem: start of the message if the classes cannot be renumbered.

    Raises:
        UserError: the classes cannot be renumbered.
    """
    meta, has_moved = dict(node.get("metainfo") or {}), order != sorted(order)
    if has_moved and is_kind(kind, SEGMENTATION) and not kind.METAINFO.get("classes"):  # else mmseg maps labels by name
        for step in dicts(node.get("pipeline")):
            name = step_name(step)
            if name in LOADS_LABELS:
                step["label_map"] = list(order)
            elif name.startswith("Load") and "Image" not in name:
                raise UserError(f"{problem}, and {name} cannot renumber them; list them as {listed(held)}")
        meta["stored_classes"] = classes_of(node, kind)
    elif has_moved and not is_kind(kind, SEGMENTATION) and class_name(kind) not in COCO:
        raise UserError(f"{problem}, and {kind.__name__} numbers them itself; list them as {listed(held)}")
    if isinstance(colours := meta.get("palette"), (list, tuple)) and len(colours) == len(order):
        meta["palette"] = [colours[order.index(number)] for number in range(len(order))]
    node["metainfo"] = meta | dict(classes=tuple(held))
