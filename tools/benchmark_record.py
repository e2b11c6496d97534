"""Records of benchmarks: tables of one machine, as text, as JSON, as a page, and as a picture."""

if not __package__:
    import _repository  # noqa: F401
import importlib.util
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sepvit_lib.training.errors import UserError
from tools.benchmark_networks import OF_SEPVIT
from tools.benchmark_rounds import Spread
from tools.benchmark_table import COPY, MATRIX_PRODUCT, Row, Table
from tools.gpu_record import escaped, file_name, write_files

# ----------------------------------------------------------------------------------------------------------------------
# One table
# ----------------------------------------------------------------------------------------------------------------------


def spread(value: Spread | None, digits: int = 2) -> str:
    """A median with its smallest and largest value."""
    if value is None:
        return "–"
    return f"{value.median:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def scaled(value: float | None, unit: float, digits: int) -> str:
    """A number in a unit; a dash if there is none."""
    return "–" if value is None else f"{value / unit:.{digits}f}"


# Columns: title, and cell of a row and a batch size.
Column = tuple[str, Callable[[Row, int], str]]
COLUMNS: list[Column] = [
    ("model", lambda row, batch: row.model),
    ("form", lambda row, batch: row.form),
    ("number format", lambda row, batch: row.number_format),
    ("parameters, M", lambda row, batch: scaled(row.parameters or None, 1e6, 1)),
    ("multiply-adds, G", lambda row, batch: scaled(row.multiply_adds or None, 1e9, 2)),
    ("activations, M", lambda row, batch: scaled(row.activations or None, 1e6, 1)),
    ("ms/image", lambda row, batch: scaled(row.median, 1e-3 * batch, 3)),
    ("images/s", lambda row, batch: scaled(batch / row.median if row.median else None, 1, 1)),
    ("relative speed", lambda row, batch: spread(row.speed)),
    ("speed to float32", lambda row, batch: "–" if row.number_format == "float32" else spread(row.speed_float32)),
    ("share of the limit", lambda row, batch: spread(row.share)),
    ("GiB", lambda row, batch: scaled(row.bytes_all, 2**30, 2)),
    ("top-1, %", lambda row, batch: scaled(row.top1, 1, 2)),
    ("top-1 to float32", lambda row, batch: scaled(row.top1_ratio, 1, 4)),
    ("published top-1, %", lambda row, batch: scaled(row.top1_published, 1, 1)),
]


def grid(table: Table) -> list[list[str]]:
    """Titles and cells of a table. Columns in which no row has anything are left out.

    A row that was not measured has its reason in place of its time.
    """
    batch = table.settings["batch_size"]
    columns = [[title, *(cell(row, batch) for row in table.rows)] for title, cell in COLUMNS]
    columns = [column for column in columns if set(column[1:]) != {"–"}]
    lines = [list(line) for line in zip(*columns)]
    for line, row in zip(lines[1:], table.rows):
        if row.failure:
            line.append(f"not measured: {row.failure}")
    return lines


def title(table: Table) -> str:
    """What a table measures."""
    settings = table.settings
    form = ", dense form" if settings["is_dense"] else ""
    height, width = settings["size"]
    return (
        f"{settings['model']}{form}, {height} × {width}, {table.measure}, batch {settings['batch_size']}, "
        f"{table.number_format}"
    )


def conditions(table: Table) -> str:
    """On what, when and how a table was measured."""
    run, settings = table.run, table.settings
    rates = ", ".join(described_rate(name, values) for name, values in table.rates.items())
    how = f"{settings['threads']} CPU threads" + (", channels last" if settings["channels_last"] else "")
    when = f"{run['date']}, revision {run['revision']}, {run['rounds']} rounds, {how}"
    baseline = f"Speeds are relative to SepViT's form `{settings['baseline']}`"
    other = "" if table.other_cores is None else f" Other processes kept {table.other_cores:.2f} cores busy."
    return f"{when}. {baseline}. Rates: {rates or 'not measured'}.{other}"


def described_rate(name: str, values: Sequence[float]) -> str:
    """A rate of the machine with its unit."""
    unit = {MATRIX_PRODUCT: "G multiply-adds/s", COPY: "GB/s, reading and writing"}[name]
    return f"{name} {spread(Spread.of([value / 1e9 for value in values]), 1)} {unit}"


