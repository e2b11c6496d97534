"""Makes the repository importable when a script of this folder is run by its path. Imported before other libraries."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sepvit_lib.training.environment  # noqa: F401 needs the path
