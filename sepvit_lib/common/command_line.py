"""Shared by all commands: argument parsing, one-line errors, and output streams whose errors cannot end a run."""

import argparse
import ast
import difflib
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch.distributed as dist

from sepvit_lib.common.devices import keep_freed_memory
from sepvit_lib.common.errors import (
    INTERRUPT_STATUS,
    RESUME_STATUS,
    USER_ERROR_STATUS,
    LocalError,
    MachineError,
    Preempted,
    UserError,
    has_single_value,
    is_transient,
    is_worker_traceback,
    one_line,
    out_of_files,
    out_of_memory,
    out_of_shared_memory,
    setting,
    with_flags,
)
from sepvit_lib.common.processes import get_rank, is_main_process, print_main

SHARED_MEMORY = Path("/dev/shm")

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Argument parser that raises a `UserError` for a mistake. Flags may be spelled with `-` or `_`.

    Three private parts of argparse (Python 3.10 to 3.12) are used here and nowhere else: `_actions`,
    `_option_string_actions` and `_negative_number_matcher`. argparse has no public way to list the options of a parser.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse's own pattern does not match exponents: the -1e-3 of `--lr -1e-3` would be parsed as an option.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse a command line; see argparse.

        Raises:
            UserError: a setting is unknown, missing, or has an invalid value.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise UserError(f"{flag}: unknown setting{self.suggestion(flag)}; --help lists all")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the known settings of a command line, in either spelling; see argparse."""
        spellings = {option.replace("_", "-"): option for option in self._option_string_actions}

        def spelled(argument: str) -> str:
            flag, equals, value = argument.partition("=")
            return spellings.get(flag.replace("_", "-"), flag) + equals + value if flag.startswith("--") else argument

        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([spelled(argument) for argument in arguments], namespace)

    def suggestion(self, flag: str) -> str:
        """Suggest settings similar to an unknown one, as the end of a message; "" if there are none."""
        options = [option for option in self._option_string_actions if "--" in option]
        similar = difflib.get_close_matches(flag, options, 2, 0.75)
        return f"; did you mean {' or '.join(similar)}?" if similar else ""

    def actions(self) -> dict[str, argparse.Action]:
        """Map option names, with `_` and without leading dashes, to argparse's actions. Skips `--no-…` options."""
        return {
            option.lstrip("-").replace("-", "_"): action
            for action in self._actions
            for option in action.option_strings
            if not option.startswith("--no-") or option.replace("no-", "", 1) not in action.option_strings
        }

    def flags(self) -> dict[str, str]:
        """Map each setting to its flag, or to its placeholder if it is a positional argument."""
        flags: dict[str, str] = {}
        for action in self._actions:
            flags[action.dest] = action.option_strings[0] if action.option_strings else str(action.metavar)
            flags |= {option[2:].replace("-", "_"): option for option in action.option_strings if "--no-" in option}
        return flags


