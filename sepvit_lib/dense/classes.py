"""Checks that a config's data sets, heads, class weights, palettes and checkpoint agree on the classes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from sepvit_lib.dense.annotations import listed
from sepvit_lib.dense.parts import (
    COCO,
    LOADS_LABELS,
    SEGMENTATION,
    class_name,
    classes_of,
    data_sets,
    dicts,
    heads_of,
    is_kind,
    step_name,
    weighted_losses,
)
from sepvit_lib.training.classes import canonical, order_of
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.processes import print_main

# ----------------------------------------------------------------------------------------------------------------------
# Of a config
# ----------------------------------------------------------------------------------------------------------------------


def checked_names(names: Any, where: str) -> tuple[str, ...]:
    """Return names of classes as a tuple. A text is the path of a file with a name in each line, as in mmengine.

    Args:
        names: the names.
        where: what states them, for messages.

    Raises:
        UserError: they are not a list of different texts.
    """
    if isinstance(names, str) and os.path.isfile(names):
        with open(names, encoding="utf-8") as file:
            names = [line for line in file.read().splitlines() if line.strip()]
    if isinstance(names, str):
        raise UserError(
            f"{where} classes={names!r}: a text, neither names nor a file of names; a tuple of one name "
            f"has a comma: classes=({names!r},)"
        )
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{where} classes={names!r}: takes the names of the classes, texts, as in classes=('road', 'sky')"
        )
    forms = [canonical(name) for name in names]
    if twice := sorted({name for name in forms if forms.count(name) > 1}):
        raise UserError(f"{where} classes: has {listed(twice)} several times; names are different")
    return tuple(names)


def checked_palette(palette: Any, where: str) -> Any:
    """Return a palette as mmdet needs it, with tuples as colours. Texts, such as 'random', stay.

    Args:
        palette: the palette.
        where: what states it, for messages.

    Raises:
        UserError: it is not a list of colours.
    """
    if isinstance(palette, str):
        return palette
    for colour in palette if isinstance(palette, (list, tuple)) else [palette]:
        parts = colour if isinstance(colour, (list, tuple)) else ()
        if len(parts) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in parts):
            raise UserError(
                f"{where} palette: has {colour!r}; a colour is three whole numbers from 0 to 255, and a "
                "palette a list of them"
            )
    return [tuple(colour) for colour in palette]


def check_classes(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse a config whose parts disagree on the classes.

    Args:
        cfg: the config.
        loaders: names of the data loaders that will be used.

    Raises:
        UserError: they disagree. The line has both sides.
    """
    names: tuple[str, ...] | None = None
    first = ""
    for loader in loaders:
        for node, kind in data_sets(cfg, loader):
            own = _names_of(f"{loader}.dataset", node, kind)
            if own is None:
                continue
            if names is not None and own != names:
                raise UserError(
                    f"{loader}.dataset has the classes {listed(own)}, {first} {listed(names)}; set "
                    "metainfo at the top of the config, for all of them"
                )
            names, first = own, f"{loader}.dataset"
    if names is not None:
        for place, head in heads_of(cfg):
            _check_head(place, head, names)


def _names_of(place: str, node: Mapping[str, Any], kind: Any) -> tuple[str, ...] | None:
    """Return a data set's classes, and refuse those that do not fit its own class or palette."""
    meta = node.get("metainfo") or {}
    if "classes" in meta:
        checked_names(meta["classes"], f"{place}.metainfo")
    names, known = classes_of(node, kind), kind.METAINFO.get("classes")
    if names is None and is_kind(kind, SEGMENTATION):
        raise UserError(f"{place}: {kind.__name__} has no classes; set metainfo = dict(classes=('road', 'sky', …))")
    if names and known and is_kind(kind, SEGMENTATION) and (others := [name for name in names if name not in known]):
        raise UserError(
            f"{place}.metainfo: {listed(others)} are none of the classes of {kind.__name__}, "
            f"{listed(known)}; for data of your own, set metainfo at the top of the config"
        )
    if names and len(names) == 1 and is_kind(kind, SEGMENTATION):
        two = f"set metainfo = dict(classes=('background', {names[0]!r})), for labels 0 and 1"
        one = "for a head of one channel, set out_channels=1, num_classes=2 and loss_decode.use_sigmoid=True as well"
        raise UserError(
            f"{place}: a single class ({names[0]}) leaves nothing to learn, every labelled pixel has it; {two}; {one}"
        )
    palette = meta.get("palette")
    if names and palette is not None and not isinstance(palette, str) and len(palette) != len(names):
        raise UserError(
            f"{place}.metainfo: palette has {len(palette)} colours for the {len(names)} classes "
            f"{listed(names)}; state as many, or none"
        )
    return names


