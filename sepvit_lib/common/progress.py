"""Report the progress of a loop over batches: in a bar on a terminal, in regular lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from sepvit_lib.common.processes import is_main_process, print_line


@dataclass
class Progress:
    """Iterate over batches and report progress on rank 0: in a bar on a terminal, in regular lines elsewhere.

    Args:
        batches: the batches.
        title: the start of each line.
        every: number of batches between reports. Reading a value from a GPU at every batch would slow the loop.
        total: number of batches in the whole loop; 0 if unknown.
        done: number of batches that were already done when the run resumed in this loop.
        later: number of epochs after this one, to estimate the run's remaining time.
        quietly: report nothing.
    """

    batches: Iterable[Any]
    title: str
    every: int
    total: int
    done: int = 0
    later: int = 0
    quietly: bool = False

    def __post_init__(self) -> None:
        self.images, self.before, self.start = 0, self.done, time.perf_counter()
        self.reports = is_main_process() and not self.quietly
        self.bar: tqdm | None = None
        if self.reports and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            settings: dict[str, Any] = dict(bar_format=layout, file=sys.stdout, dynamic_ncols=True)
            self.bar = tqdm(desc=self.title, total=self.total or None, initial=self.done, **settings)

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches:
                yield batch
                if self.bar is not None:
                    self.bar.update()
        finally:
            if self.bar is not None:
                self.bar.close()

    def advance(self, images: int) -> bool:
        """Count a batch as done. `images` is its number of images on all ranks. Returns whether a report is due."""
        self.done += 1
        self.images += images
        return self.done % self.every == 0 or self.done == self.total

    def report(self, **values: str) -> None:
        """Show values, the speed so far and the time left."""
        seconds = time.perf_counter() - self.start
        pace = seconds / (self.done - self.before)
        left = max(0.0, pace * (self.total - self.done))
        values["images/s"] = f"{self.images / seconds:.1f}"
        if self.bar is None and self.total:
            values["left"] = str(timedelta(seconds=round(left)))
        if self.later:
            values["run left"] = str(timedelta(seconds=round(left + self.later * pace * self.total)))
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.reports:
            position = f"{self.done:{len(str(self.total))}}/{self.total}" if self.total else str(self.done)
            print_line(f"{self.title} [{position}] {text}")
