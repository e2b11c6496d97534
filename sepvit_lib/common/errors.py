"""Errors that end a command, exit statuses, and functions that recognise library errors by their text."""

import errno
import re
from collections.abc import Mapping
from itertools import chain

import torch
import torch.distributed as dist

RESUME_STATUS = 75  # exit status for "run the same command again" (EX_TEMPFAIL of sysexits.h)
INTERRUPT_STATUS = 130  # exit status after Ctrl-C
USER_ERROR_STATUS = 2
UNREADABLE_STATUS = 1  # exit status of predict.py if some images are unreadable

SETTING = re.compile(r"`([\w.]+)`")


def setting(name: str, *values: object) -> str:
    """Format a setting's name and values for a message.

    Library code does not know a command's flags, so it writes the setting's name in backquotes. The command that prints
    the message replaces the name with its flag (`with_flags`).

    Args:
        name: the setting's name, e.g. 'data_path'.
        values: its values.
    """
    words = (
        (f"{key}={one}" for key, one in value.items()) if isinstance(value, Mapping) else [value] for value in values
    )
    return " ".join([f"`{name}`", *map(str, chain(*words))])


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace the names of settings in a message (see `setting`) with a command's flags.

    Args:
        message: the message.
        flags: flag of each setting, e.g. {'data_path': '--data-path'}. Config keys, which contain dots, lose their
            backquotes; other names without a flag stay unchanged.
    """
    return SETTING.sub(lambda match: flags.get(match[1], match[1] if "." in match[1] else match[0]), message)


def one_line(text: str) -> str:
    """Escape the unprintable characters of a string. File names may contain line breaks and invalid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class OneLineError(Exception):
    """An error that is reported to the user in one line.

    Args:
        message: the line. Settings in it are formatted by `setting`.
    """

    def __init__(self, message: str = "") -> None:
        # PyTorch re-raises a loader worker's error with the same class, and with the whole traceback as the message.
        if is_worker_traceback(message):
            message = message.strip().splitlines()[-1].partition("Error: ")[2]
        super().__init__(one_line(message))


class UserError(OneLineError):
    """A mistake by the user. The message contains the setting, its value and the way out. The exit status is 2."""


class LocalError(UserError):
    """A user error that may occur on some processes only. Each of these processes reports it."""


class MachineError(OneLineError):
    """A transient error of the machine, its storage or its network. Rerunning may succeed. The exit status is 75."""


class Preempted(Exception):  # noqa: N818 not an error
    """The run was asked to stop, and all ranks have stopped at the same step.

    Args:
        position: where the run stopped, for the final message.
        status: the exit status.
    """

    def __init__(self, position: str = "", status: int = RESUME_STATUS) -> None:
        super().__init__(position)
        self.status = status


# ----------------------------------------------------------------------------------------------------------------------
# Library errors. PyTorch raises RuntimeError for most of them, so only the text distinguishes them. Each function below
# is tested with the error texts of the pinned versions (tests/unit/test_private_parts.py, tests/unit/test_failures.py).
# ----------------------------------------------------------------------------------------------------------------------


def is_worker_traceback(text: str) -> bool:
    """Whether an error's text is the traceback of a loader worker. Its last line is the error itself."""
    return text.startswith("Caught ") and "\nOriginal Traceback" in text


def is_transient(error: BaseException | None) -> bool:
    """Whether an error is transient, such as a killed loader worker. Rerunning may succeed."""
    is_lost_worker = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    return is_lost_worker or isinstance(error, MachineError)


def is_communication_error(error: BaseException | None) -> bool:
    """Whether a collective call failed, usually because another rank is gone."""
    is_backend = isinstance(error, RuntimeError) and bool(re.search("gloo|nccl", str(error), re.IGNORECASE))
    return is_backend or isinstance(error, dist.DistError)


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its accelerator ran out of memory, in this process or in a loader worker."""
    texts = "DefaultCPUAllocator|(MPS backend|CUDA error:) out of memory|_STATUS_ALLOC_FAILED|Cannot allocate memory"
    by_text = isinstance(error, RuntimeError) and bool(re.search(texts, str(error)))
    return by_text or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def has_single_value(error: BaseException) -> bool:
    """Whether BatchNorm received only one value per channel in training, and so could not compute a variance."""
    return isinstance(error, (RuntimeError, ValueError)) and "Expected more than 1 value per channel" in str(error)


def out_of_shared_memory(error: BaseException) -> bool:
    """Whether shared memory ran out. Loader workers pass their batches through it."""
    pattern = r"shared memory\(shm\)|</torch_\w+>: No space left|Bus error"
    return isinstance(error, RuntimeError) and bool(re.search(pattern, str(error)))


def out_of_files(error: BaseException) -> bool:
    """Whether the process or the system has too many open files. Each loader worker opens some."""
    return (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or (
        isinstance(error, RuntimeError) and "Too many open files" in str(error)
    )
