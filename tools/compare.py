"""Compare runs of main.py: top-1 (or mean average precision), the settings that differ, and curves.

    python tools/compare.py RUN … [--out FOLDER] [--format text|csv|markdown] [--min-top1 PERCENT]

RUN is an output folder of main.py. The table has the best and the last top-1 of each run (%), and the settings that
differ between runs, except those that do not affect the result. Runs that differ only in --seed share a row, with mean
and sample standard deviation (std), and a curve, with a band from minimum to maximum. Runs with the same settings and
the same seed are listed separately. Epochs are counted from 0, as in log.txt. --out writes the plots and the table to
compare.png, compare.csv and compare.md. With --min-top1, the exit status is 1 if the last top-1 of any run is lower.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from main import default_settings
from sepvit_lib.common.command_line import Parser, number, path, run_command
from sepvit_lib.common.errors import UserError, one_line
from sepvit_lib.common.storage import write_output
from sepvit_lib.common.tables import as_csv, as_markdown, as_text
from sepvit_lib.run.output import LOG, OF_RUN, draw_curves, epoch_entries, points_of, read_log
from sepvit_lib.run.resume import FREE_SETTINGS

METRICS = {"test_acc1": "top-1 (%)", "test_map": "mAP (%)"}
LOSSES = {"training loss": {"train_loss": ""}, "validation loss": {"test_loss": ""}}
TITLES = "name,runs,best {0},std of best,best epoch,last {0},std of last,epochs done"
FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


class Run(NamedTuple):
    """A run: its name, the settings that change what it computes, and the lines of its log about epochs."""

    name: str
    settings: dict[str, str]
    entries: list[dict[str, Any]]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read runs from their output folders. Their names are relative to the folder that contains all of them.

    The images and the number of processes count as settings.

    Raises:
        UserError: a folder is named twice, or has no log of a run with a finished epoch.
    """
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    runs: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if folder.resolve() in runs:
            raise UserError(f"RUN {folder}: is named twice; name each folder once")
        log = read_log(folder / LOG, "pass an output folder of main.py")
        if not epoch_entries(log):
            raise UserError(f"RUN {folder}: has no {'finished epoch' if log else LOG}; omit it, or train with main.py")
        starts = [entry for entry in log if OF_RUN in entry] or [{OF_RUN: {}}]
        # Older runs lack settings. A resumed run keeps the images per step of its start.
        settings = default_settings() | starts[-1][OF_RUN] | {key: starts[0].get(key) for key in ("data", "processes")}
        settings = {name: one_line(str(settings[name])) for name in settings.keys() - FREE_SETTINGS}
        runs[folder.resolve()] = Run(one_line(os.path.relpath(folder, parent)), settings, epoch_entries(log))
    return list(runs.values())


def grouped(runs: Sequence[Run], names: Sequence[str]) -> list[list[Run]]:
    """Group the runs that differ only in their seed. Runs with the same settings and seed stay apart.

    Args:
        runs: the runs.
        names: names of the settings that differ.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        repetition = run.name if [other.settings for other in runs].count(run.settings) > 1 else ""
        key = (repetition, *(run.settings.get(name) for name in names if name != "seed"))
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def name_of(group: Sequence[Run]) -> str:
    """Name of a group: what the names of its runs have in common, then the rest of each in braces."""
    start = os.path.commonprefix([run.name for run in group]).rstrip("0123456789")
    names = ",".join(run.name.removeprefix(start) for run in group)
    return f"{start}{{{names}}}" if len(group) > 1 else group[0].name


def row_of(group: Sequence[Run], names: Sequence[str], metric: str) -> list[str]:
    """A row of the table: that of a group.

    Args:
        group: the runs.
        names: names of the settings that differ among all runs.
        metric: the metric, as in log.txt.
    """
    curves = [points for run in group if (points := points_of(run.entries, metric))]
    best = [max(points, key=lambda epoch: points[epoch]) for points in curves]
    row = [name_of(group), str(len(group)), *mean_and_std([points[epoch] for points, epoch in zip(curves, best)])]
    row += [joined(best), *mean_and_std([points[max(points)] for points in curves])]
    row += [joined(run.entries[-1]["epoch"] + 1 for run in group)]
    return row + [joined(run.settings.get(name, "") for run in group) for name in names]


def mean_and_std(values: Sequence[float]) -> tuple[str, str]:
    """Mean and sample standard deviation as cells, empty for too few values."""
    return f"{fmean(values):.3f}" if values else "", f"{stdev(values):.3f}" if len(values) > 1 else ""


def joined(values: Iterable[object]) -> str:
    """Join distinct values in a cell."""
    return " ".join(dict.fromkeys(map(str, values)))


def main(args: argparse.Namespace) -> int:
    """Print the table, and write the files. Returns the exit status.

    Raises:
        UserError: a folder is named twice or has no log of a run with a finished epoch, or a file cannot be written.
    """
    runs = read_runs(args.runs)
    names = sorted({name for run in runs for name in run.settings})
    names = [name for name in names if len({run.settings[name] for run in runs if name in run.settings}) > 1]
    groups = grouped(runs, names)
    metric = next((name for name in METRICS if any(points_of(run.entries, name) for run in runs)), "test_acc1")
    titles = TITLES.format(METRICS[metric]).split(",")
    lines = [[*titles, *names], *(row_of(group, names, metric) for group in groups)]
    lines = [list(line) for line in zip(*(column for column in zip(*lines) if any(column[1:])))]
    print(FORMATS[args.format](lines))
    if args.out:
        out, what = Path(args.out), f"--out {args.out}"
        write_output(out / "compare.csv", lambda file: file.write(f"{as_csv(lines)}\n".encode()), what)
        write_output(out / "compare.md", lambda file: file.write(f"{as_markdown(lines)}\n".encode()), what)
        curves = {name_of(group).replace("$", r"\$"): [run.entries for run in group] for group in groups}
        figure = draw_curves(curves, {**LOSSES, METRICS[metric]: {metric: ""}})
        write_output(out / "compare.png", lambda file: figure.savefig(file, format="png", dpi=150), what)
    for run in runs:
        last = [0.0, *points_of(run.entries, "test_acc1").values()][-1]
        if last < args.min_top1:
            print(f"compare.py: {run.name}: top-1 {last:.3f} is below --min-top1 {args.min_top1:g}", file=sys.stderr)
            return 1
    return 0


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="an output folder of main.py")
    parser.add_argument("--out", type=path, metavar="FOLDER", help="folder for the curves and the table")
    about = "exit with status 1 if the last top-1 of any run is lower"
    parser.add_argument("--min-top1", type=number(float, 0, 100), default=0.0, metavar="PERCENT", help=about)
    parser.add_argument("--format", choices=FORMATS, default="text", help="format of the printed table, default text")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 1 below --min-top1, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    return run_command("compare.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
