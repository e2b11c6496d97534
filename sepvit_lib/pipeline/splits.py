"""Split images into training and validation images: stratified by class, with whole groups."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

from sepvit_lib.pipeline.data_sets.base import Label, classes_of


def validation_part(labels: Sequence[Label], groups: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Choose the images for validation. The choice depends only on the arguments, not on the machine.

    Groups are taken in an order that the seed determines, each if most of its labels are of classes that still lack
    validation images. Then each class without any validation image gets its smallest group. A class that is in a single
    group stays in training. Images without labels count as a class.

    Args:
        labels: class or classes of each image.
        groups: group of each image, such as a patient; images of a group stay together.
        fraction: share of each class for validation.
        seed: seed of the order.

    Returns:
        whether each image is for validation.
    """
    members: defaultdict[str, Counter[int]] = defaultdict(Counter)
    totals = Counter[int]()
    for label, group in zip(labels, groups):
        members[group].update(classes_of(label) or (-1,))
        totals.update(classes_of(label) or (-1,))
    left = Counter(label for counts in members.values() for label in counts)
    wanted = Counter({label: max(1, round(fraction * count)) for label, count in totals.items()})
    chosen = set()

    def choose(group: str) -> None:
        if all(left[label] > 1 for label in members[group]):
            chosen.add(group)
            wanted.subtract(members[group])
            left.subtract(members[group].keys())

    order = sorted(members, key=lambda group: hashlib.sha256(os.fsencode(f"{seed}\0{group}")).digest())
    for group in order:
        gain = sum(min(count, max(0, wanted[label])) for label, count in members[group].items())
        if 2 * gain > members[group].total():
            choose(group)
    missing = totals.keys() - {label for group in chosen for label in members[group]}
    holders = {label: list[str]() for label in sorted(missing)}
    for group in sorted(order, key=lambda group: members[group].total()):
        for label in members[group].keys() & missing:
            holders[label].append(group)
    for candidates in holders.values():
        for group in candidates:
            if chosen.isdisjoint(candidates):
                choose(group)
    return [group in chosen for group in groups]
