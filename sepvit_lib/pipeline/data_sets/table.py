"""Images listed in a CSV or TSV file."""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sepvit_lib.common.class_names import canonical, listed
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.data_sets.base import ImageFiles

DELIMITERS = ",;\t"
SEPARATOR = "|"  # between the labels of an image
TRIED = 100  # images whose folder is looked for
TRAIN, VAL = "train", "val"
SPLIT_NAMES = dict(train=TRAIN, training=TRAIN, val=VAL, valid=VAL, validation=VAL)
ALL = "all"  # name for the images of all splits


def split_name(name: str) -> str:
    """Return the name of a split as in `Table.splits`."""
    return SPLIT_NAMES.get(name.lower(), name)


class Table(ImageFiles):
    """Images and labels in the rows of a table. Labels are texts; classes are sorted by name.

    In a multi-label table, a cell has any number of labels, separated by `SEPARATOR`, and an image may have several
    rows with different labels. Missing image files are found when they are read, like unreadable ones.

    Args:
        file: the table, in UTF-8, with commas, semicolons or tabs between the columns.
        folder: folder that relative paths start from, unless they start from the table's own folder.
        columns: names of the columns, for 'path', 'label', 'split', 'group' and 'weight'. The last three may be
            missing.
        what: setting and value that name the table, for messages.
        multi_label: whether an image may have several labels, or none.

    Attributes:
        splits: split of each image; "" without such a column.
        groups: group of each image; its path without such a column.

    Raises:
        UserError: the table is not readable, lacks a column, a label or a path, has two different rows for a path, or a
            weight that is not a non-negative number.
    """

    def __init__(
        self, file: Path, folder: Path, columns: Mapping[str, str], what: str, multi_label: bool = False
    ) -> None:
        self.skipped, self.what = Counter(), what
        rows: dict[str, tuple[dict[str, str], int]] = {}
        labels: defaultdict[str, set[str]] = defaultdict(set)
        for number, row in self._rows(file, columns):
            row |= dict(label=canonical(row["label"]), split=split_name(row["split"]))
            texts = row["label"].split(SEPARATOR) if multi_label else [row["label"]]
            own = {text.strip() for text in texts} - {""}
            if not row["path"] or not (own or multi_label):
                raise UserError(f"{what}, line {number}: no {columns['label' if row['path'] else 'path']}")
            labels[row["path"]] |= own
            row["label"] = "" if multi_label else row["label"]  # the labels of an image may be in several rows
            before, first = rows.setdefault(row["path"], (row, number))
            if before != row:
                differing = next(f"{before[name]} and {row[name]}" for name in row if before[name] != row[name])
                raise UserError(f"{what}, lines {first} and {number}: {row['path']} is {differing}; remove one")
        self.splits = [row["split"] for row, _ in rows.values()]
        self.groups = [row["group"] or path for path, (row, _) in rows.items()]
        if any(row["weight"] for row, _ in rows.values()):
            self.weights = [self._weight(*row) for row in rows.values()]
        self.classes = sorted(set().union(*labels.values()))
        numbers = {label: index for index, label in enumerate(self.classes)}
        tried = list(labels)[:TRIED]
        found = {root: sum((root / path).is_file() for path in tried) for root in (file.parent, folder)}
        root = max(found, key=lambda root: found[root])
        if not found[root]:
            raise UserError(f"{what}: {' and '.join(map(str, found))} lack {listed(tried)}; set {setting('data_path')}")
        self.root, self.samples = str(root), []
        for path, own in labels.items():
            label = tuple(sorted(numbers[text] for text in own))
            self.samples.append((str(root / path), label if multi_label else label[0]))

    def _weight(self, row: Mapping[str, str], line: int) -> float:
        text = row["weight"] or ("1" if row["split"] == VAL else "")
        with suppress(ValueError):
            if 0 <= float(text) < math.inf:
                return float(text)
        raise UserError(f"{self.what}, line {line}: weight {text or 'missing'}; must be a non-negative number")

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only some of the images."""
        super().keep(indices)
        self.splits, self.groups = ([values[index] for index in indices] for values in (self.splits, self.groups))

    def _rows(self, file: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield each row's line and its values, "" for missing ones."""
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                header = lines.readline()
                delimiter = max(DELIMITERS, key=header.count)
                names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
                for key, name in columns.items():  # columns of splits and groups with the default name may be missing
                    if name not in names and (key in ("path", "label") or name not in ("", key)):
                        way_out = f"name it with {setting(f'{key}_column')}"
                        raise UserError(f"{self.what}: no column {name}, but {listed(names)}; {way_out}")
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                for row in filter(None, reader):
                    number = reader.line_num + 1
                    if len(row) > len(names):
                        raise UserError(f"{self.what}, line {number}: {len(row)} values, {len(names)} columns")
                    values = {name: value.strip() for name, value in zip(names, row) if name}
                    yield number, {key: values.get(name, "") for key, name in columns.items()}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.what}: cannot be read as CSV in UTF-8 ({error})") from None
