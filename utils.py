"""Random numbers derived from the seed, and progress reports. Imports nothing else of this project."""

import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Random numbers
# ----------------------------------------------------------------------------------------------------------------------


class Stream(IntEnum):
    """Uses of random numbers.

    No generator's state is saved. Random numbers are derived from the seed, their use, and the place in the run where
    they are drawn. A resumed run draws the same ones, also with another number of processes or workers.
    """

    WEIGHTS = 0
    SHUFFLE = 1
    AUGMENTATION = 2
    REPLACEMENT = 3
    STEP = 4


def derived_seed(*numbers: int) -> int:
    """Derive a 32-bit seed from several numbers, such as a stream, the run's seed and an epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices) with a seed derived from several numbers."""
    seed_cpu(*numbers)
    torch.manual_seed(derived_seed(*numbers))


def seed_cpu(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and torch's CPU, for one sample. Seeding all devices takes 0.1 ms longer."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Progress
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Iterate over batches and report progress: a bar on a terminal, regular lines elsewhere.

    Args:
        batches: the batches.
        title: starts each line.
        every: batches between two reports. Values on a GPU are read only for reports.
        total: number of batches, including those done before; 0 if unknown.
        done: number of batches done before, in a resumed epoch.
        later: number of epochs after this one, to estimate the time left of the run.
        print_line: prints a line; None on ranks that do not report.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        title: str,
        every: int,
        total: int,
        done: int = 0,
        later: int = 0,
        print_line: Callable[[str], None] | None = print,
    ) -> None:
        self.batches = batches
        self.title = title
        self.every = every
        self.later = later
        self.total = total
        self.images = 0
        self.done = self.before = done
        self.start = time.perf_counter()
        self.print_line = print_line
        self.bar: tqdm | None = None
        if print_line is not None and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(
                total=self.total or None,
                initial=done,
                desc=title,
                bar_format=layout,
                file=sys.stdout,
                dynamic_ncols=True,
            )

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
        """Count a batch of `images` images (of all ranks). Returns whether a report is due."""
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
        elif self.print_line is not None:
            place = f"{self.done:{len(str(self.total))}}/{self.total}" if self.total else str(self.done)
            self.print_line(f"{self.title} [{place}] {text}")
