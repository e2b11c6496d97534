"""Set environment variables for users without an entry in /etc/passwd, or without a writable home folder.

This is common in containers.

Every command imports this module before timm and matplotlib, which look up the user's name and home folder.
"""

import getpass
import os
import tempfile
from pathlib import Path

try:
    getpass.getuser()
except (KeyError, OSError):  # OSError from Python 3.13 on
    os.environ["USER"] = f"uid{os.getuid()}"
folder = Path(tempfile.gettempdir(), f"home-{getpass.getuser()}")
try:
    home = Path.home()
except RuntimeError:
    os.environ["HOME"] = str(folder)
else:
    if not os.access(home, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))  # otherwise matplotlib warns
