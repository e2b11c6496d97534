"""Console output. Library messages that are noise to users go to the log file only, or are dropped."""

import contextlib
import importlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from tqdm import tqdm

from sepvit_lib.common.processes import is_main_process

# Lines that libraries print or log on every run.
NOISE = (
    r"Could not import OneDL",  # from mmseg: an optional data format
    r"Line NMS is not compiled\.",  # from mmdet: only needed for lane detection
    r'"FileClient" will be deprecated',  # from mmengine, about its own code
    r'"HardDiskBackend" is the alias',
    r"The prefix is not set in metric class",  # from mmengine, about IoUMetric
    r"(loading annotations into memory|creating index|index created|Done \(t=|Loading and preparing results|DONE \(t=)",
)
WARNINGS = (
    r"Fail to import ``MultiScaleDeformableAttention``",
    r"Default ``avg_non_ignore`` is False",
    r"faster_coco_eval is not installed",
    r"The draw is False, it means that the hook for visualization will not take effect",
    r"Setting (OMP|MKL)_NUM_THREADS environment variable",
    r"Grad strides do not match bucket view strides",  # from DistributedDataParallel, for some layer shapes
)
noise = re.compile("|".join(NOISE))


class ConsoleFilter(logging.Filter):
    """Hide noise, and on request records of low levels, on the console. Log files get every record.

    Attributes:
        level: records below this level are dropped, even if they are not noise.
    """

    level = logging.NOTSET

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print a record."""
        return record.levelno >= self.level and not noise.match(record.getMessage())

    def attach(self, logger: logging.Logger) -> None:
        """Filter a logger's console output. Idempotent."""
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(self)


console = ConsoleFilter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide messages below WARNING from mmengine's current logger on the console."""
    console.attach(MMLogger.get_current_instance())
    before, console.level = console.level, logging.WARNING
    try:
        yield
    finally:
        console.level = before


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Drop noise that is printed to standard output inside the context."""
    MMLogger.get_current_instance()  # a logger created inside would keep the redirected output
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not noise.match(line)))


def import_quietly(*names: str) -> None:
    """Import modules without their noise."""
    warnings.filterwarnings("ignore", message="|".join(WARNINGS))
    # Warns of torchao, which transformers imports if it is installed, as ExecuTorch requires.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with without_noise():
        for name in names:
            importlib.import_module(name)


def progress_bar(total: int, title: str) -> tqdm:
    """Make a progress bar, shown only by the main process on a terminal.

    Args:
        total: number of steps.
        title: label shown before the bar.
    """
    layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    shown = is_main_process() and sys.stdout.isatty()
    return tqdm(total=total, desc=title, bar_format=layout, file=sys.stdout, dynamic_ncols=True, disable=not shown)


def log_files() -> list[Path]:
    """Return the absolute paths of the files that mmengine's current logger writes."""
    handlers = MMLogger.get_current_instance().handlers
    return [Path(handler.baseFilename) for handler in handlers if isinstance(handler, logging.FileHandler)]


class TestProgressHook(Hook):
    """Show a test's progress: a bar on a terminal, mmengine's regular lines elsewhere."""

    bar: tqdm

    def before_test_epoch(self, runner: Any) -> None:
        """Show the bar, and hide regular log messages on the console."""
        self.bar = progress_bar(len(runner.test_dataloader), "test")
        if not self.bar.disable:
            console.level = logging.WARNING

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance the bar, and close it after the last batch."""
        self.bar.update()
        if batch_idx + 1 == self.bar.total:
            self.bar.close()
            console.level = logging.NOTSET
