"""Check the Python version and the compiler before minutes of installing. A problem is reported in one line.

python tools/check_setup.py [--compiler]
"""

# Has to run on every Python that it refuses, hence the old-fashioned code.
from __future__ import print_function

import os
import shutil
import sys

OLDEST, NEWEST = (3, 10), (3, 12)


def problem(needs_compiler):  # type: (bool) -> str | None
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
    if needs_compiler:
        import sysconfig

        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            return "no C++ compiler: mmcv's operators need one, install it (Debian: apt install g++) or set CXX"
        if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
            return "no Python.h for %s: install its headers (Debian: apt install python3-dev)" % sys.executable
    return None


if __name__ == "__main__":
    found = problem("--compiler" in sys.argv[1:])
    if found:
        print(found, file=sys.stderr)
        sys.exit(2)
