"""A data set of one's own: what the top of a config says about the data reaches every part of the config.

mmengine copies values when it reads a config. A child that sets `data_root` would leave the data sets of its base as
they are. Here they follow, unless a config has set them itself.
"""

import colorsys
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from mmengine.config import Config

from sepvit_lib.dense.annotations import listed
from sepvit_lib.dense.classes import checked_names, checked_palette
from sepvit_lib.dense.parts import (
    LOADERS,
    LOADS_IMAGES,
    SEGMENTATION,
    classes_of,
    data_sets,
    dicts,
    heads_of,
    is_kind,
    step_name,
    weighted_losses,
)
from sepvit_lib.training.errors import UserError

DATA_SET_KEYS = ("img_suffix", "seg_map_suffix", "reduce_zero_label")  # of mmseg's data sets
TOP_LEVEL = ("data_root", "metainfo", "classes", "num_classes", "orientation", *DATA_SET_KEYS)


class Bases(Iterable[Config]):
    """Configs that a config inherits, directly or not. They are read when they are needed, which takes seconds.

    Args:
        files: the configs' files, the nearest first.
        read: reads a config.
    """

    def __init__(self, files: Iterable[str], read: Callable[[str], Config]) -> None:
        self._rest = map(read, files)
        self._known: list[Config] = []

    def __iter__(self) -> Iterator[Config]:
        for place in count():
            if place == len(self._known):
                if (base := next(self._rest, None)) is None:
                    return
                self._known.append(base)
            yield self._known[place]


def apply_top_level(cfg: Config, where: str, bases: Iterable[Config]) -> None:
    """Let the parts of a config follow the names of `TOP_LEVEL` at its top.

    - `data_root` replaces that of the bases, in all paths.
    - `metainfo`, or `classes`, become those of the data sets. A data set class of mmseg with classes of its own becomes
      a `BaseSegDataset`.
    - The heads get as many classes. Class weights and a palette of other classes are dropped, and colours are chosen.
    - Evaluators read the annotations of their data set.
    - `orientation` becomes that of the transforms that load images, unless they state one.

    What is not inherited from a base, but set by the config itself, stays.
    `sepvit_lib.dense.data.check_data` refuses it if it disagrees.

    Args:
        cfg: the config.
        where: names the config in messages.
        bases: the configs that it inherits, see `Bases`.

    Raises:
        UserError: a value is of another kind, or it is unclear what it is meant for.
    """
    follows = [*_following_evaluators(cfg, bases)]
    if cfg.get("orientation") is not None:
        for step in dicts([*(cfg.get(loader) for loader in LOADERS), cfg.get("tta_pipeline"), cfg.get("custom_hooks")]):
            if step_name(step) in LOADS_IMAGES:
                step.setdefault("orientation", cfg.orientation)
    _move_root(cfg, where, bases)
    _move_settings(cfg, bases)
    has_changed = _move_metainfo(cfg, where, bases)
    _move_num_classes(cfg, where, bases, has_changed)
    for loader, evaluator in follows:
        if path := annotations_of(cfg, loader):
            evaluator.ann_file = path


# ----------------------------------------------------------------------------------------------------------------------
# Paths
# ----------------------------------------------------------------------------------------------------------------------


def annotations_of(cfg: Config, loader: str) -> str | None:
    """Return the annotation file of a loader's data set, None if it has none or several."""
    nodes = [node for node, _ in data_sets(cfg, loader)]
    if len(nodes) != 1 or not isinstance(nodes[0].get("ann_file"), str) or not nodes[0]["ann_file"]:
        return None
    return os.path.join(nodes[0].get("data_root") or "", nodes[0]["ann_file"])


def _following_evaluators(cfg: Config, bases: Iterable[Config]) -> Iterator[tuple[str, Any]]:
    """Yield the evaluators whose annotations are those of their data set, with its loader.

    Also those that are inherited from a base whose data set has others.
    """
    for part in ("val", "test"):
        loader = f"{part}_dataloader"
        path = annotations_of(cfg, loader)
        for node in dicts(cfg.get(f"{part}_evaluator")):
            held = node.get("ann_file")
            if path is None or not isinstance(held, str):
                continue
            if _same(held, path) or any(
                held in _evaluated(base) and annotations_of(base, loader) not in (None, path) for base in bases
            ):
                yield loader, node


