"""What all commands share: settings from the command line, errors as one line, and output that cannot end a run."""

import argparse
import difflib
import errno
import gc
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

from utils import (
    INTERRUPT_STATUS,
    RESUME_STATUS,
    LocalError,
    MachineError,
    Preempted,
    UserError,
    get_rank,
    is_main_process,
    one_line,
    print_main,
)

SHARED_MEMORY = Path("/dev/shm")
MOST_UNPRINTED = 10_000  # lines that are kept for log.txt

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command. In the names of settings `-` and `_` are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse's own pattern knows no exponents: it would take the -1e-3 of `--lr -1e-3` for a setting
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse a command line; see argparse.

        Raises:
            UserError: a setting is unknown, missing, or has a wrong value.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"{flag}: unknown setting{self.suggestion(flag)}; --help lists all")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse what is known of a command line, however its settings are spelled; see argparse."""
        spellings = {option.replace("_", "-"): option for option in self._option_string_actions}

        def spelled(argument: str) -> str:
            flag, equals, value = argument.partition("=")
            return spellings.get(flag.replace("_", "-"), flag) + equals + value if flag.startswith("--") else argument

        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([spelled(argument) for argument in arguments], namespace)

    def suggestion(self, flag: str) -> str:
        """The settings that an unknown one may stand for, as the end of a message; "" where none is like it."""
        like = difflib.get_close_matches(
            flag, [option for option in self._option_string_actions if "--" in option], 2, 0.75
        )
        return f"; did you mean {' or '.join(like)}?" if like else ""


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """Type of a setting: a finite number in [low, high], or (`open_low`) in (low, high]."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not low <= value <= high or (open_low and value == low):
            bound = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: {bound}" + ("" if high == math.inf else f" and at most {high:g}")
            )
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, natural = number(int, 1), number(int, 0)
positive, non_negative, fraction = number(float, 0, open_low=True), number(float, 0), number(float, 0, 1)
positive_fraction = number(float, 0, 1, open_low=True)
seconds = number(float, 0, 30 * 24 * 3600, open_low=True)  # process groups overflow far beyond a month


def path(text: str) -> str:
    """Type of a setting that is a path: a leading ~ is the home folder, which shells leave in `--flag=~/…`."""
    return os.path.expanduser(text)


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def run_command(name: str, command: Callable[[], None], memory_advice: str = "take fewer images at a time") -> int:
    """Run a command; a user's mistake is one line, of one process.

    Args:
        name: of the script, in front of the line.
        command: what to run.
        memory_advice: the way out when memory runs out.

    Returns:
        the exit status: 0, 2 for a user's mistake, 75 for a run that was preempted or met an error of the machine, 130
        when interrupted.
    """
    with unfailing_output():
        try:
            return _run(name, command, memory_advice)
        finally:
            end_loader_workers()
            if dist.is_initialized():
                gc.collect()  # what refers to the group in circles would outlive it, and end the process by an abort
                dist.destroy_process_group()


def _run(name: str, command: Callable[[], None], memory_advice: str) -> int:
    try:
        command()
    except UserError as error:
        return _refuse(name, str(error), is_local=isinstance(error, LocalError))
    except Preempted as place:
        print_main(f"{name}: ended by a signal {place}")
        return place.status
    except (MachineError, RuntimeError, MemoryError, OSError) as error:
        if out_of_shared_memory(error):
            return _refuse(name, shared_memory_advice())
        if out_of_memory(error):
            return _refuse(name, f"out of memory ({last_line(error)}); {memory_advice}")
        if out_of_files(error):
            return _refuse(name, "too many open files; raise the limit (ulimit -n), or use fewer --num_workers")
        if not is_of_machine(error):
            raise
        hint = "" if isinstance(error, MachineError) else ", with fewer --num_workers if memory ran out"
        print(f"{name}: process {get_rank()}: {last_line(error)}; run the same command again{hint}", file=sys.stderr,
              flush=True)  # fmt: skip
        return RESUME_STATUS
    except KeyboardInterrupt:
        if is_main_process():
            print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPT_STATUS
    return 0


