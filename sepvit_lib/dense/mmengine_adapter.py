"""Private and undocumented parts of mmengine (onedl-mmengine 0.10.x), used here and nowhere else.

`tests/test_private_parts_dense.py` exercises each of them, and fails if a library changes.
"""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from mmengine.utils import is_installed

from sepvit_lib.dense.console import quiet
from sepvit_lib.training import checkpoints


def register_distributions() -> None:
    """Tell mmengine the distributions that contain mmseg and mmdet.

    mmengine finds the configs of `mmseg::…` and `mmdet::…` by the name of the distribution. It knows the original
    names, not those of the maintained `onedl` releases.
    """
    for module, distribution in (("mmseg", "onedl-mmsegmentation"), ("mmdet", "onedl-mmdetection")):
        if is_installed(distribution):
            MODULE2PACKAGE[module] = distribution


def log_statistic(owner: type, name: str) -> Any:
    """Replacement for `getattr` in checkpoints, where mmengine's log refers to methods of `HistoryBuffer`.

    Raises:
        pickle.UnpicklingError: anything else is requested.
    """
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name}")


# Besides tensors, checkpoints of mmengine contain its log, made of NumPy's arrays and numbers. None of it can run code.
LOG_CLASSES = (HistoryBuffer, (log_statistic, "builtins.getattr"), *checkpoints.NUMPY_CLASSES)


def read_checkpoint(path: str, what: str) -> dict[str, Any]:
    """Read a checkpoint of mmengine or main.py without running any code it contains.

    Args:
        path: path or https address.
        what: flag and path, for messages.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or contains code.
    """
    return checkpoints.read_checkpoint(path, what, LOG_CLASSES)


def mark_loaded(runner: Any) -> None:
    """Tell a runner that its checkpoint is loaded, as its own `load_checkpoint` does, so that it loads no other."""
    runner._has_loaded = True


class QuietRunner(Runner):
    """Runner that does not print what would mislead.

    mmengine asks the C++ compiler for its version, by a shell that prints an error if there is no compiler. And it
    initialises weights that a checkpoint replaces.
    """

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        with _without_stderr():
            super()._log_env(env_cfg)

    def _init_model_weights(self) -> None:
        with quiet(self.logger, logging.ERROR) if self._load_from else contextlib.nullcontext():
            super()._init_model_weights()


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what this process and those that it starts print to standard error."""
    printed, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(printed, 2)
        os.close(printed)
        os.close(nowhere)