def _same(path: str, other: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(other)


def _evaluated(cfg: Config) -> list[Any]:
    """Annotation files of a config's evaluators."""
    return [node.get("ann_file") for node in dicts([cfg.get("val_evaluator"), cfg.get("test_evaluator")])]


def _move_root(cfg: Config, where: str, bases: Iterable[Config]) -> None:
    """Let all paths follow `data_root`."""
    root = cfg.get("data_root")
    if root is None or _is_placed(cfg):
        return
    if not isinstance(root, str):
        raise UserError(f"{where} data_root={root!r}: takes the path of a folder, a text")
    new, is_named = root.rstrip("/") or root, False
    for base in bases if _elsewhere(cfg, new) else ():
        if old := str(base.get("data_root") or "").rstrip("/"):
            is_named = True
            move(cfg, old, new)
            if not _elsewhere(cfg, new):
                return
    if is_named:
        return
    inherited = sorted(
        {place.rstrip("/") for place in _elsewhere(cfg, new) if _is_inherited(place, "data_root", bases)}
    )
    if len(inherited) > 1:
        raise UserError(
            f"{where} data_root={root}: the data sets of its base have several folders, "
            f"{listed(inherited)}; set data_root of each data set"
        )
    for place in inherited:
        move(cfg, place, new)


def _is_placed(cfg: Config) -> bool:
    """Whether the config itself has placed some of its data sets: these are at `data_root`, others beside them are not.

    They may come from several folders on purpose.
    """
    root = str(cfg.data_root).rstrip("/")
    for loader in LOADERS:
        places = [str(node.get("data_root") or "").rstrip("/") == root for node, _ in data_sets(cfg, loader)]
        if any(places) and not all(places):
            return True
    return False


def _elsewhere(cfg: Config, root: str) -> list[str]:
    """Folders of data sets other than a folder."""
    places = [node.get("data_root") for loader in LOADERS for node, _ in data_sets(cfg, loader)]
    return [place for place in places if place and place.rstrip("/") != root]


def _is_below(path: str, folder: str) -> bool:
    return path.rstrip("/") == folder or path.startswith(folder.rstrip("/") + "/")


def move(cfg: Config, old: str, new: str) -> None:
    """Replace a folder at the start of all paths of a config. Base configs repeat it in data sets and evaluators.

    Args:
        cfg: the config.
        old: the folder, without a slash at its end.
        new: what replaces it. Paths in it stay.
    """
    if old == new:
        return
    for node in {id(node): node for node in dicts(cfg)}.values():  # parts may be shared
        for key, value in node.items():
            is_new = isinstance(value, str) and _is_below(new, old) and _is_below(value, new)
            if isinstance(value, str) and not is_new and _is_below(value, old):
                node[key] = new + value.removeprefix(old)


# ----------------------------------------------------------------------------------------------------------------------
# Classes
# ----------------------------------------------------------------------------------------------------------------------


def palette_of(count: int) -> list[tuple[int, ...]]:
    """Choose colours for classes, RGB, that differ from each other as neighbours in the list."""
    colours = []
    for number in range(count):
        hue = number * 0.618034 % 1  # the golden ratio spreads any number of hues
        value, saturation = (1.0, 0.65)[number % 2], (0.85, 1.0)[number // 2 % 2]
        colours.append(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)))
    return colours


def _stated_metainfo(cfg: Config, where: str, bases: Iterable[Config]) -> dict[str, Any] | None:
    """Return the `metainfo` that the top of a config states; None if it states none."""
    top, names = cfg.get("metainfo"), cfg.get("classes")
    if top is not None and not isinstance(top, dict):
        raise UserError(f"{where} metainfo={top!r}: takes a dict, as in metainfo=dict(classes=('road', 'sky'))")
    if top is None and names is None:
        return None
    meta = dict(top or {})
    if names is not None and _plain(names) != _plain(meta.get("classes")):
        if "classes" not in meta or any(_plain(base.get("metainfo")) == _plain(top) for base in bases):
            meta["classes"] = names
        elif not any(_plain(base.get("classes")) == _plain(names) for base in bases):
            raise UserError(f"{where}: classes={names!r} and metainfo.classes={meta['classes']!r} disagree; set one")
    if "classes" in meta:
        meta["classes"] = checked_names(meta["classes"], f"{where} metainfo")
        _replace_palette(meta, bases)
    if meta.get("palette"):
        meta["palette"] = checked_palette(meta["palette"], f"{where} metainfo")
    return meta


def _replace_palette(meta: Any, bases: Iterable[Config]) -> None:
    """Choose colours if a `metainfo` has a base's for another number of classes."""
    palette, number = meta.get("palette"), len(meta["classes"])
    if palette is not None and len(palette) != number:
        others = (
            node.get("palette")
            for base in bases
            for node in dicts([base.get("metainfo"), *(base.get(loader) for loader in LOADERS)])
        )
        if any(_plain(palette) == _plain(other) for other in others):
            meta["palette"] = palette_of(number)


def _plain(value: Any) -> Any:
    """Return a value for comparisons: lists instead of tuples, plain dicts."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _is_inherited(value: Any, key: str, bases: Iterable[Config], now: Any = None) -> bool:
    """Whether a data set's value of a key is that of a data set of a base, whose top states another value than now."""
    return any(
        _plain(node.get(key)) == _plain(value)
        for base in bases
        if now is None or _plain(base.get(key)) != _plain(now)
        for loader in LOADERS
        for node, _ in data_sets(base, loader)
    )


