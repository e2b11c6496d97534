"""Weights of classes in a loss."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sepvit_lib.common.class_names import canonical, listed
from sepvit_lib.common.errors import UserError, setting

BALANCED = "balanced"


def class_weights(choice: str, count: Callable[[], Mapping[int, int] | None], names: Sequence[str]) -> list[float]:
    """Weight of each class: N / (K · n) for n of N examples in one of K classes, or from a file.

    Args:
        choice: 'balanced', or a JSON file with an object of class names and weights.
        count: counts the examples of each class; returns None if unknown. A class without examples has weight 1.
        names: names of the classes.

    Raises:
        UserError: the numbers of examples are unknown, or the file does not have a positive weight for each class.
    """
    what = setting("class_weights", choice)
    if choice == BALANCED:
        if (counts := count()) is None:
            raise UserError(f"{what}: the numbers of images are unknown before reading them; pass a file of weights")
        total = sum(counts.values())
        return [total / (len(names) * counts[number]) if counts.get(number) else 1.0 for number in range(len(names))]
    return read_class_values(choice, names, what)


def read_class_values(path: str, names: Sequence[str], what: str) -> list[float]:
    """Read a positive number for each class from a JSON file with an object of class names and numbers.

    Args:
        path: the file.
        names: names of the classes.
        what: setting and value that name the file, for messages.

    Raises:
        UserError: the file cannot be read, or does not have a positive number for each class.
    """
    try:
        values = {canonical(name): float(value) for name, value in json.loads(Path(path).read_text("utf-8")).items()}
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UserError(f'{what}: cannot be read as JSON such as {{"cat": 1, "dog": 2.5}} ({error})') from None
    wrong = [name for name in map(canonical, names) if not 0 < values.get(name, 0) < math.inf]
    if wrong or len(values) != len(names):
        problem = f"no positive number for {listed(wrong)}" if wrong else f"{len(values)} numbers"
        raise UserError(f"{what}: {problem}; the {len(names)} classes are {listed(names)}")
    return [values[canonical(name)] for name in names]
