"""Options of configs: `--cfg-options`, and checks of names and values before anything is built from them."""

import ast
import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from sepvit_lib.dense.loading import REPLACED
from sepvit_lib.dense.own_data import TOP_LEVEL
from sepvit_lib.dense.parts import class_name
from sepvit_lib.training.errors import UserError

FLAG = "--cfg-options"
SIMILAR = 0.75  # of difflib: 1 is equal

# Keys that mmengine reads from dicts of a config besides the arguments of the class that `type` names.
EVERYWHERE = {"type", "_scope_", "_delete_"}
OF_TYPED = EVERYWHERE | {"priority", "requires_grad", "convert_to_iter_based", "override", "init_cfg"}
OF_OPTIMISER = {"optimizer", "paramwise_cfg", "constructor"}
OF_LOADER = {"dataset", "num_batch_per_epoch", "collate_fn", "worker_init_fn", "disable_subprocess_warning"}
# Keys that mmengine, mmseg, mmdet and these commands read from the top of a config, besides arguments of the runner.
TOP = {
    *TOP_LEVEL,
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    "test_pipeline",
    "tta_model",
    "tta_pipeline",
}


class KeyValueAction(DictAction):
    """Parse `--cfg-options key=value …`. Unlike mmengine's action, keeps spaces in texts and refuses other forms.

    Values with braces are dicts, or lists of dicts, as Python writes them.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for pair in values:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                parser.error(f"{FLAG} {pair}: takes key=value pairs, such as train_dataloader.batch_size=4")
            options = getattr(namespace, self.dest)
            if value.lstrip().startswith(("[", "(")) and any(value.count(a) != value.count(b) for a, b in ("[]", "()")):
                raise UserError(f"{FLAG} {pair}: its brackets do not match")
            if re.match(r"\s*[\[(]*\s*{", value):
                setattr(namespace, self.dest, {**options, key: _parse_literal(pair, value)})
            elif " " in value and not value.lstrip().startswith(("[", "(")):
                setattr(namespace, self.dest, {**options, key: value})
            else:
                super().__call__(parser, namespace, [pair], option_string)


def _parse_literal(pair: str, value: str) -> Any:
    try:
        return ast.literal_eval(value.strip())
    except (SyntaxError, ValueError):
        raise UserError(
            f"{FLAG} {pair}: not a dict as Python writes it, such as \"{{'type': 'SGD', 'lr': 0.1}}\"; or "
            "set its keys one by one, KEY.INNER_KEY=VALUE"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def merge_options(cfg: Config, options: Mapping[str, Any], where: str) -> None:
    """Merge options into a config.

    New keys are allowed where something reads them: arguments of the class that a dict's `type` names, and settings of
    mmengine's runner.

    Args:
        cfg: the config.
        options: the options, by dotted key.
        where: names the config in messages.

    Raises:
        UserError: an option names nothing in the config, or replaces a value by one of another kind.
    """
    whole = cfg.to_dict()
    for key in sorted(options, key=lambda key: not key.endswith(".type")):  # other arguments depend on the type
        if isinstance(place := _check_option(whole, key, options[key]), dict):
            place[key.rpartition(".")[2]] = options[key]
    try:
        for key in options:
            _fill(cfg, key.split(".")[:-1])
        cfg.merge_from_dict(copy.deepcopy(dict(options)))
    except Exception as error:  # mmengine raises KeyError, TypeError and others
        text = " ".join(str(error).split())
        raise UserError(f"{where}: {FLAG} cannot be merged ({type(error).__name__}: {text})") from None


def _check_option(whole: Mapping[str, Any], key: str, value: Any) -> Any:
    """Check an option. Returns what holds the value that it replaces; None if it is new."""
    shown, parts = f"{FLAG} {key}={value}", key.split(".")
    node: Any = whole
    holder: Any = None
    for i, part in enumerate(parts):
        holder = node
        place, inner = ".".join(parts[:i]), ".".join(parts[: i + 1])
        if node is None and i > 1:
            return None
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{shown}: {place} is a list of {len(node)}; name an entry: {place}.0")
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise UserError(f"{shown}: {place} is {node!r}, which has no settings of its own")
        elif not is_read(node, place, part):
            if not place and part in node:  # the other parts have copied it when the config was read
                hint = suggestion(copies(whole, part, parts[1:]) or similar_keys(whole, node, place, parts[i:]))
                raise UserError(f"{shown}: has no effect, nothing reads {inner}{hint}")
            hint = suggestion(similar_keys(whole, node, place, parts[i:]))
            raise UserError(f"{shown}: the config has no {inner}{hint or '; new names belong in the config file'}")
        elif part not in node:
            if any(name.isdigit() for name in parts[i + 1 :]):
                raise UserError(f'{shown}: the config has no list {inner}; set all of it: {inner}="[{{…}}, …]"')
            return None
        else:
            node = node[part]
    _check_kind(shown, key, node, value)
    return holder


def _fill(cfg: Config, parts: Sequence[str]) -> None:
    """Replace a None on the way to a key by a dict, which keys can be merged into."""
    node: Any = cfg
    for part in parts:
        if isinstance(node, (list, tuple)):
            node = node[int(part)]
        elif part not in node:
            return
        elif node[part] is None:
            node[part] = {}
            return
        else:
            node = node[part]


def is_read(node: Mapping[str, Any], place: str, key: str) -> bool:
    """Whether anything reads a key of a dict of a config.

    Args:
        node: the dict.
        place: its dotted key; "" for the whole config.
        key: the key.
    """
    known = known_keys(node, place)
    if place and key in node:
        return True
    if known is None:  # anything may read it, but names similar to others are mistakes
        return not difflib.get_close_matches(key, map(str, node), 1, SIMILAR)
    return key in known


def known_keys(node: Mapping[str, Any], place: str) -> set[str] | None:
    """Return the keys that are read from a dict of a config, besides those that it has; None if they are not known.

    Args:
        node: the dict.
        place: its dotted key; "" for the whole config.
    """
    if not place:
        own = {"data_preprocessor"} & set(node.get("model") or ())  # then the one at the top is not read
        return (TOP | set(inspect.signature(Runner.__init__).parameters)) - {"self", "cfg"} - own
    if re.fullmatch(r"\w+_dataloader", place):
        return OF_LOADER | set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    if isinstance(kind := node.get("type"), str):
        extra = OF_TYPED | (OF_OPTIMISER if place == "optim_wrapper" else set())
        accepted = [accepted_arguments(built) for built in built_by(kind)]
        if accepted and all(arguments is not None for arguments in accepted):
            return extra.union(*(arguments for arguments in accepted if arguments is not None))
    return None


def similar_keys(whole: Mapping[str, Any], node: Mapping[str, Any], place: str, missing: Sequence[str]) -> list[str]:
    """Return keys that may be meant by a missing one, dotted.

    Args:
        whole: the config.
        node: the dict that lacks the key.
        place: the dict's dotted key.
        missing: the missing key, and those inside it.
    """
    near = {key for key in map(str, node) if is_read(node, place, key)} | (known_keys(node, place) or set())
    found = difflib.get_close_matches(missing[0], sorted(near - EVERYWHERE), 2, SIMILAR)
    if found:
        return [".".join(filter(None, [place, key, *missing[1:]])) for key in found]
    places = [key for key in dotted_keys(whole) if is_read(whole, "", key.partition(".")[0])]
    for length in range(len(missing), 0, -1):  # the same name elsewhere in the config
        tail = "." + ".".join(missing[-length:])
        if found := [key for key in places if key.endswith(tail)]:
            return found
    names = difflib.get_close_matches(missing[-1], {key.rpartition(".")[2] for key in places}, 1, SIMILAR)
    return [key for key in places if key.rpartition(".")[2] in names]


def copies(whole: Mapping[str, Any], name: str, inner: Sequence[str]) -> list[str]:
    """Return keys inside the parts of a config that have copied a value from its top, dotted.

    Args:
        whole: the config.
        name: the value's name at the top.
        inner: keys inside the value.
    """
    places = [key for key, value in _items(whole) if value == whole[name] and is_read(whole, "", key.partition(".")[0])]
    return [".".join([key, *inner]) for key in places if key != name] if isinstance(whole[name], (dict, list)) else []


def suggestion(keys: Sequence[str]) -> str:
    """The end of a message that suggests keys; "" if there are none, or too many."""
    return f"; did you mean {' or '.join(keys)}?" if 0 < len(keys) <= 3 else ""


def dotted_keys(whole: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of all values of a config, those of whole dicts included. Lists are not entered."""
    return [key for key, _ in _items(whole)]


