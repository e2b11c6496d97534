"""Times of several calls, interleaved round by round, so that a drifting machine changes all of them alike."""

import gc
import math
import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sepvit_lib.training.commands import first_line
from sepvit_lib.training.errors import out_of_memory
from sepvit_lib.training.measure import timed

MIN_SECONDS = 0.05  # of one timing: a call that is shorter is repeated
WARM_UP = 2  # calls before the first timing

Key = TypeVar("Key", bound=Hashable)


def interleave(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int, min_seconds: float = MIN_SECONDS
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Time calls in rounds. Each round times each call once, in another order.

    What a call leaves in the caches changes the next one's time, so each has to follow the others in turn.

    Args:
        calls: the calls. One that fails is skipped in the rounds that follow.
        device: the device they work on.
        rounds: number of rounds.
        min_seconds: seconds that one timing takes at least, by repeating the call.

    Returns:
        seconds of each call, round by round, and why the other calls failed.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    errors: dict[Key, str] = {}
    repetitions: dict[Key, int] = {}
    for number in range(-1, rounds):
        gc.collect()
        keys = list(seconds)  # the first time, to warm them up, in the order given
        for key in keys if number < 0 else random.Random(number).sample(keys, len(keys)):
            try:
                if number < 0:
                    repetitions[key] = _repetitions(calls[key], device, min_seconds)
                else:
                    seconds[key].append(_repeated(calls[key], repetitions[key], device))
            except Exception as error:
                errors[key] = reason(error)
                del seconds[key]
    return seconds, errors


def _repetitions(call: Callable[[], object], device: torch.device, min_seconds: float) -> int:
    """Warm a call up, and find how often to repeat it."""
    for _ in range(WARM_UP):
        call()
    return max(1, math.ceil(min_seconds / max(timed(call, device), 1e-9)))


def _repeated(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call, as the mean of several."""
    return timed(lambda: [call() for _ in range(count)], device) / count


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)}"[:200]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of values, one a round."""
        return cls(statistics.median(values), min(values), max(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the rounds' ratios."""
    return Spread.of([a / b for a, b in zip(numerators, denominators)])