def as_text(table: Table) -> str:
    """A table for a terminal."""
    lines = grid(table)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    text = [title(table), conditions(table)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append("  ".join([*cells, *line[len(widths) :]]).rstrip())
    for row in table.rows:
        if row.profile:
            text.append(f"{row.subject}:")
            text += [
                f"  {share:>7}  {rate:>22}  {bandwidth:>16}  {name}"
                for share, rate, bandwidth, name in profile_cells(row, table)
            ]
    return "\n".join(text)


def as_page(table: Table) -> list[str]:
    """A table as lines of a page."""
    lines = grid(table)
    page = [f"## {title(table)}", "", conditions(table), ""]
    page += [f"| {' | '.join(lines[0])} |", f"|{'---|' * len(lines[0])}"]
    for line in lines[1:]:
        cells, failure = line[: len(lines[0])], line[len(lines[0]) :]
        if failure:
            cells[lines[0].index("number format")] += f"; {failure[0]}"
        page.append(f"| {' | '.join(map(escaped, cells))} |")
    page.append("")
    for row in table.rows:
        if row.profile:
            page += [f"{row.subject}:", "", "| share of the time | multiply-adds | bytes | |", "|---|---|---|---|"]
            page += [f"| {' | '.join(map(escaped, cells))} |" for cells in profile_cells(row, table)] + [""]
    return page


def profile_cells(row: Row, table: Table) -> list[list[str]]:
    """Operations of a profiled row: share of the time, speed of multiply-adds, speed of moving bytes, and name.

    Speeds stand beside their share of the machine's rates, which were measured in the table's number format.
    """
    all_rates = table.rates if row.number_format == table.number_format else {}
    lines = []
    for name, operation in row.profile.items():
        cells = [f"{100 * operation.share:.1f} %"]
        for amount, unit, rate in ((operation.multiply_adds, "G/s", MATRIX_PRODUCT), (operation.moved, "GB/s", COPY)):
            speed = amount / operation.seconds
            rates = all_rates.get(rate)
            share = f" ({100 * speed / Spread.of(rates).median:.0f} %)" if rates else ""
            cells.append(f"{speed / 1e9:.1f} {unit}{share}" if amount else "–")
        lines.append([*cells, name])
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# All tables of a machine
# ----------------------------------------------------------------------------------------------------------------------

NOTE = """\
All rows of a table are measured in the same rounds: each round times each row once, in another order. Speeds and shares
are computed round by round; the median stands first, the smallest and the largest in brackets. *Share of the limit* is
the time that multiply-adds at the rate of large matrix products, or compulsory bytes at the bandwidth of a large copy,
would take (the larger of both), divided by the measured time; a training step counts three forward passes. *GiB* is the
most memory in use at once: weights, the optimiser's state, and the tensors that a call allocates; with a runtime, what
the process gains. Networks have random weights; images are random, and on the device before a call. Before anything is
timed, outputs are compared with those in float32 and eager mode. `bfloat16` and `float16` are mixed precision;
`bfloat16-whole` converts the network. Published top-1 is the authors', on ImageNet-1K."""


@dataclass
class Record:
    """All tables of a machine.

    Attributes:
        device: name of the device.
        is_quick: whether sizes were tiny, so that the figures mean nothing.
        tables: the tables.
    """

    device: str
    is_quick: bool = False
    tables: list[Table] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the record's files. The quick form has files of its own."""
        return f"speed-{file_name(self.device)}{'-quick' if self.is_quick else ''}"

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
            raise UserError(
                f"{path}: no record of this benchmark ({error}); delete it, or choose another --out"
            ) from None
        return record

    def add(self, table: Table) -> None:
        """Add a table, in place of one of the same kind."""
        keys = [other.key for other in self.tables]
        if table.key in keys:
            self.tables[keys.index(table.key)] = table
        else:
            self.tables.append(table)

    def write(self, folder: Path) -> None:
        """Write the JSON file, the page and the pictures.

        Raises:
            UserError: the folder cannot be written.
        """
        contents = {".json": (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()}
        pictures = {f"-{number_format}.png": picture(self, number_format) for number_format in drawable(self.tables)}
        page = self.page([f"{self.name}{ending}" for ending in pictures])
        write_files(folder, self.name, {**contents, **pictures, ".md": page.encode()})

    def page(self, pictures: Sequence[str] = ()) -> str:
        """The record as a page.

        Args:
            pictures: names of its pictures.
        """
        lines = [f"# Speed on {self.device}", ""]
        lines += ["The quick form: its figures mean nothing.", ""] if self.is_quick else []
        lines += ["`tools/benchmark.py`.", "", NOTE, ""]
        for machine in dict.fromkeys(described_machine(table) for table in self.tables):
            lines += [machine, ""]
        lines += [f"![Speed and published top-1]({name})\n" for name in pictures]
        for table in sorted(self.tables, key=lambda table: table.settings["model"]):
            lines += as_page(table)
        return "\n".join(lines).rstrip() + "\n"


def described_machine(table: Table) -> str:
    """Machine and versions that a table was measured with."""
    return ", ".join(f"{name} {value}" for name, value in table.run["machine"].items())


# ----------------------------------------------------------------------------------------------------------------------
# Picture
# ----------------------------------------------------------------------------------------------------------------------

# Colour of a family, and where its names stand: offset in points from a point, and which end is there. Neighbours
# differ.
FAMILIES = {
    "SepViT": ("C3", (4, 4), "left"),
    "swin": ("C0", (4, 4), "left"),
    "twins": ("C1", (4, -9), "left"),
    "pvt": ("C2", (-5, -9), "right"),
    "nextvit": ("C4", (4, 4), "left"),
    "convnext": ("C5", (-5, 4), "right"),
}
PANELS = {"inference": "images/s", "latency": "ms", "training": "images/s in training"}


def shown(table: Table) -> list[Row]:
    """Rows of a table that a picture shows: none with a checkpoint, whose accuracy is not the published one."""
    if table.settings["checkpoint"]:
        return []
    return [
        row
        for row in table.rows
        if row.median
        and row.top1_published
        and row.form not in OF_SEPVIT
        and row.number_format == table.number_format
        and not table.settings["is_dense"]
    ]


def can_draw() -> bool:
    """Whether matplotlib is there. It is in requirements.txt, but a machine that only measures may lack it."""
    return importlib.util.find_spec("matplotlib") is not None


def drawable(tables: Iterable[Table]) -> list[str]:
    """Number formats of which there is something to draw: SepViT and another model."""
    if not can_draw():
        return []
    found = {table.number_format for table in tables if len({row.model for row in shown(table)}) > 1}
    return sorted(found)


def picture(record: Record, number_format: str) -> bytes:
    """Draw speed against the published accuracy: the eager form filled, the fastest other one hollow."""
    from matplotlib.figure import Figure

    tables = [table for table in record.tables if table.number_format == number_format and shown(table)]
    tables.sort(key=lambda table: -len({row.model for row in table.rows}))  # a point comes from where its peers are
    panels = [measure for measure in PANELS if any(table.measure == measure for table in tables)]
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        points: dict[tuple[str, str], tuple[float, float]] = {}
        for table in (table for table in tables if table.measure == measure):
            batch = table.settings["batch_size"]
            for row in shown(table):
                assert row.median is not None
                assert row.top1_published is not None
                x = 1e3 * row.median if measure == "latency" else batch / row.median
                points.setdefault((row.model, row.form), (x, row.top1_published))
        draw(axes, points, smaller_is_better=measure == "latency")
        axes.set(xlabel=f"{PANELS[measure]}, {number_format}", ylabel="published top-1, %")
    figure.suptitle(record.device)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def draw(axes: Any, points: Mapping[tuple[str, str], tuple[float, float]], smaller_is_better: bool) -> None:
    """Draw models as points, and lines between those of a family."""
    for family, (colour, _, _) in FAMILIES.items():
        eager = sorted(point for (model, form), point in points.items() if model.startswith(family) and form == "eager")
        if eager:
            axes.plot(*zip(*eager), "-o", color=colour, label=family)
    best = min if smaller_is_better else max
    for model in dict.fromkeys(model for model, _ in points):
        others = {form: point for (name, form), point in points.items() if name == model and form != "eager"}
        styles = (style for family, style in FAMILIES.items() if model.startswith(family))
        colour, offset, end = next(styles, ("grey", (4, 4), "left"))
        annotate = partial(axes.annotate, textcoords="offset points", fontsize=6, ha=end)
        if others:
            form = best(others, key=lambda name: others[name][0])
            axes.plot(*others[form], "o", color=colour, fillstyle="none")
            annotate(form, others[form], xytext=(4, -9), color=colour)
        if (model, "eager") in points:
            annotate(model.partition("_patch")[0], points[model, "eager"], xytext=offset)
    axes.margins(x=0.2)  # for the names
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)
