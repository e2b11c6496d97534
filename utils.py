"""What training and evaluation share: users' errors, random numbers, processes, progress, log files and curves."""

import argparse
import errno
import gc
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

RESUME_STATUS = 75  # exit status that means: run the same command again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, the value and the way out. The exit status is 2."""


class MachineError(Exception):
    """One of the machine, its storage or its network, which another start need not meet. The exit status is 75."""


class Preempted(Exception):  # noqa: N818 it is no error
    """The run was asked to end, and all processes have come to the same step."""


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command; a user's mistake is one line, of one process.

    Args:
        name: of the script, in front of the line.
        command: what to run.

    Returns:
        the exit status: 0, 2 for a user's mistake, 75 for a run that was preempted or met an error of the machine, 130
        when interrupted.
    """
    try:
        command()
    except UserError as error:
        message = message_of(error)
        if is_main_process():
            print(f"{name}: {message}", file=sys.stderr, flush=True)
        elif dist.is_initialized():
            time.sleep(5)  # where all processes refuse, the main one's line is enough, and ends the others meanwhile
            print(f"{name}: process {get_rank()}: {message}", file=sys.stderr, flush=True)
        return 2
    except Preempted as place:
        print_main(f"{name}: ended by a signal {place}")
        return RESUME_STATUS
    except (MachineError, RuntimeError) as error:
        if not is_of_machine(error):
            raise
        hint = "" if isinstance(error, MachineError) else ", with fewer --num_workers if memory ran out"
        print(f"{name}: process {get_rank()}: {message_of(error)}; run the same command again{hint}", file=sys.stderr,
              flush=True)  # fmt: skip
        return RESUME_STATUS
    except KeyboardInterrupt:
        return 130
    finally:
        end_loader_workers()
        if dist.is_initialized():
            gc.collect()  # what refers to the group in circles would outlive it, and end the process by an abort
            dist.destroy_process_group()
    return 0


def message_of(error: Exception) -> str:
    """An error's line; a loader's worker hands it on below its own traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\w+\.)+\w+Error: ", "", lines[-1])


def is_of_machine(error: BaseException | None) -> bool:
    """Whether another start need not meet an error; also that of a loader's worker that was killed, as the system does
    where memory runs out."""
    is_lost_worker = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    return is_lost_worker or isinstance(error, MachineError)


def end_loader_workers() -> None:
    """Kill the loaders' workers: they ignore the signal by which Python ends them."""
    if workers := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take their end for an accident
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, handler)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse's own pattern knows no exponents: it would take the -1e-3 of `--lr -1e-3` for a setting
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """Type of a setting that lies in [low, high], or (`open_low`) in (low, high]."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (open_low and value == low):
            bound = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: {bound}" + ("" if high == math.inf else f" and at most {high}")
            )
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, natural = number(int, 1), number(int, 0)
positive, non_negative, fraction = number(float, 0, open_low=True), number(float, 0), number(float, 0, 1)


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


def _launcher_variables() -> dict[str, str]:
    """The variables that torchrun would set, from those of OpenMPI or of a SLURM job step of several tasks."""
    if "RANK" in os.environ:
        return {}
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        names = dict(RANK="RANK", WORLD_SIZE="SIZE", LOCAL_RANK="LOCAL_RANK")
        variables = {name: os.environ[f"OMPI_COMM_WORLD_{theirs}"] for name, theirs in names.items()}
        places = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # processes on one machine, unless set otherwise
        return variables | {name: value for name, value in places.items() if name not in os.environ}
    if int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
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
        variables["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
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
        UserError: the environment does not tell this process's number.
    """
    os.environ.update(_launcher_variables())
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if world_size > 1:
            raise UserError(f"--world_size {world_size}: RANK is not set; start the processes by torchrun or srun")
        return torch.device(device)
    rank = int(os.environ["RANK"])
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    backend = "nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=timeout)
    is_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"  # the nodes' counts of starts differ
    if dist_url == "env://" and is_one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it starts the processes again, with the addresses of the dead ones in it
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
        meeting = dict(store=dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store))
    else:
        meeting = dict(init_method=dist_url)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=limit, **meeting)
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
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def print_line(line: str) -> None:
    """Print a line; one that is written into a progress bar goes above it."""
    tqdm.write(line, file=sys.stdout)
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
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.txt, one JSON object each; none where there is no such file.

    Raises:
        UserError: a line is no JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: not as a run writes it ({error}); move it away, a run goes on without it") from None


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
