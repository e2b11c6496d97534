"""Config overrides (`--cfg-options`), checked against a config's keys."""

import ast
import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner

from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.config_lookup import dicts

FLAG = "--cfg-options"
MIN_SIMILARITY = 0.75  # difflib's ratio; 1 means equal

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

    A new key is allowed only if it may be read, see `is_read`.

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
            raise UserError(f"{FLAG} {key}={value}: has no effect{suggestion(cfg, key)}")
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
    """Whether something may read a key of a config dict.

    Inside the config, only typos of keys that are present are refused. Classes refuse other unknown arguments when they
    are built.

    Args:
        node: the dict.
        parent: the dotted key of the dict; "" for the whole config.
        key: the key.
    """
    if not parent:
        return key in top_keys(node)
    similar = difflib.get_close_matches(key, map(str, node), 1, MIN_SIMILARITY)
    return key in node or not similar or key in arguments_of(node)


def top_keys(cfg: Mapping[str, Any]) -> set[str]:
    """Return all top-level keys that are read from a config, present or not."""
    own = {"data_preprocessor"} & set(cfg.get("model") or ())  # if present, the top-level one is not read
    return (TOP | set(inspect.signature(Runner.__init__).parameters)) - {"self", "cfg"} - own


def arguments_of(node: Mapping[str, Any]) -> set[str]:
    """Return the names of the arguments of the class that a config dict's `type` names, and of its base classes."""
    kind, scope = node.get("type"), DefaultScope.get_current_instance()
    roots = [registry for registry in vars(registries).values() if isinstance(registry, Registry)]  # may share types
    scoped = [registry.children.get(scope.scope_name, registry) if scope else registry for registry in roots]
    found = [registry.get(kind) for registry in scoped] if isinstance(kind, str) else []
    bases = {base for one in found if inspect.isclass(one) for base in one.__mro__}
    return {name for base in bases for name in inspect.signature(vars(base).get("__init__", object)).parameters}


def suggestion(cfg: Config, key: str) -> str:
    """Suggest keys similar to one that has no effect, as the end of a message; "" if there are none or too many."""
    top = top_keys(cfg)
    keys = top | {inner for inner in dotted_keys(cfg) if inner.partition(".")[0] in top}
    near = difflib.get_close_matches(key, sorted(keys), 1, MIN_SIMILARITY)
    near = near or sorted(inner for inner in keys if inner.endswith("." + key.rpartition(".")[2]))
    return f"; did you mean {' or '.join(near)}?" if 0 < len(near) <= 3 else ""


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values in a config, at every depth."""
    inner = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield f"{prefix}{key}"
        yield from dotted_keys(value, f"{prefix}{key}.")


def move_root(cfg: Config, new: str) -> None:
    """Replace `data_root` in all paths of a config that start with it. Data sets and evaluators repeat the root."""
    old = str(cfg.get("data_root") or "").rstrip("/")
    for node in {id(node): node for node in dicts(cfg)}.values() if old else ():  # dicts may be shared
        for key, value in node.items():
            if isinstance(value, str) and f"{value}/".startswith(f"{old}/"):
                node[key] = new.rstrip("/") + value.removeprefix(old)
