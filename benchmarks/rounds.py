"""Times of several calls, interleaved round by round, so that a drifting machine changes all of them alike."""

import gc
import math
import random
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from sepvit_lib.training.commands import first_line
from sepvit_lib.training.errors import out_of_memory
from sepvit_lib.training.measure import timed

MIN_SECONDS = 0.05  # of one timing: a call that is shorter is repeated
WARM_UP = 2  # calls before the first timing

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Times(Generic[Key]):
    """Times of calls.

    Attributes:
        seconds: seconds of each call, round by round; without the calls that failed.
        errors: why the others failed.
    """

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    errors: dict[Key, str] = field(default_factory=dict)


def interleave(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int, min_seconds: float = MIN_SECONDS
) -> Times[Key]:
    """Time calls in rounds. Each round times each call once, in another order.

    What a call leaves in the caches changes the next one's time, so each has to follow the others in turn.

    Args:
        calls: the calls. One that fails is skipped in the rounds that follow.
        device: the device they work on.
        rounds: number of rounds.
        min_seconds: seconds that one timing takes at least, by repeating the call.
    """
    times: Times[Key] = Times()
    repetitions: dict[Key, int] = {}
    for key, call in calls.items():
        with _caught(times.errors, key):
            repetitions[key] = _repetitions(call, device, min_seconds)
    order = list(repetitions)
    times.seconds = {key: [] for key in order}
    for number in range(rounds):
        gc.collect()
        for key in random.Random(number).sample(order, len(order)):
            if key not in times.errors:
                with _caught(times.errors, key):
                    times.seconds[key].append(_repeated(calls[key], repetitions[key], device))
    for key in times.errors:
        times.seconds.pop(key, None)
    return times


def _repetitions(call: Callable[[], object], device: torch.device, min_seconds: float) -> int:
    """Warm a call up, and find how often to repeat it."""
    for _ in range(WARM_UP):
        call()
    return max(1, math.ceil(min_seconds / max(timed(call, device), 1e-9)))


def _repeated(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call, as the mean of several."""

    def repeat() -> None:
        for _ in range(count):
            call()

    return timed(repeat, device) / count


@contextmanager
def _caught(errors: dict[Key, str], key: Key) -> Iterator[None]:
    """Record an error's text under a key, instead of raising it."""
    try:
        yield
    except Exception as error:
        errors[key] = reason(error)


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
