"""Check the Python version and its venv module before a long installation. A problem is reported in one line.

python tools/check_setup.py
"""

# This script must run on the Python versions that it rejects, so it avoids newer syntax.
from __future__ import print_function

import sys

OLDEST = (3, 11)
NEWEST = (3, 14)  # newest tested version


def problem():  # type: () -> str | None
    """Describe the problem in one line; None if there is none."""
    if sys.version_info[:2] < OLDEST:
        version = "%d.%d" % sys.version_info[:2]
        return "Python %s (%s) is too old: use 3.11 or later, e.g. PYTHON=python3.13" % (version, sys.executable)
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
    if sys.version_info[:2] > NEWEST:
        print("warning: Python %d.%d is newer than the tested 3.11 to 3.14" % sys.version_info[:2], file=sys.stderr)
