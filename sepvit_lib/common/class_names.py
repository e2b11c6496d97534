"""Match the class names of a data set with those of a network."""

import unicodedata
from collections.abc import Sequence

from timm.data.readers.class_map import load_class_map

from sepvit_lib.common.errors import UserError, setting

MAX_NAMES = 5  # listed in a message


def canonical(name: str) -> str:
    """Return a name in composed Unicode form (NFC). Archives unpacked on a Mac may yield decomposed names (NFD)."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[str]) -> str:
    """Join at most `MAX_NAMES` names for a message."""
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


def order_of(held: Sequence[str], names: Sequence[str], what: str, data: str, way_out: str) -> list[int] | None:
    """Match the class names of a data set with those of a network.

    Args:
        held: names of the network's classes, in the order of its outputs.
        names: names of the data set's classes, in the order of its labels.
        what: the network, for messages.
        data: the data set, for messages.
        way_out: what the user can do if the names differ, for messages.

    Returns:
        the network's output index for each label; None if labels and outputs are in the same order.

    Raises:
        UserError: the names differ.
    """
    held, names = [canonical(name) for name in held], [canonical(name) for name in names]
    if held == names:
        return None
    outputs = {name: index for index, name in enumerate(held)}
    differing = [name for name in names if name not in outputs] + sorted(set(held) - set(names), key=held.index)
    if differing or len(held) != len(names):
        raise UserError(
            f"{what}: was trained on different classes than {data}: {len(differing)} names differ "
            f"({listed(differing)}); {way_out}"
        )
    return [outputs[name] for name in names]


def read_class_map(path: str, names: Sequence[str], data: str) -> tuple[list[str], list[int]]:
    """Read a class map of timm's format: a text file with one class name per line, or a pickled dict of class numbers.

    Args:
        path: the file.
        names: names of the data set's classes, in the order of its labels.
        data: the data set, for messages.

    Returns:
        the names in the order of their numbers, and the number of each of the data set's classes.

    Raises:
        UserError: the file cannot be read, does not number its names consecutively from 0, or lacks a class of the
            data set.
    """
    what = setting("class_map", path)
    try:
        numbers = {canonical(name): number for name, number in load_class_map(path).items()}
        ordered = sorted(numbers, key=lambda name: numbers[name])
    except (OSError, ValueError, TypeError, AssertionError, AttributeError, EOFError) as error:
        raise UserError(f"{what}: not a class map ({error}); write one class name per line") from None
    if [numbers[name] for name in ordered] != list(range(len(numbers))):
        raise UserError(f"{what}: does not number its classes from 0 on; write each name once, without blank lines")
    if missing := [name for name in map(canonical, names) if name not in numbers]:
        raise UserError(f"{what}: lacks {len(missing)} classes of {data} ({listed(missing)}); add them")
    return ordered, [numbers[canonical(name)] for name in names]


def check_map(path: str, names: Sequence[str], held: Sequence[str], what: str) -> None:
    """Refuse a class map whose class numbers differ from a network's output indices.

    Args:
        path: the class map.
        names: the names in the class map, in the order of their numbers.
        held: names of the network's classes, in the order of its outputs.
        what: the network, for messages.

    Raises:
        UserError: a class's number differs from its output index.
    """
    outputs = {canonical(name): index for index, name in enumerate(held)}
    for number, name in enumerate(map(canonical, names)):
        if outputs.get(name, number) != number:
            raise UserError(
                f"{setting('class_map', path)}: assigns number {number} to {name}, but {what} assigns {outputs[name]}; "
                "list the names in the network's order"
            )
