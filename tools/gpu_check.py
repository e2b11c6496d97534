"""Check on a GPU what only a GPU can show, and record it in one JSON and one Markdown file.

    bash tools/gpu_check.sh [--out benchmarks] [--device cuda] [--limit 540] [--only NAME …] [--quick]

Compares outputs and gradients in each number format; trains, kills and resumes runs; lets no step wait for the GPU;
sends more images through the network than a kernel has blocks; measures speed. It needs no network, but
what requirements.txt and tests/requirements-fast.txt install.

Each row runs in a process of its own with a time limit, so that one that fails, hangs or crashes does not stop the
others. The files are named after the device and rewritten after each row. The exit status is 1 if a row failed.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from sepvit_lib.training.commands import Parser, path, positive_int, run_command, seconds
from sepvit_lib.training.devices import available_cores, check_device
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.resume import git_revision
from sepvit_lib.training.storage import make_folder
from tools import benchmark_machine, gpu_rows, gpu_runs
from tools.gpu_record import CRASHED, FAILED, PASSED, SKIPPED, TIMED_OUT, Figures, Record, Result, described
from tools.gpu_rows import Row, Setup

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT, Path(torch.__file__).parents[1])  # in tracebacks, paths are recorded from there
LOG_LINES = 30  # of a failed row that are recorded
PAUSE = 0.05  # seconds between two looks at the running rows

_fork = multiprocessing.get_context("fork")


# ----------------------------------------------------------------------------------------------------------------------
# One row in its process
# ----------------------------------------------------------------------------------------------------------------------


class RunningRow:
    """A row that runs in a forked process, which leads a session of its own.

    This process never uses the GPU: a forked process could not use it then.

    Args:
        row: the row.
        setup: where it runs.
        deadline: when the whole check has to end, by `time.monotonic`.
    """

    def __init__(self, row: Row, setup: Setup, deadline: float) -> None:
        self.row = row
        self.setup = setup
        self.start = time.monotonic()
        self.end = min(self.start + row.limit, deadline)
        setup.folder.mkdir(parents=True)
        self._printed, self._result = (setup.folder.with_suffix(suffix) for suffix in (".txt", ".json"))
        self._process = _fork.Process(target=self._work)
        self._process.start()

    def _work(self) -> None:
        """Run the row, and leave its figures and its failure in a file."""
        os.setsid()
        printed = os.open(self._printed, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        figures: Figures = {}
        message = ""
        try:
            self.row.check(self.setup, figures)
        except BaseException as error:  # a row may end in any way, also by sys.exit
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
        for number in gpu_runs.descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._result.write_text(json.dumps(dict(figures=figures, message=message)))
        sys.stdout.flush()
        os._exit(0)  # without waiting for the threads of a failed row

    def result(self) -> Result | None:
        """The row's result; None while it runs."""
        has_ended, is_late = not self._process.is_alive(), time.monotonic() > self.end
        if not has_ended and not is_late:
            return None
        self.kill(with_descendants=not has_ended)
        result = Result(self.row.name, PASSED, round(time.monotonic() - self.start, 1))
        if self._result.exists():
            result = Result(self.row.name, PASSED, result.seconds, **json.loads(self._result.read_text()))
            result.status = FAILED if result.message else PASSED
        elif is_late:
            result.status, result.message = TIMED_OUT, f"not done after {result.seconds:.0f} s"
        else:
            result.status, result.message = CRASHED, f"exit status {self._process.exitcode}"
        if result.status != PASSED and self._printed.exists():
            printed = self._printed.read_text(errors="replace")
            for folder in FOLDERS:
                printed = printed.replace(f"{folder}/", "")
            result.log = printed.splitlines()[-LOG_LINES:]
        return result

    def kill(self, with_descendants: bool = True) -> None:
        """End the row's process and its session, and processes with sessions of their own that it started."""
        leader = self._process.pid or 0
        descendants = gpu_runs.descendants(leader) if with_descendants else []
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
        for number in descendants:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._process.join()


# ----------------------------------------------------------------------------------------------------------------------
# All rows
# ----------------------------------------------------------------------------------------------------------------------


