"""Make the repository importable in scripts that are run by path. They import this module before other libraries."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sepvit_lib.common.environment  # noqa: F401 needs the path set above