def _move_metainfo(cfg: Config, where: str, bases: Iterable[Config]) -> bool:
    """Let the data sets follow `metainfo`, or `classes`. Returns whether they have got other classes."""
    for loader in LOADERS:
        for node, kind in data_sets(cfg, loader):
            _complete_metainfo(node, kind, f"{where} {loader}.dataset.metainfo", bases)
    meta = _stated_metainfo(cfg, where, bases)
    if meta is None:
        return False
    has_changed = False
    for loader in LOADERS:
        for node, kind in data_sets(cfg, loader):
            held, is_same = node.get("metainfo"), _plain(meta.get("classes")) == _plain(classes_of(node, kind))
            if _plain(held) == _plain(meta) or (held is None and is_same):
                continue
            if held is not None and not _is_inherited(held, "metainfo", bases, meta):
                continue
            if "classes" in meta:
                meta.setdefault("palette", palette_of(len(meta["classes"])))
            node["metainfo"] = dict(meta)
            if not is_same and is_kind(kind, SEGMENTATION) and kind.METAINFO.get("classes"):
                _generalise(node, kind)
            has_changed |= not is_same
    cfg.metainfo = dict(meta)
    return has_changed


def _complete_metainfo(node: Any, kind: Any, where: str, bases: Iterable[Config]) -> None:
    """Check the classes and colours that a data set states itself, and choose colours if there are too few."""
    meta: Any = node.get("metainfo") or {}
    if "classes" in meta:
        meta.classes = checked_names(meta.classes, where)
        _replace_palette(meta, bases)
        known = kind.METAINFO.get("palette")
        if not meta.get("palette") and isinstance(known, list) and len(known) < len(meta.classes):
            meta.palette = palette_of(len(meta.classes))
    if meta.get("palette"):
        meta.palette = checked_palette(meta.palette, where)


def _generalise(node: Any, kind: Any) -> None:
    """Make a data set of mmseg with classes of its own, such as ADE20K, one for any classes, with the same settings."""
    for parameter in inspect.signature(kind.__init__).parameters.values():
        if parameter.name in DATA_SET_KEYS and parameter.default is not parameter.empty:
            node.setdefault(parameter.name, parameter.default)
    node["type"] = "BaseSegDataset"


def _move_settings(cfg: Config, bases: Iterable[Config]) -> None:
    """Let mmseg's data sets follow the other keys at the top."""
    for key in (key for key in DATA_SET_KEYS if cfg.get(key) is not None):
        for loader in LOADERS:
            for node, kind in data_sets(cfg, loader):
                if node.get(key) == cfg[key] or not is_kind(kind, SEGMENTATION):
                    continue
                if node.get(key) is None or _is_inherited(node[key], key, bases, cfg[key]):
                    node[key] = cfg[key]
                    for step in dicts([node.get("pipeline"), cfg.get("tta_pipeline")]):
                        if key in step:  # mmseg's transform, which has to agree with its data set
                            step[key] = cfg[key]


def _move_num_classes(cfg: Config, where: str, bases: Iterable[Config], has_changed: bool) -> None:
    """Let the heads follow the number of classes, and drop class weights of other classes.

    Args:
        cfg: the config.
        where: names the config in messages.
        bases: see `apply_top_level`.
        has_changed: whether the data sets have got other classes.
    """
    names = _names_in(cfg)
    if names is None:
        return

    def others(place: str) -> Iterator[Mapping[str, Any]]:
        """Yield a head as it is in the bases of other classes."""
        return (
            head for base in bases if _names_in(base) not in (None, names) for at, head in heads_of(base) if at == place
        )

    _check_stated(cfg, where, names, bases)
    for place, head in heads_of(cfg):
        count = head.get("num_classes", len(names))
        if count != len(names) and any(count == other.get("num_classes") for other in others(place)):
            head["num_classes"] = len(names)
        for _, loss in weighted_losses(head):
            weights = loss["class_weight"]
            if (has_changed or len(weights) not in (len(names), len(names) + 1)) and any(
                _plain(weights) == _plain(inner["class_weight"])
                for other in others(place)
                for _, inner in weighted_losses(other)
            ):
                del loss["class_weight"]


def _names_in(cfg: Config) -> tuple[str, ...] | None:
    """Classes of a config's data sets, None if they have none."""
    found = (classes_of(node, kind) for loader in LOADERS for node, kind in data_sets(cfg, loader))
    return next((names for names in found if names is not None), None)


def _check_stated(cfg: Config, where: str, names: Sequence[str], bases: Iterable[Config]) -> None:
    """Refuse `num_classes` at the top that is not the number of classes. An inherited one follows it."""
    stated = cfg.get("num_classes")
    if stated is None or stated == len(names):
        return
    if any(base.get("num_classes") == stated and _names_in(base) != names for base in bases):
        cfg.num_classes = len(names)
        return
    raise UserError(
        f"{where} num_classes={stated!r}: the data set has {len(names)} classes, {listed(names)}; set "
        "metainfo = dict(classes=…) to the names of its classes, or remove num_classes"
    )
