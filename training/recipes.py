"""Recipes: settings of main.py in a YAML file (`--config`), and the one that each run leaves of its own (args.yaml)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from training.commands import Parser
from utils import UserError, write_file

ARGS = "args.yaml"
PERSONAL = ("config", "local_rank")  # settings of one start, not of a recipe


def parse_with_recipe(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; settings that it leaves out are those of its `--config`, or else the defaults.

    Raises:
        UserError: a setting is wrong, in the command line or in the recipe.
    """
    args = parser.parse_args(arguments)
    if args.config is not None:
        parser.set_defaults(**read_recipe(Path(args.config), parser))
        args = parser.parse_args(arguments)
    return args


def read_recipe(path: Path, parser: Parser) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: YAML file of a mapping from settings, spelled with `-` or `_`, to their values.
        parser: knows the settings and their types.

    Returns:
        values by the names that `parser` gives them.

    Raises:
        UserError: it cannot be read, is no such mapping, or has a setting that is unknown, repeated or of a wrong type;
            names the line.
    """
    what = f"--config {path}"
    actions = {option.lstrip("-").replace("-", "_"): action for action in parser._actions
               for option in action.option_strings if not option.startswith("--no-")}  # fmt: skip
    values: dict[str, Any] = {}
    for key, node in _entries(path, what):
        line = f"{what}, line {key.start_mark.line + 1}"
        action = actions.get(str(key.value).replace("-", "_"))
        if action is None or action.dest in (*PERSONAL, "help"):
            raise UserError(f"{line}: {key.value}: unknown setting{parser.suggestion(f'--{key.value}')}")
        if action.dest in values:
            raise UserError(f"{line}: {key.value}: the second one; leave one out")
        try:
            values[action.dest] = _value(action, node)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise UserError(f"{line}: {key.value}: {error}") from None
    return values


def _entries(path: Path, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a YAML mapping, as nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror}); recipes/ has those of the paper") from None
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
    """The value of a setting. Numbers are read from their text, as YAML takes 5e-4 for a word and `off` for false.

    Raises:
        ValueError: it is of another type than the setting's.
        argparse.ArgumentTypeError: it is out of the setting's range.
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
    try:
        value = action.type(node.value) if action.type else node.value
    except ValueError:
        kind = {"int": "a whole number", "float": "a number"}.get(action.type.__name__, "another value")
        raise ValueError(f"takes {kind}, not {_text(node)}") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"takes one of {', '.join(map(str, action.choices))}, not {_text(node)}")
    return value


def _text(node: yaml.Node) -> str:
    """A value as it stands in the file, more or less."""
    return (node.value or "nothing") if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def write_recipe(path: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings as a recipe that repeats it.

    Raises:
        OSError: it cannot be written.
    """
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
              if name not in PERSONAL}  # fmt: skip
    write_file(path, lambda file: file.write(yaml.safe_dump(values, sort_keys=False).encode()))
