"""Classes are compared by name: a network's with a data set's."""

import unicodedata
from collections.abc import Sequence

from training.errors import UserError

MAX_NAMES = 5  # in a message


def canonical(name: str) -> str:
    """Composed Unicode form of a name (NFC): names that were unpacked on a Mac are decomposed."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[str]) -> str:
    """List names for a message. Of many, only the first are shown."""
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


def order_of(held: Sequence[str], names: Sequence[str], what: str, data: str, way_out: str) -> list[int] | None:
    """Match the classes of a data set with those of a network by name.

    Args:
        held: names of the network's classes, in the order of its outputs.
        names: names of the data set's classes, in the order of its labels.
        what: the network, for messages.
        data: the data set, for messages.
        way_out: the way out, for messages.

    Returns:
        the network's output of each label; None if labels and outputs are in the same order.

    Raises:
        UserError: names differ.
    """
    held, names = [canonical(name) for name in held], [canonical(name) for name in names]
    if held == names:
        return None
    outputs = {name: index for index, name in enumerate(held)}
    differing = [name for name in names if name not in outputs] + sorted(set(held) - set(names), key=held.index)
    if differing or len(held) != len(names):
        raise UserError(
            f"{what}: was trained on classes with different names than {data}: {len(differing)} differ "
            f"({listed(differing)}); {way_out}"
        )
    return [outputs[name] for name in names]
