"""Time several calls, interleaved in rounds, so that a drift in the machine's speed affects all of them equally."""

import gc
import math
import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sepvit_lib.common.command_line import first_line
from sepvit_lib.common.errors import out_of_memory
from sepvit_lib.count import timed

MIN_SECONDS = 0.05  # per timing: shorter calls are repeated
WARM_UP = 2  # calls before the first timing

Key = TypeVar("Key", bound=Hashable)


def interleave(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int, min_seconds: float = MIN_SECONDS
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Time calls in rounds. Each round times each call once, in a different order.

    A call's time depends on what the previous one left in the caches, so the order is shuffled in each round.

    Args:
        calls: the calls. A call that fails is skipped in later rounds.
        device: their device.
        rounds: number of rounds.
        min_seconds: minimum seconds per timing, reached by repeating the call.

    Returns:
        the seconds of each successful call in each round, and the reason for each failed call.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    errors: dict[Key, str] = {}
    repetitions: dict[Key, int] = {}
    for number in range(-1, rounds):
        gc.collect()
        keys = list(seconds)  # in the given order in the warm-up round
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
    """Warm up a call, and find how often to repeat it per timing."""
    for _ in range(WARM_UP):
        call()
    return max(1, math.ceil(min_seconds / max(timed(call, device), 1e-9)))


def _repeated(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call, as the mean of several."""
    return timed(lambda: [call() for _ in range(count)], device) / count


def reason(error: Exception) -> str:
    """Describe an error in one line."""
    if out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)}"[:200]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest value of a measurement over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the spread of values, one per round."""
        return cls(statistics.median(values), min(values), max(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios of two measurements, computed round by round."""
    return Spread.of([a / b for a, b in zip(numerators, denominators)])
