"""Optional packages: they are named when they are missing, with the extra of pyproject.toml that installs them."""

import importlib.util
import sys
from pathlib import Path

from sepvit_lib.training.errors import USER_ERROR_STATUS, UserError


def lacking(*modules: str, extra: str = "tools") -> str:
    """Say which modules are missing and how to install them, from the repository's folder; "" if all are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"needs {', '.join(missing)}: pip install '.[{extra}]'" if missing else ""


def require(what: str, *modules: str, extra: str = "tools") -> None:
    """Refuse to go on without some modules. See `lacking`.

    Args:
        what: what needs them, for messages.
        *modules: their names.
        extra: the extra that installs them.

    Raises:
        UserError: names the missing ones, and how to install them.
    """
    if lack := lacking(*modules, extra=extra):
        raise UserError(f"{what}: {lack}")


def require_or_exit(*modules: str, extra: str) -> None:
    """End the running script without some modules, before it imports them. See `lacking`."""
    if lack := lacking(*modules, extra=extra):
        print(f"{Path(sys.argv[0]).name}: {lack}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
