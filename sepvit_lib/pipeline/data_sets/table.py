"""Images listed in a CSV or TSV file."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from sepvit_lib.common.class_names import canonical, listed
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.data_sets.base import ImageFiles

DELIMITERS = ",;\t"
TRIED = 100  # images whose folder is looked for
TRAIN, VAL = "train", "val"
SPLIT_NAMES = {"training": TRAIN, "valid": VAL, "validation": VAL}  # other names of splits


class Table(ImageFiles):
    """Images and labels in the rows of a table. Labels are texts; classes are sorted by name.

    Missing image files are found when they are read, like unreadable ones.

    Args:
        file: the table, in UTF-8, with commas, semicolons or tabs between the columns.
        folder: folder that relative paths start from, unless they start from the table's own folder.
        columns: names of the columns, for 'path', 'label', 'split' and 'group'. The last two may be missing.
        what: setting and value that name the table, for messages.

    Attributes:
        splits: split of each image; "" without such a column.
        groups: group of each image; its path without such a column.

    Raises:
        UserError: the table is not readable, lacks a column, a label or a path, or has a path with two labels.
    """

    def __init__(self, file: Path, folder: Path, columns: Mapping[str, str], what: str) -> None:
        self.skipped, self.what = Counter(), what
        labels: dict[str, tuple[str, int]] = {}
        self.splits, self.groups = [], []
        for number, row in self._rows(file, columns):
            path, label = row["path"], canonical(row["label"])
            if not path or not label:
                raise UserError(f"{what}, line {number}: no {columns['label'] if path else columns['path']}")
            before, first = labels.setdefault(path, (label, number))
            if before != label:
                raise UserError(f"{what}, line {number}: {path} is {label}, but {before} in line {first}; correct one")
            if first == number:
                self.splits.append(SPLIT_NAMES.get(row["split"].lower(), row["split"]))
                self.groups.append(row["group"] or path)
        self.classes = sorted({label for label, _ in labels.values()})
        numbers = {label: index for index, label in enumerate(self.classes)}
        tried = list(labels)[:TRIED]
        found = {root: sum((root / path).is_file() for path in tried) for root in (file.parent, folder)}
        root = max(found, key=lambda root: found[root])
        if not found[root]:
            raise UserError(f"{what}: {' and '.join(map(str, found))} lack {listed(tried)}; set {setting('data_path')}")
        self.root = str(root)
        self.samples = [(str(root / path), numbers[label]) for path, (label, _) in labels.items()]

    def _rows(self, file: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield each row's line and its values, "" for missing ones."""
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                header = lines.readline()
                delimiter = max(DELIMITERS, key=header.count)
                names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
                for column in ("path", "label"):
                    if columns[column] not in names:
                        way_out = f"name it with {setting(f'{column}_column')}"
                        raise UserError(f"{self.what}: no column {columns[column]}, but {listed(names)}; {way_out}")
                rows = csv.DictReader(lines, names, delimiter=delimiter, strict=True)
                for row in rows:
                    yield rows.line_num + 1, {key: (row.get(name) or "").strip() for key, name in columns.items()}
        except OSError as error:
            raise UserError(f"{self.what}: cannot be read ({error.strerror})") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.what}: not a table in UTF-8 ({error}); save it as CSV") from None
