"""The benchmark's record of one machine: its tables as text, JSON, Markdown and a picture."""

import importlib.util
import io
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.subjects import DTYPES, MEASURES
from benchmarks.tables import Row, Table
from sepvit_lib.common import tables
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.storage import write_output
from sepvit_lib.rounds import Spread

# ----------------------------------------------------------------------------------------------------------------------
# One table
# ----------------------------------------------------------------------------------------------------------------------


def spread(value: Spread | None, digits: int = 2) -> str:
    """Format a spread: median, with the smallest and largest value in brackets."""
    if value is None:
        return "–"
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def scaled(value: float | None, unit: float, digits: int) -> str:
    """Format a number in a unit; None gives a dash."""
    return "–" if value is None else f"{value / unit:.{digits}f}"


# Columns: title, and a function from a row and a batch size to the cell.
COLUMNS: list[tuple[str, Callable[[Row, int], str]]] = [
    ("model", lambda row, batch: row.model),
    ("form", lambda row, batch: row.form),
    ("number format", lambda row, batch: row.number_format),
    ("parameters, M", lambda row, batch: scaled(row.parameters or None, 1e6, 1)),
    ("multiply-adds, G", lambda row, batch: scaled(row.multiply_adds or None, 1e9, 2)),
    ("ms/image", lambda row, batch: scaled(row.median, 1e-3 * batch, 3)),
    ("images/s", lambda row, batch: scaled(batch / row.median if row.median else None, 1, 1)),
    ("relative speed", lambda row, batch: spread(row.speed)),
    ("speed to float32", lambda row, batch: "–" if row.number_format == "float32" else spread(row.speed_float32)),
    ("share of matrix products", lambda row, batch: spread(row.share)),
    ("GiB", lambda row, batch: scaled(row.bytes_all, 2**30, 2)),
    ("published top-1, %", lambda row, batch: scaled(row.top1_published, 1, 1)),
]


def grid(table: Table) -> list[list[str]]:
    """Titles and cells of a table, without empty columns. If a row was not measured, the reason follows its form."""
    batch = table.settings["batch_size"]
    columns = [[title, *(cell(row, batch) for row in table.rows)] for title, cell in COLUMNS]
    lines = [list(line) for line in zip(*(column for column in columns if set(column[1:]) != {"–"}))]
    for line, row in zip(lines[1:], table.rows):
        if row.failure:
            line[1] += f"; not measured: {row.failure}"
    return lines


def title(table: Table) -> str:
    """Title of a table: model, image size, measure, batch size and number format."""
    settings = table.settings
    form, (height, width) = ", dense form" if settings["is_dense"] else "", settings["size"]
    return (
        f"{settings['model']}{form}, {height} × {width}, {table.measure}, batch {settings['batch_size']}, "
        f"{table.number_format}"
    )


def conditions(table: Table) -> str:
    """Conditions under which a table was measured: date, revision, rounds, threads and the rate of matrix products."""
    run = table.run
    rate = f"{spread(Spread.of([rate / 1e9 for rate in table.rates]), 1)} G multiply-adds/s" if table.rates else "–"
    when = f"{run['date']}, revision {run['revision']}, {run['rounds']} rounds, {table.settings['threads']} CPU threads"
    return f"{when}. Large matrix products: {rate}."


def as_text(table: Table) -> str:
    """Format a table for a terminal."""
    return "\n".join([title(table), conditions(table), tables.as_text(grid(table))])


# ----------------------------------------------------------------------------------------------------------------------
# All tables of a machine
# ----------------------------------------------------------------------------------------------------------------------

NOTE = """\
All rows of a table are measured in the same rounds: each round times each row once, in a different order. Speeds and
shares are computed per round: median, with smallest and largest in brackets. *Relative speed* is relative to SepViT in
eager mode in the same number format. *Share of matrix products* is the time that the multiply-adds would take
at the rate of large matrix products, divided by the measured time; a training step counts three forward passes. *GiB*
is the peak memory in use: weights, the optimiser's state, and the tensors that a call allocates. Networks have
random weights; images are random, and on the device before a call. Before anything is timed, outputs are compared with
those in float32 and eager mode. `bfloat16` and `float16` are mixed precision; `bfloat16-whole` converts the network.
Published top-1 is the authors', on ImageNet-1K."""


