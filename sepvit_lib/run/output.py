"""The files of a run (log.txt, TensorBoard's files, curves.png, checkpoints), and the lock on its output folder."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sepvit_lib.common.errors import Preempted, UserError, setting, with_flags
from sepvit_lib.common.processes import all_gather, on_main_process, print_line, print_main
from sepvit_lib.common.storage import make_folder, write_file
from sepvit_lib.run.checkpoint_names import CheckpointNames
from sepvit_lib.run.checkpoints import CheckpointWriter, hard_link
from sepvit_lib.run.resume import Source

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOG, CURVES = "log.txt", "curves.png"
LOCK_TIMEOUT = 60  # minimum seconds to wait for the processes of a killed run to end

# ----------------------------------------------------------------------------------------------------------------------
# log.txt, TensorBoard's files and curves
# ----------------------------------------------------------------------------------------------------------------------


# `OF_RUN` occurs only in lines about the run, and `OF_EPOCH` only in lines about an epoch. DeiT's format does not
# record the kind of a line.
OF_RUN, OF_EPOCH = "settings", "train_loss"

Panels = Mapping[str, Mapping[str, str]]
PANELS: Panels = {  # of curves.png: labels of the metrics, by title and metric
    "loss": {"train_loss": "training", "test_loss": "validation", "test_ema_loss": "validation, averaged weights"},
    "accuracy (%)": {
        "test_acc1": "top-1",
        "test_acc5": "top-5",
        "test_ema_acc1": "top-1, averaged weights",
        "test_map": "mAP",
    },
    "learning rate": {"train_lr": "learning rate"},
}


def read_log(path: Path, advice: str = "move it away to resume without it") -> list[dict[str, Any]]:
    """Read the lines of log.txt, one JSON object each. A missing file counts as empty.

    Args:
        path: the file.
        advice: what to do if the file is not a log, for messages.

    Raises:
        UserError: a line is not a JSON object.
    """
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a run's log ({error}); {advice}") from None


def epoch_entries(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the lines that summarise an epoch."""
    return [entry for entry in log if OF_EPOCH in entry]


class Log:
    """log.txt, with lines about the run, about each epoch and about each event. Each write replaces the file.

    Args:
        path: the file.
        covers: returns whether a line comes before the position at which the run starts or resumes. Other lines are
            removed.

    Attributes:
        failure: why the last lines could not be written; None if they were written.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, covers: Callable[[dict[str, Any]], bool]) -> None:
        self.path = path
        self.failure: str | None = None
        self.entries = [entry for entry in read_log(path) if covers(entry)]
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line. On failure, warn and keep the line; `flush` retries."""
        self.entries.append(entry)
        try:
            self._write()
        except OSError as error:
            self.failure = error.strerror
            print_line(f"WARNING: {self.path} could not be written ({error.strerror}); training continues")

    def flush(self) -> None:
        """Write the file again if the last write failed."""
        if self.failure:
            with suppress(OSError):
                self._write()

    def add_run(self, run: dict[str, Any]) -> None:
        """Add a line that describes the run, unless the last such line is identical."""
        last = [entry for entry in self.entries if OF_RUN in entry][-1:]
        run = json.loads(json.dumps(run))  # in the form that `read_log` returns
        if last != [run]:
            self.add(run)

    def _write(self) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        write_file(self.path, lambda file: file.write(text.encode()))
        self.failure = None


class Scalars:
    """TensorBoard's files. On failure, warn and retry with the next epoch.

    Args:
        folder: folder of the files. In existing files, values of the first added epoch and of later epochs are hidden.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._unwritten: list[tuple[int, dict[str, float]]] = []

    def add(self, stats: dict[str, float], epoch: int) -> None:
        """Add an epoch's values."""
        self._unwritten.append((epoch, stats))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = self._writer or SummaryWriter(self.folder, purge_step=self._unwritten[0][0])
            for step, values in self._unwritten:
                for name, value in values.items():
                    self._writer.add_scalar(name.replace("_", "/", 1), value, step)
            self._writer.flush()
            self._unwritten.clear()
        except ImportError as error:
            print_line(f"WARNING: no TensorBoard files ({error}); log.txt has all values")
        except OSError as error:
            self._writer = None  # a writer cannot continue after an error
            print_line(f"WARNING: TensorBoard's files in {self.folder} could not be written ({error.strerror})")


