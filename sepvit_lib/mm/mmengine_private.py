"""Private and undocumented parts of mmengine (onedl-mmengine 0.10.x). Only this module uses them.

`tests/commands/test_private_parts_dense.py` exercises each of them, and fails if a library changes.
"""

import pickle
from functools import cache
from typing import Any

from mmengine.config import utils as config_utils
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.utils import is_installed

from sepvit_lib.run import checkpoints


def register_distributions() -> None:
    """Register the names of the installed packages of mmseg and mmdet with mmengine.

    mmengine needs these names to find the configs of `mmseg::…` and `mmdet::…`. It knows only the names of the original
    packages, not those of the maintained `onedl` packages.
    """
    if not hasattr(config_utils.load, "cache_info"):
        config_utils.load = cache(config_utils.load)  # otherwise a hundred YAML files are read for each base config
    for module, distribution in (("mmseg", "onedl-mmsegmentation"), ("mmdet", "onedl-mmdetection")):
        if is_installed(distribution):
            MODULE2PACKAGE[module] = distribution


def log_statistic(owner: type, name: str) -> Any:
    """Restricted `getattr` for unpickling checkpoints: the log in them refers to methods of `HistoryBuffer`.

    Raises:
        pickle.UnpicklingError: anything else is requested.
    """
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name}")


# Besides tensors, checkpoints of mmengine contain its log: NumPy arrays and numbers. These classes cannot run code.
LOG_CLASSES = (HistoryBuffer, (log_statistic, "builtins.getattr"), *checkpoints.NUMPY_CLASSES)


def read_checkpoint(path: str, what: str) -> dict[str, Any]:
    """Read a checkpoint of mmengine or main.py without running any code it contains.

    Args:
        path: path or https URL.
        what: flag and path of the checkpoint, for messages.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or contains code.
    """
    return checkpoints.read_checkpoint(path, what, LOG_CLASSES)
