"""Makes the repository importable when a script of this folder is run by its path: `python FOLDER/SCRIPT.py`.

Scripts import it before other libraries.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sepvit_lib.training.environment  # noqa: F401 needs the path

# isort: split
from sepvit_lib.inference.packages import require_or_exit

require_or_exit("mmengine", "mmcv", "mmseg", extra="mm")
