"""Report missing optional packages, and the extra in pyproject.toml that installs them."""

import importlib.util
import sys
from pathlib import Path

from sepvit_lib.common.errors import USER_ERROR_STATUS, UserError


def lacking(*modules: str, extra: str = "tools") -> str:
    """Return which modules are missing and the command that installs them; "" if none are missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    where = ", in an environment of its own" if extra == "litert" else ""
    return f"needs {', '.join(missing)}: pip install '.[{extra}]'{where}" if missing else ""


def require(what: str, *modules: str, extra: str = "tools") -> None:
    """Raise an error if modules are missing. See `lacking`.

    Args:
        what: what needs the modules, for messages.
        *modules: names of the modules.
        extra: the extra that installs the modules.

    Raises:
        UserError: modules are missing.
    """
    if problem := lacking(*modules, extra=extra):
        raise UserError(f"{what}: {problem}")


def require_or_exit(*modules: str, extra: str) -> None:
    """Exit the running script if modules are missing, before it imports them. See `lacking`."""
    if problem := lacking(*modules, extra=extra):
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