def run_rows(
    rows: Sequence[Row], setup: Setup, jobs: int, deadline: float, report: Callable[[Result], None]
) -> list[Result]:
    """Run rows, several side by side, those that run alone after all before them.

    Args:
        rows: the rows.
        setup: where they run; each gets a folder of its own in its folder.
        jobs: number of rows that run side by side.
        deadline: when all has to end, by `time.monotonic`. Rows that have not started by then are skipped.
        report: called with each result.
    """
    waiting, running, results = list(rows), list[RunningRow](), list[Result]()

    def finish(result: Result) -> None:
        results.append(result)
        report(result)

    try:
        while waiting or running:
            while waiting and _may_start(waiting[0], running, jobs):
                row = waiting.pop(0)
                if reason := _reason_to_skip(row, setup, deadline):
                    finish(Result(row.name, SKIPPED, message=reason))
                else:
                    own = Setup(setup.device, setup.quick, setup.digits, setup.folder / row.name)
                    running.append(RunningRow(row, own, deadline))
            for started in list(running):
                if (result := started.result()) is not None:
                    running.remove(started)
                    finish(result)
            time.sleep(PAUSE)
    finally:
        for started in running:
            started.kill()
    return results


def _may_start(row: Row, running: Sequence[RunningRow], jobs: int) -> bool:
    """Whether a row may start beside those that run."""
    return not running if row.alone else len(running) < jobs and not any(other.row.alone for other in running)


def _reason_to_skip(row: Row, setup: Setup, deadline: float) -> str:
    """Why a row does not run; "" if it does."""
    if row.gpu and setup.device.type != "cuda":
        return "needs a GPU"
    if setup.quick and not row.quick:
        return "has no quick form"
    return "no time left" if time.monotonic() > deadline else ""


def write_digits(setup: Setup, figures: Figures) -> None:
    """Write the demo's digits, a few of them for the quick form."""
    from conftest import link_digits  # on the path since gpu_rows was imported

    from tools import make_demo_data  # without scikit-learn and scikit-image, only the rows that train fail

    whole = setup.folder if setup.quick else setup.digits
    figures |= make_demo_data.write_imagenet(whole)
    if setup.quick:
        link_digits(whole, setup.digits, "012", train=16, val=7)


def describe(setup: Setup, figures: Figures) -> None:
    """Describe the machine. Runs in a process of its own, because it uses the GPU.

    Raises:
        UserError: there is no such device.
    """
    check_device(setup.device.type)
    figures |= benchmark_machine.describe(setup.device)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def chosen_rows(only: Sequence[str]) -> list[Row]:
    """The rows whose names start with one of the given texts, in the quick form too; all rows without any.

    Raises:
        UserError: a text starts no row's name.
    """
    side_by_side = sorted([*gpu_rows.comparison_rows(), *gpu_runs.run_rows()], key=lambda row: -row.limit)
    rows = [*side_by_side, *gpu_rows.large_rows(), *gpu_rows.speed_rows()]
    for text in only:
        if not any(row.name.startswith(text) for row in rows):
            raise UserError(
                f"--only {text}: no row's name starts so; the rows are {', '.join(row.name for row in rows)}"
            )
    return [replace(row, quick=True) for row in rows if row.name.startswith(tuple(only))] if only else rows


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=path, default=str(ROOT / "benchmarks"), help="folder for the record")
    parser.add_argument("--limit", type=seconds, default=540.0, metavar="SECONDS", help="time for everything")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose names start so")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=max(1, available_cores() // 2),
        help="rows side by side that measure no time",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and few rows: to try the check itself")
    parser.add_argument("--revision", default=None, help="commit of the code, where git does not know it")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the rows and write the record.

    Raises:
        UserError: the device is not available, a row is unknown, or the record cannot be written.
        SystemExit: a row failed.
    """
    deadline = time.monotonic() + args.limit
    rows = chosen_rows(args.only)
    out = Path(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = Setup(torch.device(args.device), args.quick, folder / "imagenet", folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # shared by rows, fresh for each check
        preparation = [
            Row(name, check, quick=True) for name, check in (("machine", describe), ("digits", write_digits))
        ]
        prepared = run_rows(preparation, setup, 1, deadline, lambda result: None)
        machine = prepared[0]
        if machine.status != PASSED:
            raise UserError(machine.message.removeprefix("UserError: "))
        make_folder(out, f"--out {out}")
        for result in prepared:
            print_result(result)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        record = Record(machine.figures, now, args.revision or git_revision(), args.quick)

        def report(result: Result) -> None:
            record.rows.append(result)
            record.write(out)
            print_result(result)

        run_rows(rows, setup, args.jobs, deadline, report)
    failed = [row.name for row in record.rows if row.status not in (PASSED, SKIPPED)]
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


def print_result(result: Result) -> None:
    """Print a row's result."""
    print(
        f"{result.status:9} {result.seconds:6.1f} s  {result.name}: {result.message[:300] or described(result.figures)}"
    )
    for line in result.log:
        print(f"    {line}")
    sys.stdout.flush()


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    Raises:
        SystemExit: a row failed.
    """
    parser = build_parser()
    return run_command("gpu_check.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
