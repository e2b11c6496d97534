"""What training and evaluation share: users' errors, random numbers, processes, progress, log files and curves."""

import errno
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RESUME_STATUS = 75  # exit status that means: run the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPT_STATUS = 130  # that of a command that was ended by Ctrl-C


def one_line(text: str) -> str:
    """A text with escapes in place of what cannot be printed in a line: names of files may have line breaks in them,
    and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class OneLineError(Exception):
    """An error that tells a user what is wrong in one line.

    Args:
        message: the line.
    """

    def __init__(self, message: str = "") -> None:
        # PyTorch raises a loader worker's error again, by its class and a text that ends with the error's own
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.strip().splitlines()[-1].partition("Error: ")[2]
        super().__init__(one_line(message))


class UserError(OneLineError):
    """A mistake of the user's: the line names the thing, the value and the way out. The exit status is 2."""


class LocalError(UserError):
    """A mistake that this process alone may meet, and prints whichever it is."""


class MachineError(OneLineError):
    """A transient error of the machine, its storage or its network: rerunning may succeed. The exit status is 75."""


class Preempted(Exception):  # noqa: N818 it is no error
    """The run was asked to end, and all processes have come to the same step.

    Args:
        place: where it ended, for the last line.
        status: the exit status.
    """

    def __init__(self, place: str = "", status: int = RESUME_STATUS) -> None:
        super().__init__(place)
        self.status = status


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers
# ----------------------------------------------------------------------------------------------------------------------


class Stream(IntEnum):
    """What random numbers are for. They follow from that, the seed, and the place in the run where they are drawn, so
    that a run that is stopped and continued, by other processes and workers too, draws the same ones."""

    WEIGHTS = 0
    SHUFFLE = 1
    AUGMENTATION = 2
    REPLACEMENT = 3
    STEP = 4


def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers, such as a stream, the run's seed and an epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators, of all devices, with what is derived from some numbers."""
    seed = derived_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


def best_device() -> str:
    """The best kind of device there is: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def environment_number(name: str, default: int, least: int = 0, most: int | None = None) -> int:
    """A whole number from an environment variable, such as a launcher sets.

    Args:
        name: of the variable.
        default: the number where it is not set.
        least: lowest valid number.
        most: highest valid number, None for any.

    Raises:
        UserError: it is no such number.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
        bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise LocalError(f"environment variable {name}={text}: takes a whole number {bounds}; unset it or correct it")
    return int(text)


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher_variables() -> dict[str, str]:
    """The variables that torchrun would set, from those of OpenMPI or of a SLURM job step of several tasks."""
    if "RANK" in os.environ:
        return {}
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        names = dict(RANK="RANK", WORLD_SIZE="SIZE", LOCAL_RANK="LOCAL_RANK")
        variables = {name: os.environ[f"OMPI_COMM_WORLD_{theirs}"] for name, theirs in names.items()}
        places = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # processes on one machine, unless set otherwise
        return variables | {name: value for name, value in places.items() if name not in os.environ}
    if "SLURM_PROCID" not in os.environ or environment_number("SLURM_NTASKS", 1, least=1) < 2:
        return {}
    variables = dict(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
    )
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "localhost")
        variables["MASTER_ADDR"] = _first_node(nodes)
    if "MASTER_PORT" not in os.environ:
        # the same on all tasks of a job, another one for another job on the node
        variables["MASTER_PORT"] = str(20000 + environment_number("SLURM_JOB_ID", 0) % 20000)
    return variables


