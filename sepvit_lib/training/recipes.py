"""Recipes: YAML files of settings. Each run writes its own as args.yaml, which repeats it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sepvit_lib.training.commands import Parser
from sepvit_lib.training.errors import UserError, setting
from sepvit_lib.training.storage import write_file

ARGS = "args.yaml"
PERSONAL = ("config", "local_rank")  # settings of a single start, not part of a recipe


def parse_with_recipe(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Settings that it lacks come from its recipe (`config`), then from the defaults.

    Raises:
        UserError: a setting is invalid, in the command line or in the recipe.
    """
    args = parser.parse_args(arguments)
    if args.config is not None:
        parser.set_defaults(**read_recipe(Path(args.config), parser))
        args = parser.parse_args(arguments)
    return args


def read_recipe(path: Path, parser: Parser) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: YAML file, a mapping from settings, spelled with `-` or `_`, to values.
        parser: has the settings and their types.

    Returns:
        values by the names of the settings in a Namespace.

    Raises:
        UserError: the file cannot be read, is not such a mapping, or has an unknown, repeated or invalid setting. The
            message names the line.
    """
    what = setting("config", path)
    actions = parser.actions()
    values: dict[str, Any] = {}
    for key, node in _entries(path, what):
        line = f"{what}, line {key.start_mark.line + 1}"
        action = actions.get(str(key.value).replace("-", "_"))
        if action is None or action.dest in (*PERSONAL, "help"):
            raise UserError(f"{line}: {key.value}: unknown setting{parser.suggestion(f'--{key.value}')}")
        if action.dest in values:
            raise UserError(f"{line}: {key.value}: set twice; remove one")
        try:
            values[action.dest] = _value(action, node)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise UserError(f"{line}: {key.value}: {error}") from None
    return values


def _entries(path: Path, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Read the keys and values of a YAML mapping as nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror}); recipes/ has the paper's recipes") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{what}{place}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{what}: holds no settings; expected lines such as `lr: 5e-4`")
    return root.value


def _value(action: argparse.Action, node: yaml.Node) -> Any:
    """Convert a setting's value. Numbers are read from their text: YAML takes 5e-4 for a string and `off` for false.

    Raises:
        ValueError: the value has the wrong type.
        argparse.ArgumentTypeError: the value is out of range.
    """
    if node.tag == "tag:yaml.org,2002:null" and action.default is None:
        return None
    if action.nargs == 0:  # switches
        if node.tag != "tag:yaml.org,2002:bool":
            raise ValueError(f"takes true or false, not {_text(node)}")
        return node.value.lower() in ("true", "yes", "on")
    if action.nargs is None:
        return _scalar(action, node)
    if not isinstance(node, yaml.SequenceNode) or (isinstance(action.nargs, int) and len(node.value) != action.nargs):
        count = action.nargs if isinstance(action.nargs, int) else "some"
        raise ValueError(f"takes a list of {count} values, such as [0.1, 0.9], not {_text(node)}")
    return [_scalar(action, entry) for entry in node.value]


def _scalar(action: argparse.Action, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
        raise ValueError(f"takes a value, not {_text(node)}")
    convert: Any = action.type or str  # argparse's stub also allows names of registered types
    try:
        value = convert(node.value)
    except ValueError:
        kind = {"int": "a whole number", "float": "a number"}.get(convert.__name__, "another value")
        raise ValueError(f"takes {kind}, not {_text(node)}") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"takes one of {', '.join(map(str, action.choices))}, not {_text(node)}")
    return value


def _text(node: yaml.Node) -> str:
    """A value as text, for messages."""
    return (node.value or "nothing") if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def write_recipe(path: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings as a recipe that repeats the run.

    Raises:
        OSError: the file cannot be written.
    """
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if name not in PERSONAL
    }
    write_file(path, lambda file: file.write(yaml.safe_dump(values, sort_keys=False).encode()))