def points_of(entries: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Values of a metric by epoch; epochs without a value are omitted."""
    return {entry["epoch"]: entry[metric] for entry in entries if entry.get(metric) is not None}


def draw_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], panels: Panels) -> Any:
    """Draw curves over the epochs, in a row of panels.

    The curve of several runs is their mean, with a band from minimum to maximum. Runs without any values are ignored,
    and only epochs in which all other runs have a value are drawn.

    Args:
        runs: for each label, the lines about epochs of one or more runs.
        panels: for each title, the metrics and their labels.

    Returns:
        the figure. If there are several labels, all panels share one legend below them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed at the end of a run
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4 * len(panels), 3.6 if len(runs) == 1 else 4.5), layout="constrained")
    for axes, (title, metrics) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for number, ((name, logs), (metric, label)) in enumerate(product(runs.items(), metrics.items())):
            if curves := [points for log in logs if (points := points_of(log, metric))]:
                epochs = sorted(set.intersection(*map(set, curves)))
                values = [[points[epoch] for points in curves] for epoch in epochs]
                style = ("." if len(epochs) < 30 else "") + ("-", "--", ":")[number // 10 % 3]  # there are ten colours
                axes.plot(epochs, [*map(fmean, values)], style, color=f"C{number}", label=name + label)
                axes.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=f"C{number}", alpha=0.2)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(runs) == 1 and axes.lines:
            axes.legend()
    if len(runs) > 1:
        figure.legend(figure.axes[0].lines, list(runs), loc="outside lower center", ncols=2)
    return figure