def _refuse(name: str, message: str, is_local: bool = False) -> int:
    """Print a user's mistake, once where all processes make it; returns the exit status."""
    if is_main_process() or is_local:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    elif dist.is_initialized():
        time.sleep(5)  # where all processes refuse, the main one's line is enough, and ends the others meanwhile
        print(f"{name}: process {get_rank()}: {message}", file=sys.stderr, flush=True)
    return 2


def last_line(error: BaseException) -> str:
    """What an error says, in one line. Messages of a loader's worker, and of PyTorch, have more."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    in_worker = str(error).startswith("Caught ")
    return one_line(lines[-1] if in_worker else lines[0])


def is_of_machine(error: BaseException | None) -> bool:
    """Whether an error is transient: running the same command again may succeed. Includes a loader's worker that was
    killed, as the system does where memory runs out."""
    is_lost_worker = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    return is_lost_worker or isinstance(error, MachineError)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of its accelerator did not suffice, here or in a loader's worker."""
    texts = ("DefaultCPUAllocator", "MPS backend out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED",
             "Cannot allocate memory")  # fmt: skip
    in_words = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return in_words or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def out_of_shared_memory(error: BaseException) -> bool:
    """Whether the memory through which loader workers hand over their batches did not suffice."""
    pattern = r"shared memory\(shm\)|</torch_\w+>: No space left|Bus error"
    return isinstance(error, RuntimeError) and bool(re.search(pattern, str(error)))


def out_of_files(error: BaseException) -> bool:
    """Whether the process may not open more files, of which loader workers take some each."""
    return (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or (
        isinstance(error, RuntimeError) and "Too many open files" in str(error)
    )


def shared_memory_advice() -> str:
    """What to do where shared memory runs out, in one line."""
    size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.0f} MiB in all)" if SHARED_MEMORY.is_dir() else ""
    return (
        f"{SHARED_MEMORY}{size} is full, through which loader workers hand over their batches; enlarge it "
        "(docker run --shm-size=8g), or use fewer --num_workers (0 needs none) or a smaller --batch-size"
    )


def end_loader_workers() -> None:
    """Kill the loaders' workers: they ignore the signal by which Python ends them."""
    if workers := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take their end for an accident
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------


class UnfailingStream:
    """A text stream that printing to never fails: a full disk or a reader that left must not end a run.

    Args:
        stream: the stream underneath; None where the process was started without one.

    Attributes:
        unprinted: whole lines that could not be printed, until they are taken (`take_unprinted`).
        has_failed: whether anything could not be printed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.has_failed = stream is None
        self.unprinted: list[str] = []
        self._is_missing = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 it lives as long as this
        self._begun = threading.local()  # each thread's line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print a text, a line at a time."""
        self._begun.text = getattr(self._begun, "text", "") + text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Print what was written so far, also the begin of a line, as progress bars do."""
        text, self._begun.text = getattr(self._begun, "text", ""), ""
        if not text:
            return
        try:
            if not self._is_missing:
                self._stream.write(text)
                self._stream.flush()
                return
        except (OSError, ValueError):  # ValueError: it was closed
            self.has_failed = True
        lines = [line for line in text.split("\n") if line.strip()] if "\n" in text else []
        self.unprinted += lines[: MOST_UNPRINTED - len(self.unprinted)]

    def give_up(self) -> None:
        """Let what the stream still holds go nowhere: Python would print it at its end, and fail."""
        with suppress(OSError, ValueError):  # no descriptor, or closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Make printing safe: to streams that fail, and in encodings that lack a character (it is printed as \\u…)."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(UnfailingStream, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if stream.has_failed:
                stream.give_up()
        sys.stdout, sys.stderr = before


def take_unprinted() -> list[str]:
    """The lines that could not be printed since this was called last."""
    lines: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, UnfailingStream):
            lines += stream.unprinted
            stream.unprinted = []
    return lines