def _first_node(nodes: str) -> str:
    """The first host of a SLURM node list such as 'gpu[03-05,9],cpu1'."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"SLURM node list {nodes}: `{' '.join(command)}` failed ({error}); set MASTER_ADDR") from None


def init_distributed(device: str, world_size: int, dist_url: str, timeout: float = 1800.0) -> torch.device:
    """Join the process group if torchrun, torch.distributed.launch, SLURM or OpenMPI started several processes.

    Args:
        device: 'cuda', 'mps' or 'cpu', or one with an index. nccl joins CUDA processes, gloo all others.
        world_size: number of processes where the environment does not tell it.
        dist_url: where the processes meet (`env://`: MASTER_ADDR and MASTER_PORT).
        timeout: seconds that a process waits for the others.

    Returns:
        this process's device, which is also CUDA's current one.

    Raises:
        UserError: the environment does not tell this process's number, or the processes cannot meet.
    """
    os.environ.update(_launcher_variables())
    if device == "cuda":
        device = f"cuda:{environment_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if world_size > 1:
            raise UserError(f"--world_size {world_size}: RANK is not set; start the processes by torchrun or srun")
        return torch.device(device)
    world_size = environment_number("WORLD_SIZE", world_size, least=1)
    rank = environment_number("RANK", 0, most=world_size - 1)
    if not re.match("(env|tcp|file)://", dist_url):
        raise UserError(f"--dist_url {dist_url}: unknown; takes env://, tcp://HOST:PORT or file://PATH")
    if dist_url == "env://":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"environment variable RANK={rank} is set, {' and '.join(missing)} not; start the "
                            "processes by torchrun or srun, or unset RANK for one process alone")  # fmt: skip
        environment_number("MASTER_PORT", 0, most=65535)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=timeout)
    is_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"  # the nodes' counts of starts differ
    if dist_url == "env://" and is_one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it starts the processes again, with the addresses of the dead ones in it
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
        meeting = dict(store=dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store))
    else:
        meeting = dict(init_method=dist_url)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit, **meeting)
    except ValueError as error:
        raise UserError(f"--dist_url {dist_url}: not an address where processes can meet ({error})") from None
    except dist.DistNetworkError as error:
        raise MachineError(f"the processes do not meet ({str(error).splitlines()[0]}); if this stays so, look at "
                           "MASTER_ADDR, and take another MASTER_PORT") from None  # fmt: skip
    return torch.device(device)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes; also told before the group is joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not rank.isdigit() or int(rank) == 0  # no number: someone has to say so


def print_line(line: str) -> None:
    """Print a line; one that is written into a progress bar goes above it."""
    tqdm.write(one_line(line), file=sys.stdout)
    sys.stdout.flush()


def print_main(line: str) -> None:
    """Print a line on the main process alone."""
    if is_main_process():
        print_line(line)


def on_processes(function: Callable[[], None], here: bool) -> None:
    """Run a function on some processes; where one fails, all do, so that none waits for it.

    Args:
        function: what to run.
        here: whether this process runs it.

    Raises:
        UserError: the function's.
        Exception: likewise; on the other processes a RuntimeError that tells of it.
    """
    failure: Exception | None = None
    if here:
        try:
            function()
        except Exception as error:  # whatever it is, the others would wait
            failure = error
    if get_world_size() > 1:
        told = failure if failure is None or isinstance(failure, UserError) else RuntimeError(repr(failure))
        failures = [None] * get_world_size()
        dist.all_gather_object(failures, told)
        failure = failure or next((other for other in failures if other is not None), None)
    if failure is not None:
        raise failure


def on_main_process(function: Callable[[], None]) -> None:
    """Run a function on the main process; what it refuses is refused on all of them.

    Raises:
        UserError: the function's.
    """
    on_processes(function, is_main_process())


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of the processes' tensors, on all of them."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def of_main_process(values: Tensor) -> Tensor:
    """The main process's tensor, on all of them."""
    if get_world_size() > 1:
        dist.broadcast(values, 0)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Progress
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Iterates over batches and shows how it goes: a bar on a terminal, a line every so often in a file.

    Args:
        batches: the batches.
        title: in front of each line.
        every: batches between two reports. Numbers that live on a GPU are waited for only then.
        total: number of batches, with those before these; 0 where that is not known.
        done: number of batches before these, for a round that is continued.
        later: how many more such rounds the run has, for its time left.
    """

    def __init__(
        self, batches: Iterable[Any], title: str, every: int, total: int, done: int = 0, later: int = 0
    ) -> None:
        self.batches = batches
        self.title = title
        self.every = every
        self.later = later
        self.total = total
        self.images = 0
        self.done = self.before = done
        self.start = time.perf_counter()
        self.bar = None
        if is_main_process() and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=self.total or None, initial=done, desc=title, bar_format=layout, file=sys.stdout,
                            dynamic_ncols=True)  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches:
                yield batch
                if self.bar is not None:
                    self.bar.update()
        finally:
            if self.bar is not None:
                self.bar.close()

    def advance(self, images: int) -> bool:
        """Count a batch of `images` images (of all processes); tells whether it is time to report."""
        self.done += 1
        self.images += images
        return self.done % self.every == 0 or self.done == self.total

    def report(self, **values: str) -> None:
        """Show values, the speed so far and the time left."""
        seconds = time.perf_counter() - self.start
        pace = seconds / (self.done - self.before)
        left = max(0.0, pace * (self.total - self.done))
        values["images/s"] = f"{self.images / seconds:.1f}"
        if self.bar is None and self.total:
            values["left"] = str(timedelta(seconds=round(left)))
        if self.later:
            values["run left"] = str(timedelta(seconds=round(left + self.later * pace * self.total)))
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            place = f"{self.done:{len(str(self.total))}}/{self.total}" if self.total else str(self.done)
            print_main(f"{self.title} [{place}] {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Storage that does not answer
# ----------------------------------------------------------------------------------------------------------------------

PAUSES = (1, 2, 4, 8, 15, 30)  # seconds between attempts to read from storage that does not answer
# what the operating system says of a file itself; the rest is of the storage or the machine
FILE_ERRORS = {errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
               errno.EPERM}  # fmt: skip


def is_of_storage(error: Exception, folder: str | Path) -> bool:
    """Whether an error in reading a file is not the file's, but the storage's or the machine's.

    Args:
        error: the error.
        folder: that is there whenever the storage is.
    """
    if isinstance(error, OSError) and error.errno is not None:  # image libraries' own have no number
        return error.errno not in FILE_ERRORS or not os.path.isdir(folder)
    return isinstance(error, MemoryError)


def patiently(read: Callable[[], Any], folder: str | Path, pauses: Sequence[int] = PAUSES) -> Any:
    """What `read` returns; where it fails because the storage does not answer, it is tried again after pauses."""
    for attempt, pause in enumerate(pauses):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not is_of_storage(error, folder):
                raise
            if attempt == 0:
                print_line(f"WARNING: {error or 'out of memory'}: trying again for {sum(pauses)} seconds")
            time.sleep(pause)
    return read()


# ----------------------------------------------------------------------------------------------------------------------
# The output folder
# ----------------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and check that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {folder}: its name is not UTF-8, which TensorBoard needs; name another folder"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.txt, one JSON object each; none where there is no such file.

    Raises:
        UserError: a line is no JSON object.
    """
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if others := [entry for entry in entries if not isinstance(entry, dict)]:
            raise ValueError(f"a line is {json.dumps(others[0])[:40]}, not an object")
    except ValueError as error:
        raise UserError(f"{path}: not as a run writes it ({error}); move it away, a run resumes without it") from None
    return entries


