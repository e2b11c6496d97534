"""Makes the repository importable when a script of this folder is run by its path: `python FOLDER/SCRIPT.py`.

Scripts import it before other libraries, which look for mmcv's operators when they are imported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sepvit_lib.training.environment

# isort: split
from sepvit_lib.inference.packages import require_or_exit

require_or_exit("mmengine", "mmcv", "mmdet", extra="mm")
import sepvit_lib.dense  # noqa: E402, F401 offers the operators
