"""The record of gpu_check.py: results of rows, as JSON and as a page; and how all records are written."""

if not __package__:
    import _repository  # noqa: F401
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from sepvit_lib.training.errors import UserError
from sepvit_lib.training.storage import write_file

PASSED, FAILED, TIMED_OUT, CRASHED, SKIPPED = "passed", "failed", "timed out", "crashed", "skipped"

Figures = dict[str, Any]


def file_name(device: str) -> str:
    """A name for a device's files."""
    return re.sub(r"[^\w.]+", "-", device)


def write_files(folder: Path, name: str, contents: Mapping[str, bytes]) -> None:
    """Write the files of a record.

    Args:
        folder: their folder, for which the command's flag is `--out`.
        name: their name.
        contents: their contents by ending.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for ending, content in contents.items():
            write_file(folder / f"{name}{ending}", partial(_write, content))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from None


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


@dataclass
class Result:
    """What a row gave.

    Attributes:
        name: the row.
        status: passed, failed, timed out, crashed or skipped.
        seconds: how long it took.
        figures: what it measured.
        message: why it did not pass.
        log: the last lines that it printed, if it did not pass.
    """

    name: str
    status: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    message: str = ""
    log: list[str] = field(default_factory=list)


@dataclass
class Record:
    """The record of a check.

    Attributes:
        machine: device and versions.
        date: when the check started.
        revision: commit of the code.
        is_quick: whether it is the quick form, whose figures mean nothing.
        rows: results so far.
    """

    machine: Figures
    date: str
    revision: str
    is_quick: bool
    rows: list[Result] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write both files, named after the device.

        Raises:
            UserError: the folder cannot be written.
        """
        json_text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        contents = {".json": json_text.encode(), ".md": self.markdown().encode()}
        write_files(folder, file_name(self.machine["device"]), contents)

    def markdown(self) -> str:
        """The record as a page."""
        counts = ", ".join(
            f"{sum(row.status == status for row in self.rows)} {status}"
            for status in (PASSED, FAILED, TIMED_OUT, CRASHED, SKIPPED)
        )
        lines = [f"# {self.machine['device']}", ""]
        lines += ["The quick form: its figures mean nothing.", ""] if self.is_quick else []
        lines += [f"`tools/gpu_check.sh` on {self.date}, revision {self.revision}: {counts}.", ""]
        lines += [", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "device"), ""]
        lines += [*speed_table(self.rows), *profile_tables(self.rows), "## Rows", ""]
        lines += ["| row | result | s | figures |", "|---|---|---|---|"]
        for row in self.rows:
            told = [text for text in (row.message.replace("\n", " ")[:300], described(row.figures)) if text]
            lines.append(f"| {row.name} | {row.status} | {row.seconds:g} | {escaped('; '.join(told))} |")
        return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def described(value: Any) -> str:
    """A figure, or nested ones, as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {described(entry)}" for name, entry in value.items() if name != "kernels")
    if isinstance(value, list):
        return " · ".join(map(described, value))
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


SPEEDS_NOTE = """\
224 × 224, batches of 128, bfloat16 unless the row says otherwise. A training step is forward and backward pass,
clipping and AdamW; it counts as three forward passes. Shares are of the rate of large matrix products."""
SPEEDS = {
    "inference, images/s": "inference, images/s",
    "inference, share of matrix products": "of matrix products",
    "inference, GiB": "GiB",
    "training, images/s": "training, images/s",
    "training, share of matrix products": "of matrix products",
    "training, GiB": "GiB",
}


def speed_table(rows: Sequence[Result]) -> list[str]:
    """The rows that measured speed, as a table."""
    measured = [row for row in rows if set(SPEEDS) <= row.figures.keys()]
    if not measured:
        return []
    lines = ["## Speed", "", SPEEDS_NOTE, ""]
    lines += [f"| | {' | '.join(SPEEDS.values())} |", f"|---{'|---' * len(SPEEDS)}|"]
    for row in measured:
        cells = [described(row.figures[name]) for name in SPEEDS]
        lines.append(f"| {row.name.removeprefix('speed-')} | {' | '.join(cells)} |")
    return [*lines, ""]


def profile_tables(rows: Sequence[Result]) -> list[str]:
    """What the profiled training steps spend their time in."""
    lines = []
    for row in rows:
        if "kernels" in row.figures:
            busy = row.figures["share of it in which the device works"]
            lines += [f"## {row.name}", ""]
            lines += [f"{row.figures['ms/step']:.1f} ms a step; the device works {100 * busy:.0f} % of the time.", ""]
            for title in ("kinds", "kernels"):
                lines += ["| share of the device's time | |", "|---|---|"]
                shares = row.figures[title].items()
                lines += [f"| {100 * share:.1f} % | {escaped(name)} |" for name, share in shares] + [""]
    return lines