def _check_head(place: str, head: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a head with another number of classes or class weights."""
    count = head.get("num_classes", len(names))
    if count != len(names):
        raise UserError(
            f"{place}.num_classes={count}: the data set has {len(names)} classes, {listed(names)}; state "
            "as many, or set metainfo = dict(classes=…) to those of the data set"
        )
    losses = head.get("loss_decode") or dict(type="CrossEntropyLoss")  # mmseg's default
    softmax = [loss for loss in dicts(losses) if step_name(loss) == "CrossEntropyLoss" and not loss.get("use_sigmoid")]
    if head.get("out_channels") == 1 and softmax:
        hint = f"set {place}.loss_decode.use_sigmoid=True"
        raise UserError(f"{place}.out_channels=1: a softmax over one channel learns nothing; {hint}")
    for name, loss in weighted_losses(head):
        # Detectors that do not decide each class by itself have a class for the background.
        background = int(name == "loss_cls" and not loss.get("use_sigmoid", False))
        if len(loss["class_weight"]) != len(names) + background:
            extra = " and the background" if background else ""
            raise UserError(
                f"{place}.{name}.class_weight has {len(loss['class_weight'])} weights for the {len(names)} "
                f"classes {listed(names)}{extra}; state as many, or None"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Of a checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def classes_in(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes that a checkpoint of mmengine, or of mmcv 1.x, was trained on; None if it has none."""
    meta = checkpoint.get("meta") or {}
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    return tuple(map(str, names)) if names else None


def has_other_classes(cfg: Config, checkpoint: Mapping[str, Any], loader: str) -> bool:
    """Whether a checkpoint was trained on classes with different names than a loader's. Their order may differ."""
    held, names = classes_in(checkpoint), _classes_of_loader(cfg, loader)
    return None not in (held, names) and sorted(map(canonical, held or ())) != sorted(map(canonical, names or ()))


def match_classes(cfg: Config, checkpoint: Mapping[str, Any], what: str, loaders: Sequence[str]) -> None:
    """Let data sets number their classes as a checkpoint does, by name.

    Args:
        cfg: the config, with the same classes in all data sets.
        checkpoint: the checkpoint.
        what: flag and path, for messages.
        loaders: names of the data loaders that will be used.

    Raises:
        UserError: names differ, or a data set cannot be numbered in another order.
    """
    held, names = classes_in(checkpoint), _classes_of_loader(cfg, loaders[0])
    if names is None:
        return
    if held is None:
        print_main(f"{what}: does not name its classes, which are compared by number")
        return
    hint = "set metainfo = dict(classes=…) to the names that it was trained on"
    order = order_of(held, names, what, f"{loaders[0]}.dataset", hint)
    if held == names:
        return
    palette = checkpoint["meta"].get("dataset_meta", {}).get("palette")
    for loader in loaders:
        for node, kind in data_sets(cfg, loader):
            _renumber(
                node, kind, names, held, order, palette, f"{what}: its classes are in another order than {loader}'s"
            )
    if order is not None:
        print_main(f"{what}: its classes are in another order than {loaders[0]}.dataset's; they are matched by name")


def _classes_of_loader(cfg: Config, loader: str) -> tuple[str, ...] | None:
    return next((classes_of(node, kind) for node, kind in data_sets(cfg, loader)), None)


def _renumber(
    node: Any, kind: Any, names: Sequence[str], held: Sequence[str], order: list[int] | None, palette: Any, problem: str
) -> None:
    """Let a data set number its classes in a checkpoint's order.

    Args:
        node: its settings.
        kind: its class.
        names: its classes in its own order.
        held: the same in the checkpoint's order, and spelling.
        order: the number of each class in the checkpoint, None if it is that in the data set.
        palette: the checkpoint's colours, None if it has none.
        problem: what is reported if that is not possible.

    Raises:
        UserError: it is not.
    """
    is_own = bool(kind.METAINFO.get("classes"))  # mmseg's classes, by whose names files are numbered
    meta = dict(node.get("metainfo") or {})
    if order is not None and is_kind(kind, SEGMENTATION) and not is_own:
        for step in dicts(node.get("pipeline")):
            name = step_name(step)
            if name in LOADS_LABELS:
                step["label_map"] = list(order)
            elif name.startswith("Load") and "Image" not in name:
                raise UserError(f"{problem}, and {name} loads them as they are; write them as {listed(held)}")
        meta["stored_classes"] = tuple(names)
    elif order is not None and not is_kind(kind, SEGMENTATION) and class_name(kind) not in COCO:
        raise UserError(f"{problem}, and {kind.__name__} numbers them itself; write them as {listed(held)}")
    ordered = tuple(names) if order is None else tuple(names[order.index(number)] for number in range(len(names)))
    meta["classes"] = ordered if is_own and is_kind(kind, SEGMENTATION) else tuple(held)
    if isinstance(colours := meta.get("palette"), (list, tuple)) and order is not None:
        meta["palette"] = palette or [colours[order.index(number)] for number in range(len(names))]
    node["metainfo"] = meta