class KeyValues(argparse.Action):
    """Settings KEY=VALUE …, as a dictionary.

    Values are Python literals or, failing that, strings, as with timm's `ParseKwargs`.
    """

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Set the dictionary. Tuples become lists, as in a recipe.

        Raises:
            ArgumentError: an argument has no `=`.
        """
        pairs = {}
        for key, equals, text in (argument.partition("=") for argument in values):
            if not equals:
                raise argparse.ArgumentError(self, f"{key}: expected KEY=VALUE")
            text = dict(true="True", false="False", null="None").get(text.lower(), text)
            try:
                pairs[key] = json.loads(json.dumps(ast.literal_eval(text)))
            except (SyntaxError, TypeError, ValueError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


class Size(argparse.Action):
    """An image size: one side, or height and width. The value is a number for a square, otherwise a list."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Set the size.

        Raises:
            UserError: there are more than two numbers.
        """
        if len(values) > 2:
            raise UserError(f"{setting(self.dest, *values)}: takes one side, or H and W")
        setattr(namespace, self.dest, values[0] if len(set(values)) == 1 else values)


def number(kind: type[int] | type[float], low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """Make an argparse type for finite numbers from low to high, inclusive.

    Args:
        kind: int or float.
        low: lowest value.
        high: highest value.
        open_low: exclude `low` itself.
    """

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
seconds = number(float, 0, 30 * 24 * 3600, open_low=True)  # much longer timeouts overflow in process groups


def image_size(text: str) -> tuple[int, int]:
    """Parse an image size: one side, or HEIGHTxWIDTH."""
    height, by, width = text.partition("x")
    return positive_int(height), positive_int(width if by else height)


def path(text: str) -> str:
    """Argparse type for paths. Expands a leading ~, because shells do not expand it in `--flag=~/…`."""
    return os.path.expanduser(text)


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def run_command(
    name: str,
    command: Callable[[], int | None],
    parser: Parser | None = None,
    memory_advice: str = "use smaller batches",
) -> int:
    """Run a command, and print any user error in one line.

    A user error that all processes raise is printed once. Freed memory is kept for reuse.

    Args:
        name: the script's name, printed before errors.
        command: the function to run. It may return an exit status.
        parser: the command's parser, which has the flags of the settings mentioned in errors.
        memory_advice: what to do when memory runs out, for messages.

    Returns:
        the exit status: the value that `command` returned (0 for None); 2 for a user error; 75 for a preempted run or
        a transient error; 130 after Ctrl-C.
    """
    keep_freed_memory()
    with unfailing_output():
        try:
            return _run(name, command, parser.flags() if parser else {}, memory_advice)
        finally:
            kill_child_processes()
            if dist.is_initialized():
                gc.collect()  # reference cycles would keep the group alive, and Python would abort at exit
                dist.destroy_process_group()


def _run(name: str, command: Callable[[], int | None], flags: Mapping[str, str], memory_advice: str) -> int:
    try:
        return command() or 0
    except UserError as error:
        return _refuse(name, with_flags(str(error), flags), is_local=isinstance(error, LocalError))
    except Preempted as position:
        print_main(f"{name}: stopped by a signal {position}")
        return position.status
    except (MachineError, RuntimeError, MemoryError, OSError, ValueError) as error:
        if out_of_shared_memory(error):
            return _refuse(name, with_flags(shared_memory_advice(), flags))
        workers = with_flags(setting("num_workers"), flags)
        if out_of_memory(error):
            return _refuse(name, f"out of memory ({first_line(error)}); {memory_advice}")
        if out_of_files(error):
            return _refuse(name, f"too many open files; raise the limit (ulimit -n), or use fewer {workers}")
        if has_single_value(error):
            batches = flags.get("batch_size", "train_dataloader.batch_size")
            return _refuse(name, f"{batches}: BatchNorm needs more than one value per channel; use larger batches")
        if not is_transient(error):
            raise
        hint = "" if isinstance(error, MachineError) else f", with fewer {workers} if memory ran out"
        print(
            f"{name}: process {get_rank()}: {with_flags(first_line(error), flags)}; run the same command again{hint}",
            file=sys.stderr,
            flush=True,
        )
        return RESUME_STATUS
    except KeyboardInterrupt:
        if is_main_process():
            print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPT_STATUS


def _refuse(name: str, message: str, is_local: bool = False) -> int:
    """Report a user error; if it occurs on all processes, report it once. Returns the exit status."""
    if is_main_process() or is_local:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    elif dist.is_initialized():
        time.sleep(5)  # if all ranks fail like this, rank 0 reports the error, and the launcher ends the others now
        print(f"{name}: process {get_rank()}: {message}", file=sys.stderr, flush=True)
    return USER_ERROR_STATUS


def first_line(error: BaseException) -> str:
    """Return the informative line of an error's text: the last of a loader worker's traceback, otherwise the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[-1] if is_worker_traceback(str(error)) else lines[0])


def shared_memory_advice() -> str:
    """Return one line of advice for when shared memory runs out."""
    size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.0f} MiB in all)" if SHARED_MEMORY.is_dir() else ""
    return (
        f"{SHARED_MEMORY}{size} is full; loader workers pass their batches through it; enlarge it "
        f"(docker run --shm-size=8g), or use fewer {setting('num_workers')} (0 uses none) or a smaller "
        f"{setting('batch_size')}"
    )


def kill_child_processes() -> None:
    """Kill the processes that multiprocessing started. At exit, Python would send SIGTERM, which workers ignore."""
    if children := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a crashed worker
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------


class UnfailingStream:
    """A text stream that ignores write errors: a full disk or a closed pipe must not end a run.

    Args:
        stream: the stream to print to; None if the process has none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: TextIO = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 as long-lived as this object

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Flush the stream. If this fails, redirect it to the null device, so that Python can flush it at exit."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # the stream may have no descriptor
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Ignore broken streams when printing, and print unencodable characters as \\u…"""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    unfailing = [UnfailingStream(stream) for stream in before]
    sys.stdout, sys.stderr = unfailing
    try:
        yield
    finally:
        for each in unfailing:
            each.finish()
        sys.stdout, sys.stderr = before
