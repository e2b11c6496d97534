"""A hook that stops a run in its validation, for configs: if STOP_IN_VALIDATION is set, by SIGTERM to itself."""

import os
import signal
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StopInValidation(Hook):
    """Stop before the second batch."""

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Send the signal."""
        if os.environ.get("STOP_IN_VALIDATION") and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
