"""Config overrides (`--cfg-options`), checked against a config's keys and the arguments of its classes."""

import ast
import copy
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.config_lookup import class_name, dicts
from sepvit_lib.mm.image_loading import REPLACED

FLAG = "--cfg-options"
MIN_SIMILARITY = 0.75  # difflib's ratio; 1 means equal

# Keys that mmengine reads from config dicts, in addition to the arguments of the class named by `type`.
OF_TYPED = set("type _scope_ _delete_ priority requires_grad convert_to_iter_based override init_cfg".split())
OF_OPTIMISER = {"optimizer", "paramwise_cfg", "constructor"}
OF_LOADER = {"dataset", "num_batch_per_epoch", "disable_subprocess_warning"}
# Top-level keys that are read from a config, in addition to the arguments of mmengine's runner.
TOP = set(
    "activation_checkpointing classes compile custom_imports data_root efficient_conv_bn_eval find_unused_parameters "
    "metainfo model_wrapper_cfg orientation sync_bn test_pipeline tta_model tta_pipeline".split()
)


class KeyValueAction(DictAction):
    """Parse `--cfg-options key=value …`. Values are Python literals or mmengine's short forms. Spaces are allowed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for pair in values:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                parser.error(f"{FLAG} {pair}: takes key=value pairs, such as train_dataloader.batch_size=4")
            parsed: Any = value
            try:
                parsed = ast.literal_eval(value.strip())
            except (SyntaxError, ValueError):  # a string, or a list of strings without quotes
                if " " not in value or value.startswith(("[", "(")):
                    super().__call__(parser, namespace, [pair], option_string)
                    continue
            setattr(namespace, self.dest, {**getattr(namespace, self.dest), key: parsed})


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge options into a config.

    A new key is allowed only if it is read, by the class that the dict's `type` names or by mmengine's runner.

    Args:
        cfg: the config.
        options: the options, by dotted key.

    Raises:
        UserError: an option has no effect, cannot be merged, or replaces a number with a string.
    """
    for key in sorted(options, key=lambda key: not key.endswith(".type")):  # valid arguments depend on the type
        check_option(cfg, key, options[key])
        try:
            cfg.merge_from_dict({key: copy.deepcopy(options[key])})
        except Exception as error:  # mmengine raises KeyError, TypeError and others
            raise UserError(f"{FLAG} {key}={options[key]}: cannot be merged ({error})") from None


def check_option(cfg: Config, key: str, value: Any) -> None:
    """Refuse an option that nothing reads. If a parent of its key is None, a dict replaces the None."""
    node: Any = cfg
    *outer, last = key.split(".")
    for number, part in enumerate([*outer, last]):
        parent = ".".join(outer[:number])
        if isinstance(node, (list, tuple)):
            if not (part.isdigit() and int(part) < len(node)):
                raise UserError(f"{FLAG} {key}={value}: {parent} is a list of {len(node)}; use an index: {parent}.0")
            node = node[int(part)]
        elif not isinstance(node, (dict, Config)):
            raise UserError(f"{FLAG} {key}={value}: {parent} is {node!r}, which has no settings of its own")
        elif not is_read(node, parent, part):
            raise UserError(f"{FLAG} {key}={value}: has no effect{suggestion(cfg, node, parent, key)}")
        elif part not in node:
            return
        elif node[part] is None and number < len(outer):
            node[part] = {}
            return
        else:
            node = node[part]
    if isinstance(node, (int, float)) and isinstance(value, str) and value != "dynamic":  # "dynamic" is a loss scale
        kind = "True or False" if isinstance(node, bool) else f"a number, such as {node}"
        raise UserError(f"{FLAG} {key}={value}: takes {kind}")


def is_read(node: Mapping[str, Any], parent: str, key: str) -> bool:
    """Whether something reads a key of a config dict.

    Args:
        node: the dict.
        parent: the dotted key of the dict; "" for the whole config.
        key: the key.
    """
    if parent and key in node:
        return True
    known = known_keys(node, parent)
    if known is None:  # the key may be read, but if it is similar to an existing key, it is a typo
        return not difflib.get_close_matches(key, map(str, node), 1, MIN_SIMILARITY)
    return key in known


def known_keys(node: Mapping[str, Any], parent: str) -> set[str] | None:
    """Return all keys that are read from a config dict, present or not; None if they are unknown."""
    if not parent:
        own = {"data_preprocessor"} & set(node.get("model") or ())  # if present, the top-level one is not read
        return (TOP | set(inspect.signature(Runner.__init__).parameters)) - {"self", "cfg"} - own
    if parent in ("train_dataloader", "val_dataloader", "test_dataloader"):
        return OF_LOADER | set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    roots = [registry for registry in vars(registries).values() if isinstance(registry, Registry)]  # may share types
    kinds = [registered(registry, node["type"]) for registry in roots] if isinstance(node.get("type"), str) else []
    accepted = [accepted_arguments(kind) for kind in kinds if kind is not None]
    if not accepted or None in accepted:
        return None
    return OF_TYPED.union(OF_OPTIMISER if parent == "optim_wrapper" else (), *(names or () for names in accepted))


def suggestion(cfg: Config, node: Mapping[str, Any], parent: str, key: str) -> str:
    """Suggest keys similar to one that has no effect, as the end of a message; "" if there are none or too many."""
    known = [f"{parent}.{name}".lstrip(".") for name in known_keys(node, parent) or ()]
    keys = {*known, *(inner for inner in dotted_keys(cfg) if is_read(cfg, "", inner.partition(".")[0]))}
    near = difflib.get_close_matches(key, sorted(keys), 1, MIN_SIMILARITY)
    near = near or sorted(inner for inner in keys if inner.endswith("." + key.rpartition(".")[2]))
    return f"; did you mean {' or '.join(near)}?" if 0 < len(near) <= 3 else ""


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values in a config, at every depth."""
    inner = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield f"{prefix}{key}"
        yield from dotted_keys(value, f"{prefix}{key}.")


def registered(registry: Registry, kind: str) -> Callable[..., Any] | None:
    """Return the class or function that a `type` refers to in the config's scope; None if it is unknown."""
    scope = DefaultScope.get_current_instance()
    found = (registry.children.get(scope.scope_name, registry) if scope else registry).get(kind)
    checked = REPLACED.get(class_name(found)) if isinstance(found, type) else None
    return (checked and registry.get(checked)) or found


def accepted_arguments(built: Callable[..., Any]) -> set[str] | None:
    """Return the names of the arguments that a class or function accepts; None if unknown, or if any name is accepted.

    Classes with **kwargs are assumed to pass them to the next class in their MRO.
    """
    names: set[str] = set()
    kinds = built.__mro__ if inspect.isclass(built) else ()
    for constructor in [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [built]:
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # not written in Python
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def move_root(cfg: Config, new: str) -> None:
    """Replace `data_root` in all paths of a config that start with it. Data sets and evaluators repeat the root."""
    old = str(cfg.get("data_root") or "").rstrip("/")
    for node in {id(node): node for node in dicts(cfg)}.values() if old else ():  # dicts may be shared
        for key, value in node.items():
            if isinstance(value, str) and f"{value}/".startswith(f"{old}/"):
                node[key] = new.rstrip("/") + value.removeprefix(old)
