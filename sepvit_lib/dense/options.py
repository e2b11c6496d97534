"""Options of configs, `--cfg-options`: changes of what a config has, and of what its classes accept."""

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

from sepvit_lib.dense.loading import REPLACED
from sepvit_lib.dense.parts import class_name, dicts
from sepvit_lib.training.errors import UserError

FLAG = "--cfg-options"
SIMILAR = 0.75  # of difflib: 1 is equal

# Keys that mmengine reads from dicts of a config besides the arguments of the class that `type` names.
OF_TYPED = set("type _scope_ _delete_ priority requires_grad convert_to_iter_based override init_cfg".split())
OF_OPTIMISER = {"optimizer", "paramwise_cfg", "constructor"}
OF_LOADER = {"dataset", "num_batch_per_epoch", "disable_subprocess_warning"}
# Names that are read from the top of a config, besides arguments of mmengine's runner.
TOP = set(
    "activation_checkpointing classes compile custom_imports data_root efficient_conv_bn_eval find_unused_parameters "
    "metainfo model_wrapper_cfg orientation sync_bn test_pipeline tta_model tta_pipeline".split()
)


class KeyValueAction(DictAction):
    """Parse `--cfg-options key=value …`: Python's values, or mmengine's short forms. Texts keep their spaces."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for pair in values:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                parser.error(f"{FLAG} {pair}: takes key=value pairs, such as train_dataloader.batch_size=4")
            parsed: Any = value
            try:
                parsed = ast.literal_eval(value.strip())
            except (SyntaxError, ValueError):  # a text, or a list of texts without quotes
                if " " not in value or value.startswith(("[", "(")):
                    super().__call__(parser, namespace, [pair], option_string)
                    continue
            setattr(namespace, self.dest, {**getattr(namespace, self.dest), key: parsed})


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge options into a config.

    New keys are allowed where something reads them: arguments of the class that a dict's `type` names, and settings of
    mmengine's runner.

    Args:
        cfg: the config.
        options: the options, by dotted key.

    Raises:
        UserError: an option names nothing in the config, or replaces a number by a text.
    """
    for key in sorted(options, key=lambda key: not key.endswith(".type")):  # other arguments depend on the type
        check_option(cfg, key, options[key])
        try:
            cfg.merge_from_dict({key: copy.deepcopy(options[key])})
        except Exception as error:  # mmengine raises KeyError, TypeError and others
            raise UserError(f"{FLAG} {key}={options[key]}: cannot be merged ({error})") from None


def check_option(cfg: Config, key: str, value: Any) -> None:
    """Refuse an option that nothing reads. A None on its way becomes a dict, which keys can be merged into."""
    node: Any = cfg
    *outer, last = key.split(".")
    for number, part in enumerate([*outer, last]):
        place = ".".join(outer[:number])
        if isinstance(node, (list, tuple)):
            if not (part.isdigit() and int(part) < len(node)):
                raise UserError(f"{FLAG} {key}={value}: {place} is a list of {len(node)}; name an entry: {place}.0")
            node = node[int(part)]
        elif not isinstance(node, (dict, Config)):
            raise UserError(f"{FLAG} {key}={value}: {place} is {node!r}, which has no settings of its own")
        elif not is_read(node, place, part):
            raise UserError(f"{FLAG} {key}={value}: nothing reads {key}{suggestion(cfg, node, place, key)}")
        elif part not in node:
            return
        elif node[part] is None and number < len(outer):
            node[part] = {}
            return
        else:
            node = node[part]
    if isinstance(node, (int, float)) and isinstance(value, str) and value != "dynamic":  # which a loss scale may be
        kind = "True or False" if isinstance(node, bool) else f"a number, such as {node}"
        raise UserError(f"{FLAG} {key}={value}: takes {kind}")


def is_read(node: Mapping[str, Any], place: str, key: str) -> bool:
    """Whether anything reads a key of a dict of a config.

    Args:
        node: the dict.
        place: its dotted key; "" for the whole config.
        key: the key.
    """
    if place and key in node:
        return True
    known = known_keys(node, place)
    if known is None:  # anything may read it, but names similar to others are mistakes
        return not difflib.get_close_matches(key, map(str, node), 1, SIMILAR)
    return key in known


def known_keys(node: Mapping[str, Any], place: str) -> set[str] | None:
    """Return the keys that are read from a dict of a config, besides those that it has; None if they are not known."""
    if not place:
        own = {"data_preprocessor"} & set(node.get("model") or ())  # then the one at the top is not read
        return (TOP | set(inspect.signature(Runner.__init__).parameters)) - {"self", "cfg"} - own
    if place in ("train_dataloader", "val_dataloader", "test_dataloader"):
        return OF_LOADER | set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    roots = [registry for registry in vars(registries).values() if isinstance(registry, Registry)]  # may share a name
    kinds = [registered(registry, node["type"]) for registry in roots] if isinstance(node.get("type"), str) else []
    accepted = [accepted_arguments(kind) for kind in kinds if kind is not None]
    if not accepted or None in accepted:
        return None
    return OF_TYPED.union(OF_OPTIMISER if place == "optim_wrapper" else (), *(names or () for names in accepted))


def suggestion(cfg: Config, node: Mapping[str, Any], place: str, key: str) -> str:
    """The end of a message that suggests keys in place of one that nothing reads; "" if there are none, or too many."""
    known = [f"{place}.{name}".lstrip(".") for name in known_keys(node, place) or ()]
    keys = {*known, *(inner for inner in dotted_keys(cfg) if is_read(cfg, "", inner.partition(".")[0]))}
    near = difflib.get_close_matches(key, sorted(keys), 1, SIMILAR)
    near = near or sorted(inner for inner in keys if inner.endswith("." + key.rpartition(".")[2]))
    return f"; did you mean {' or '.join(near)}?" if 0 < len(near) <= 3 else ""


def dotted_keys(node: Any, place: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values of a config."""
    inner = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield f"{place}{key}"
        yield from dotted_keys(value, f"{place}{key}.")


def registered(registry: Registry, kind: str) -> Callable[..., Any] | None:
    """Return what the commands build for a `type` in the config's scope; None if it is unknown."""
    scope = DefaultScope.get_current_instance()
    found = (registry.children.get(scope.scope_name, registry) if scope else registry).get(kind)
    checked = REPLACED.get(class_name(found)) if isinstance(found, type) else None
    return (checked and registry.get(checked)) or found


def accepted_arguments(built: Callable[..., Any]) -> set[str] | None:
    """Return the names of the arguments that a class or function accepts; None if it accepts any.

    Classes with **kwargs are taken to pass them to the next class in their order of resolution.
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
    """Replace a config's `data_root` at the start of all its paths. Bases repeat it in data sets and evaluators."""
    old = str(cfg.get("data_root") or "").rstrip("/")
    for node in {id(node): node for node in dicts(cfg)}.values() if old else ():  # parts may be shared
        for key, value in node.items():
            if isinstance(value, str) and f"{value}/".startswith(f"{old}/"):
                node[key] = new.rstrip("/") + value.removeprefix(old)