def draw_corruptions(top1: Mapping[str, Sequence[float]], clean: float) -> Any:
    """Draw top-1 as bars: of uncorrupted images; the mean at each severity; the mean under each corruption.

    Args:
        top1: for each corruption, top-1 (%) at severities 1 to 5 (`sepvit_lib.pipeline.corruptions`).
        clean: top-1 of uncorrupted images.

    Returns:
        the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 7), layout="constrained").subplots()
    names = ["clean", *(f"all, severity {severity}" for severity in range(1, 6)), *top1]
    means = [clean, *map(fmean, zip(*top1.values())), *map(fmean, top1.values())]
    axes.bar_label(axes.barh(names, means, color=["C7", *["C0"] * 5, *["C1"] * len(top1)]), fmt="%.1f", padding=3)
    axes.set(xlim=(0, 9 + max(means)), ylim=(len(names) - 0.4, -0.6))
    axes.set_xlabel("top-1 (%); orange: mean over the five severities")
    return axes.figure


def plot_curves(log: Path, picture: Path) -> None:
    """Plot the loss, accuracy and learning rate in log.txt over the epochs.

    Raises:
        OSError: the picture cannot be written.
    """
    try:
        figure = draw_curves({"": [epoch_entries(read_log(log))]}, PANELS)
    except ImportError as error:
        print_line(f"WARNING: no {picture.name} ({error})")
        return
    write_file(picture, lambda file: figure.savefig(file, format="png", dpi=100))


# ----------------------------------------------------------------------------------------------------------------------
# The output folder
# ----------------------------------------------------------------------------------------------------------------------


class Output:
    """The files of a run. Only rank 0 calls `lock`, `open` and `complete`.

    On other ranks, and before `open`, the methods that log, save and close do nothing.

    The order of writes ensures that log.txt is never behind the newest checkpoint; see docs/design.md.

    Args:
        folder: the output folder.
        heartbeat_timeout: see `lock_folder`.
        names: names of the checkpoints.
        what: name of the setting that gives the folder, for messages.
    """

    def __init__(
        self, folder: Path, heartbeat_timeout: float, names: CheckpointNames, what: str = "output_dir"
    ) -> None:
        self.folder = folder
        self.heartbeat_timeout = heartbeat_timeout
        self.names = names
        self.what = setting(what, folder)
        self._files: _Files | None = None
        self._lock: int | None = None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            self._files.checkpoints.wait()  # before the lock is released, and before an error is printed
        if self._lock is not None:
            os.close(self._lock)

    def lock(self) -> None:
        """Keep other runs from writing to the folder, if it exists; see `lock_folder`."""
        if self._lock is None:
            self._lock = lock_folder(self.folder, self.heartbeat_timeout, self.what)

    def check_free(self, source: Source | None, resumes: bool) -> None:
        """Refuse a folder with an earlier run that this run would overwrite.

        Args:
            source: checkpoint that the run resumes from, None for a fresh run.
            resumes: whether the run was asked to resume from the folder's newest checkpoint, if it has any.

        Raises:
            UserError: the folder contains another run.
        """
        if is_taken(self.folder, self.names, source, resumes):
            raise UserError(
                f"{self.what}: already contains a run; resume it with {setting('auto_resume')}, or choose another "
                "folder"
            )

    def open(
        self,
        run: dict[str, Any],
        covers: Callable[[dict[str, Any]], bool],
        source: Source | None,
        resumes: bool,
        scalars: bool = True,
    ) -> None:
        """Prepare the folder and open the files. Renames damaged checkpoints.

        Args:
            run: description of the run, for log.txt.
            covers: returns whether a line of log.txt comes before the position at which the run starts or resumes.
            source: checkpoint that the run resumes from, None for a fresh run.
            resumes: whether the run was asked to resume from the folder's newest checkpoint, if it has any.
            scalars: also write TensorBoard's files.

        Raises:
            UserError: the folder cannot be written, or contains another run.
        """
        make_folder(self.folder, self.what)
        self.lock()
        self.check_free(source, resumes)
        for damaged in self.names.later(self.folder, source.checkpoint) if source else []:
            damaged.rename(f"{damaged}.damaged")
        for unfinished in self.folder.glob("*.pth.tmp"):
            unfinished.unlink()
        try:
            log = Log(self.folder / LOG, covers)
        except OSError as error:
            raise UserError(f"{self.what}: cannot be written ({error.strerror}); choose another folder") from None
        log.add_run(run)
        writer = CheckpointWriter(self.folder, self.names)
        self._files = _Files(log, Scalars(self.folder) if scalars else None, writer)

    def log_epoch(self, entry: dict[str, Any], stats: dict[str, float], epoch: int) -> None:
        """Add an epoch to log.txt and to TensorBoard's files.

        Args:
            entry: the line of log.txt.
            stats: values for TensorBoard.
            epoch: the epoch.
        """
        if self._files is not None:
            self._files.log.add(entry)
            if self._files.scalars is not None:
                self._files.scalars.add(stats, epoch)

    def log(self, entry: dict[str, Any]) -> None:
        """Add a line to log.txt."""
        if self._files is not None:
            self._files.log.add(entry)

    def log_event(self, entry: dict[str, Any]) -> None:
        """Add an event to log.txt, and print it."""
        if self._files is not None:
            self._files.log.add(entry)
            print_main(", ".join(f"{name} {value}" for name, value in entry.items()))

    def save(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        """Write a checkpoint, after all earlier lines of log.txt."""
        if self._files is not None:
            self._files.log.flush()
            self._files.checkpoints.save(checkpoint, is_best)

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: log.txt or the last checkpoint could not be written.
        """
        if self._files is None:
            return
        self._files.checkpoints.wait()
        self._files.log.flush()
        failures = {"the last checkpoint": self._files.checkpoints.failure, LOG: self._files.log.failure}
        for what, failure in failures.items():
            if failure:
                raise UserError(
                    f"{self.what}: {what} could not be written ({failure}); free some disk space and run "
                    f"the command again with {setting('auto_resume')}"
                )

    def unreported(self, page: str) -> str:
        """Path of a complete run's best checkpoint, or else its newest; "" if it has a report. A collective call.

        Args:
            page: path of the report in the folder.
        """
        saved = (self.folder / self.names.best, *self.names.numbered(self.folder))
        path, made = next((path for path in saved if path.exists()), Path()), self.folder / page
        is_done = made.exists() and made.stat().st_mtime >= path.stat().st_mtime
        return all_gather(["" if is_done else str(path)])[0]

    def complete(self) -> None:
        """Write the final files of a run: the newest checkpoint under its additional name, and the plot of the curves.

        Raises:
            OSError: a file cannot be written.
        """
        if saved := self.names.numbered(self.folder):
            hard_link(saved[0], self.names.newest)
        plot_curves(self.folder / LOG, self.folder / CURVES)


