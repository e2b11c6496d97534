"""Check the Python version before minutes of installing. A problem is reported in one line.

python tools/check_setup.py
"""

# Has to run on every Python that it refuses, hence the old-fashioned code.
from __future__ import print_function

import sys

OLDEST, NEWEST = (3, 10), (3, 12)


def problem():  # type: () -> str | None
    """Describe the problem in one line; None if there is none."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        return "Python %d.%d (%s) is not supported: use 3.10 to 3.12, e.g. PYTHON=python3.11 (and a new VENV)" % (
            version + (sys.executable,)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "%s has no venv module: install it (Debian: apt install python3-venv)" % sys.executable
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        print(found, file=sys.stderr)
        sys.exit(2)
