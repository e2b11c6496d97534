"""Make the repository importable when a script in this folder is run by its path: `python FOLDER/SCRIPT.py`.

Scripts import this module before other libraries.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sepvit_lib.common.environment  # noqa: F401 needs the path set above

# isort: split
from sepvit_lib.common.packages import require_or_exit

require_or_exit("mmengine", "mmcv", "mmseg", extra="mm")