class _Files(NamedTuple):
    """Open files of a run."""

    log: Log
    scalars: Scalars | None
    checkpoints: CheckpointWriter


def stopped(output: Output, position: str, status: int, flags: Mapping[str, str]) -> Preempted:
    """Close the files of a run that was asked to stop and has saved. Returns the exception that ends the command.

    Args:
        output: the files.
        position: where the run stopped, for the final message.
        status: the exit status.
        flags: the command's flags by setting.
    """
    resume = f"{position}; {with_flags('the same command with `auto_resume` resumes', flags)}"
    try:
        on_main_process(output.close)
    except UserError as error:
        print_main(f"WARNING: {with_flags(str(error), flags)}")
        return Preempted(f"{resume} from the last checkpoint", status)
    return Preempted(f"{resume} there", status)


def lock_folder(folder: Path, heartbeat_timeout: float, what: str) -> int | None:
    """Keep other runs from writing to a folder until this process ends.

    Args:
        folder: the folder.
        heartbeat_timeout: the heartbeat timeout in seconds. If a run's launcher is killed, its processes may keep
            training for up to twice this time. The lock waits for these processes to end.
        what: the folder's setting and value, for messages.

    Returns:
        descriptor that holds the lock; None if the folder does not exist or the system has no locks.

    Raises:
        UserError: another run is writing to the folder.
    """
    if fcntl is None or not folder.is_dir():
        return None
    lock = os.open(folder, os.O_RDONLY)
    for second in range(max(LOCK_TIMEOUT, math.ceil(2 * heartbeat_timeout))):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if second == 0:
                print_main(f"output folder {folder}: another run is writing to it; waiting for that run to end")
            time.sleep(1)
        except OSError:
            return None
    raise UserError(f"{what}: another run is writing to it; stop that run, or choose another folder")


def is_taken(folder: Path, names: CheckpointNames, source: Source | None, resumes: bool) -> bool:
    """Whether a folder contains a run that a new or resumed run would overwrite.

    Args:
        folder: the output folder.
        names: names of its checkpoints.
        source: checkpoint that the run resumes from, None for a fresh run.
        resumes: whether the run was asked to resume from the folder's newest checkpoint, if it has any.
    """
    saved = names.numbered(folder)
    if source is None or Path(source.path).resolve().parent != folder.resolve():
        has_checkpoint = any((folder / name).exists() for name in (names.newest, names.best) if name) or bool(saved)
        return has_checkpoint or (not resumes and bool(epoch_entries(read_log(folder / LOG))))
    if source.is_automatic:  # later checkpoints are damaged
        return False
    # A run of the published code has one checkpoint, `run/checkpoint.pth`, from which it may resume in its own folder.
    is_other = bool(names.newest) and Path(source.path).name != names.newest and (folder / names.newest).exists()
    return bool(names.later(folder, source.checkpoint)) or (is_other and not saved)