@dataclass
class Record:
    """All tables of a machine.

    Attributes:
        device: name of the device.
        is_quick: whether timings were short, which makes the figures meaningless.
        tables: the tables.
    """

    device: str
    is_quick: bool = False
    tables: list[Table] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the record's files, without suffix. A quick record has its own files."""
        device = re.sub(r"[^\w.]+", "-", self.device)
        return f"speed-{device}{'-quick' if self.is_quick else ''}"

    @classmethod
    def read(cls, device: str, is_quick: bool, folder: Path) -> "Record":
        """Read the record of a device; an empty one if there is none.

        Raises:
            UserError: the file is not a record.
        """
        record = cls(device, is_quick)
        path = folder / f"{record.name}.json"
        if not path.exists():
            return record
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            record.tables = [Table.from_dict(table) for table in stored["tables"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{path}: not a record of this benchmark ({error})"
            raise UserError(f"{what}; delete it, or choose another --out") from None
        return record

    def add(self, table: Table) -> None:
        """Add a table. It replaces a table with the same key."""
        keys = [other.key for other in self.tables]
        if table.key in keys:
            self.tables[keys.index(table.key)] = table
        else:
            self.tables.append(table)

    def write(self, folder: Path) -> None:
        """Write the JSON file, the Markdown page and the picture.

        Raises:
            UserError: the folder cannot be written.
        """
        drawn = picture(self)
        contents = {".json": json.dumps(asdict(self), indent=1, ensure_ascii=False).encode() + b"\n", ".png": drawn}
        contents[".md"] = self.page(f"{self.name}.png" if drawn else "").encode()
        for suffix, content in contents.items():
            if content:
                write = operator.methodcaller("write", content)
                write_output(folder / f"{self.name}{suffix}", write, f"--out {folder}")

    def page(self, picture: str = "") -> str:
        """Format the record as Markdown.

        Args:
            picture: file name of its picture; "" if it has none.
        """
        lines = [f"# Speed on {self.device}", ""]
        lines += ["Quick form: its figures are meaningless.", ""] if self.is_quick else []
        lines += ["`benchmarks/benchmark.py`.", "", NOTE, ""]
        machines = [table.run["machine"].items() for table in self.tables]
        for machine in dict.fromkeys(", ".join(f"{name} {value}" for name, value in items) for items in machines):
            lines += [machine, ""]
        lines += [f"![Speed and published top-1]({picture})", ""] if picture else []
        for table in sorted(self.tables, key=lambda table: table.settings["model"]):
            lines += [f"## {title(table)}", "", conditions(table), "", tables.as_markdown(grid(table)), ""]
        return "\n".join(lines).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Picture
# ----------------------------------------------------------------------------------------------------------------------

# Colour of each model family, and offset and alignment of its labels, chosen to keep labels apart.
FAMILIES = {
    "SepViT": ("C3", (4, 4), "left"),
    "swin": ("C0", (4, 4), "left"),
    "twins": ("C1", (4, -9), "left"),
    "pvt": ("C2", (-5, -9), "right"),
    "nextvit": ("C4", (4, 4), "left"),
    "convnext": ("C5", (-5, 4), "right"),
}
AXES = {"latency": "ms", "inference": "images/s", "training": "images/s in training"}
Panels = dict[tuple[str, str], dict[str, tuple[float, float]]]


def panels_of(tables: Sequence[Table]) -> Panels:
    """Points of the picture: speed and published top-1 of each model in eager mode, by number format and measure.

    Panels with a single model are skipped.
    """
    panels: Panels = {}
    # If several tables have a point for a model, the table with the most models is used.
    for table in sorted(tables, key=lambda table: -len({row.model for row in table.rows})):
        batch = table.settings["batch_size"]
        points = panels.setdefault((table.number_format, table.measure), {})
        for row in table.rows:
            if row.form == "eager" and row.number_format == table.number_format and row.median and row.top1_published:
                x = 1e3 * row.median if table.measure == "latency" else batch / row.median
                points.setdefault(row.model, (x, row.top1_published))
    return {panel: points for panel, points in panels.items() if len(points) > 1}


def picture(record: Record) -> bytes:
    """Draw the published accuracy against speed, as PNG. Empty if there is nothing to draw, or no matplotlib."""
    panels = panels_of(record.tables)
    if not panels or importlib.util.find_spec("matplotlib") is None:  # a machine that only measures may lack it
        return b""
    from matplotlib.figure import Figure

    formats, measures = zip(*panels)
    rows = [name for name in DTYPES if name in formats]
    columns = [name for name in MEASURES if name in measures]
    figure = Figure(figsize=(5.5 * len(columns), 4.5 * len(rows)), layout="constrained")
    for (number_format, measure), points in panels.items():
        position = rows.index(number_format) * len(columns) + columns.index(measure)
        axes = figure.add_subplot(len(rows), len(columns), position + 1)
        draw(axes, points)
        axes.set(xlabel=f"{AXES[measure]}, {number_format}", ylabel="published top-1, %")
    figure.suptitle(record.device)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def draw(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Draw models as points, and lines between those of a family."""
    for family, (colour, offset, align) in FAMILIES.items():
        models = {model: point for model, point in points.items() if model.startswith(family)}
        if models:
            axes.plot(*zip(*sorted(models.values())), "-o", color=colour, label=family)
        for model, point in models.items():
            axes.annotate(model.partition("_patch")[0], point, offset, textcoords="offset points", fontsize=6, ha=align)
    axes.margins(x=0.2)  # room for the labels
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)
