"""Optional packages of the tools: they are named when they are missing."""

import importlib.util
from pathlib import Path

from sepvit_lib.training.errors import UserError

REQUIREMENTS = "tools/requirements.txt"


def lacking(*modules: str, install: str = "") -> str:
    """Say which packages are missing and how to install them; "" if all are there.

    Args:
        *modules: names of the packages' modules.
        install: what pip installs; by default the missing packages alone.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return ""
    packages = f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
    return f"needs {packages}: pip install {install or ' '.join(map(_pinned, missing))}"


def require(what: str, *modules: str, install: str = "") -> None:
    """Refuse to go on without some packages.

    Args:
        what: what needs them, for messages.
        *modules: see `lacking`.
        install: likewise.

    Raises:
        UserError: names the missing ones, and how to install them.
    """
    if lack := lacking(*modules, install=install):
        raise UserError(f"{what}: {lack}")


def _pinned(module: str) -> str:
    """A package with the version that this project is tested with."""
    path = Path(__file__).resolve().parent.parent / REQUIREMENTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = (line.partition(";")[0].partition("#")[0].strip() for line in lines)
    return next((entry for entry in entries if entry.partition("==")[0] == module), module)
