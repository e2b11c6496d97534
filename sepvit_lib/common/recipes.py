"""Recipes: YAML files of settings. Each run writes its settings as args.yaml, a recipe that repeats the run."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sepvit_lib.common.command_line import KeyValues, Parser
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.storage import write_output

ARGS = "args.yaml"
BASE = "base"  # key of the recipe that another one inherits
LAUNCH_SETTINGS = ("config", "local_rank")  # settings of a single launch, not part of a recipe
SWITCHES = dict(true=0, yes=0, on=0, false=1, no=1, off=1)  # index in the action's option_strings: --flag, --no-flag


def parse_with_recipe(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Settings that it lacks come from the recipe (`config`) or else from the defaults.

    Raises:
        UserError: a setting is invalid, in the command line or in the recipe.
    """
    args = parser.parse_args(arguments)
    if args.config is None:
        return args
    try:
        recipe = [argument for entry in read_recipe(args.config) for argument in _arguments_of(*entry, parser)]
        return parser.parse_args([*recipe, *(sys.argv[1:] if arguments is None else arguments)])
    except UserError as error:  # the recipe is at fault: the command line alone was parsed above
        raise UserError(f"{setting('config', args.config)}: {error}") from None


def read_recipe(path: str, may_inherit: bool = True) -> list[tuple[str, Any]]:
    """Read the settings from a recipe (a YAML mapping). Values stay strings: YAML does not parse 5e-4 as a float.

    The settings of the recipe that `base` names, a path relative to this recipe, come first: later settings win.

    Raises:
        UserError: the file cannot be read, is not a YAML mapping, or contains a setting twice.
    """
    try:
        loader = yaml.BaseLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); recipes/ has the paper's recipes") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError("contains no settings; expected lines such as `lr: 5e-4`")
    entries = [(str(key.value), loader.construct_object(value, deep=True)) for key, value in root.value]
    counts = Counter(key.replace("-", "_") for key, _ in entries)
    if max(counts.values(), default=1) > 1:
        raise UserError(f"{counts.most_common(1)[0][0]}: set twice; remove one")
    base = dict(entries).get(BASE)
    if base is None:
        return entries
    if not may_inherit:
        raise UserError(f"{BASE}: {path} is inherited itself, so it cannot inherit another recipe")
    try:
        inherited = read_recipe(str(Path(path).parent / base), may_inherit=False)
    except UserError as error:
        raise UserError(f"{BASE} {base}: {error}") from None
    return [*inherited, *((key, value) for key, value in entries if key != BASE)]


def _arguments_of(key: str, value: Any, parser: Parser) -> list[str]:
    """Convert a recipe's setting to command-line arguments.

    Raises:
        UserError: the setting is unknown, or its value has the wrong type.
    """
    action = parser.actions().get(key.replace("-", "_"))
    if action is None or action.dest in (*LAUNCH_SETTINGS, "help"):
        raise UserError(f"{key}: unknown setting{parser.suggestion(f'--{key}')}")
    if action.default is None and value in ("", "~", "null"):
        return []
    if action.nargs == 0:
        if str(value).lower() not in SWITCHES:
            raise UserError(f"{key}: takes true or false, not {value}")
        return list(action.option_strings[SWITCHES[value.lower()] :][:1])
    if isinstance(value, str):
        return [f"--{key}={value}"]
    if isinstance(action, KeyValues) and isinstance(value, dict):
        return [f"--{key}", *(f"{name}={_literal(part)}" for name, part in value.items())]
    if action.nargs is None or isinstance(value, dict):
        raise UserError(f"{key}: takes {'a single value' if action.nargs is None else 'values'}, not {value}")
    return [f"--{key}", *map(str, value)]


def _literal(value: Any) -> str:
    """Write a value of a YAML mapping, made of text and lists, as a Python literal."""
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else str(value)


def write_recipe(path: Path, settings: dict[str, Any], what: str) -> None:
    """Write a run's settings as a recipe that repeats the run.

    Args:
        path: the file.
        settings: the settings.
        what: setting and value that name the file or its folder, for messages.

    Raises:
        UserError: the file cannot be written.
    """
    values = {name: value for name, value in settings.items() if name not in LAUNCH_SETTINGS}
    text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)  # tuples become lists
    write_output(path, lambda file: file.write(text.encode()), what)