def epochs_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that sum up an epoch, without those of what the run is and what happened in it."""
    return [entry for entry in log if "train_loss" in entry]


class Log:
    """log.txt, whole at any time: first what the run is, then a line an epoch, and one for each thing that happened.

    Args:
        path: of the file.
        epoch: where the run begins or goes on; lines from there on are taken off.
        step: likewise.

    Attributes:
        failure: why its last lines could not be written, None where they were.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, epoch: int, step: int) -> None:
        self.path = path
        self.failure: str | None = None
        self.entries = []
        for entry in read_log(path) if (epoch, step) != (0, 0) else []:
            # an epoch's line stands behind all its steps
            if "epoch" not in entry or (entry["epoch"], entry.get("step", math.inf)) <= (epoch, step):
                self.entries.append(entry)
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line. Where it cannot be written (a full disk), that is said, and tried again by `flush`."""
        self.entries.append(entry)
        try:
            self._write()
        except OSError as error:
            self.failure = error.strerror
            print_line(f"WARNING: {self.path} could not be written ({error.strerror}); training goes on")

    def flush(self) -> None:
        """Write the lines that could not be written yet."""
        if self.failure:
            with suppress(OSError):
                self._write()

    def add_run(self, run: dict[str, Any]) -> None:
        """Say what the run is, where that is not what was said last."""
        last = [entry for entry in self.entries if "settings" in entry][-1:]
        run = json.loads(json.dumps(run))  # as it reads
        if last != [run]:
            self.add(run)

    def _write(self) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        write_file(self.path, lambda file: file.write(text.encode()))
        self.failure = None


class Scalars:
    """TensorBoard's files in a folder. Where they cannot be written, that is said, and the next epoch tries again.

    Args:
        folder: of the files. What they have from the first epoch on that is added here is hidden.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._unwritten: list[tuple[int, dict[str, float]]] = []

    def add(self, stats: dict[str, float], epoch: int) -> None:
        """Add an epoch's figures."""
        self._unwritten.append((epoch, stats))
        try:
            self._writer = self._writer or SummaryWriter(self.folder, purge_step=self._unwritten[0][0])
            for step, values in self._unwritten:
                for name, value in values.items():
                    self._writer.add_scalar(name.replace("_", "/", 1), value, step)
            self._writer.flush()
            self._unwritten.clear()
        except OSError as error:
            self._writer = None  # it does not recover
            print_line(f"WARNING: TensorBoard's files in {self.folder} could not be written ({error.strerror})")


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file so that a reader, also after a power cut, sees the previous one or the whole of the next one.

    Args:
        path: the file.
        write: writes to an open binary file.

    Raises:
        OSError: it cannot be written; the previous file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except RuntimeError as error:  # torch's writer says nothing of the reason, the error behind its own does
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, on file systems that know how to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def plot_curves(log: Path, picture: Path) -> None:
    """Draw loss, accuracy and learning rate of log.txt over the epochs.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when there is a run to draw
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = epochs_of(read_log(log))
    panels = {
        "loss": {"train_loss": "training", "test_loss": "validation", "test_ema_loss": "validation, averaged weights"},
        "accuracy (%)": {"test_acc1": "top-1", "test_acc5": "top-5", "test_ema_acc1": "top-1, averaged weights"},
        "learning rate": {"train_lr": "learning rate"},
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name, label in curves.items():
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points), marker="o" if len(points) < 30 else "", label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    write_file(picture, lambda file: figure.savefig(file, format="png", dpi=100))