def _items(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        inner = f"{place}.{key}".lstrip(".")
        yield inner, value
        yield from _items(value, inner)


def built_by(kind: str) -> list[Callable[..., Any]]:
    """Return everything that a registry builds for a `type`, in the config's scope. Registries may share a name."""
    roots = [registry for registry in vars(registries).values() if isinstance(registry, Registry)]
    return [built for built in (registered(registry, kind) for registry in roots) if built is not None]


def registered(registry: Registry, kind: str) -> Callable[..., Any] | None:
    """Return what the commands build for a `type` in the config's scope; None if it is unknown."""
    found = _scoped(registry).get(kind)
    checked = REPLACED.get(class_name(found)) if isinstance(found, type) else None
    return (checked and registry.get(checked)) or found


def registered_names(registry: Registry) -> set[str]:
    """Return the types that a registry knows in the config's scope."""
    scoped = _scoped(registry)
    return {*scoped.module_dict, *scoped.root.module_dict}


def _scoped(registry: Registry) -> Registry:
    """Return the part of a registry that belongs to the config's library, if it has one."""
    scope = DefaultScope.get_current_instance()
    return registry.children.get(scope.scope_name, registry) if scope is not None else registry


def accepted_arguments(built: Callable[..., Any]) -> set[str] | None:
    """Return the names of the arguments that a class or function accepts; None if it accepts any.

    Classes with **kwargs are taken to pass them to the next class in their order of resolution.
    """
    names: set[str] = set()
    for constructor in _constructors(built):
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # not written in Python
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _constructors(built: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return what takes the arguments of a class, in its order of resolution, or of a function."""
    if not inspect.isclass(built):
        return [built]
    return [vars(kind)["__init__"] for kind in built.__mro__ if "__init__" in vars(kind)]


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


def _check_kind(shown: str, key: str, old: Any, new: Any) -> None:
    """Refuse a new value of another kind than the old one."""
    if new is None:
        return
    if isinstance(old, dict) and not isinstance(new, dict):
        raise UserError(f"{shown}: {key} is a group of settings; set them one by one, {key}.KEY=VALUE")
    if (
        isinstance(old, (list, tuple))
        and any(isinstance(entry, dict) for entry in old)
        and not isinstance(new, (dict, list, tuple))
    ):
        raise UserError(f"{shown}: {key} is a list of groups of settings; set them one by one, {key}.0.KEY=VALUE")
    if isinstance(old, bool) and isinstance(new, str):
        raise UserError(f"{shown}: takes True or False")
    if isinstance(old, (int, float)) and isinstance(new, str) and (key, new) != ("optim_wrapper.loss_scale", "dynamic"):
        raise UserError(f"{shown}: takes a number, such as {old}")


# Numbers that nothing checks before training: pattern of the dotted key, kind, lowest and highest value, exceptions.
NUMBERS: tuple[tuple[str, type, float, float, tuple[Any, ...]], ...] = (
    (r"train_cfg\.(max_iters|max_epochs|val_interval)", int, 1, math.inf, ()),
    (r"train_cfg\.val_begin", int, 0, math.inf, ()),
    (r"(train|val|test)_dataloader\.batch_size", int, 1, math.inf, (None,)),
    (r"(train|val|test)_dataloader\.num_workers", int, 0, math.inf, ()),
    (r"optim_wrapper\.accumulative_counts", int, 1, math.inf, ()),
    (r"optim_wrapper\.optimizer\.(lr|weight_decay)", float, 0, math.inf, ()),
    (r"default_hooks\.checkpoint\.(interval|max_keep_ckpts)", int, 1, math.inf, (-1,)),
    (r"default_hooks\.logger\.interval", int, 1, math.inf, ()),
)


def check_numbers(cfg: Config, where: str, options: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range, such as batches of 0 images.

    Args:
        cfg: the config, with the options merged.
        where: what names the config in messages.
        options: the options, by dotted key.

    Raises:
        UserError: a number is out of range, or not a number.
    """
    for key, value in _items(cfg.to_dict()):
        for pattern, kind, low, high, exceptions in NUMBERS:
            if not re.fullmatch(pattern, key):
                continue
            if kind is int and isinstance(value, float) and value.is_integer():  # such as 2e4
                value = int(value)
                cfg.merge_from_dict({key: value})
            if not (_is_number(value, kind, low, high) or value in exceptions):
                source = FLAG if key in options else where
                raise UserError(f"{source} {key}={value}: takes {_described(kind, low, high, exceptions)}")


def text_for_number(built: Callable[..., Any], part: Mapping[str, Any]) -> str | None:
    """Find an argument that is a text where a number is expected, by its default.

    Args:
        built: the class or function.
        part: its arguments.

    Returns:
        the argument's name; None if there is none.
    """
    defaults: dict[str, Any] = {}
    for constructor in reversed(_constructors(built)):
        with suppress(TypeError, ValueError):  # not written in Python
            defaults |= {name: p.default for name, p in inspect.signature(constructor).parameters.items()}
    numeric = {
        name for name, value in defaults.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return next((name for name, value in part.items() if name in numeric and isinstance(value, str)), None)


def _is_number(value: Any, kind: type, low: float, high: float) -> bool:
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high and math.isfinite(value)


def _described(kind: type, low: float, high: float, exceptions: Sequence[Any]) -> str:
    name = "a whole number" if kind is int else "a finite number"
    bounds = f"from {low:g}" + ("" if high == math.inf else f" to {high:g}")
    others = "".join(f", or {value} (never)" for value in exceptions if value is not None)
    return f"{name} {bounds}{others}"
