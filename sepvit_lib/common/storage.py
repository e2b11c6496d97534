"""File operations: reading with retries, creating and removing folders, and atomic writing."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import print_line

T = TypeVar("T")

PAUSES = (1, 2, 4, 8, 15, 30)  # seconds between attempts to read from storage that does not respond
# Errors caused by the file itself. All other errors are caused by the storage or the machine.
FILE_ERRORS = {
    errno.EACCES,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
}

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def is_storage_error(error: Exception, folder: str | Path) -> bool:
    """Whether reading a file failed because of the storage or the machine, not the file.

    Args:
        error: the error.
        folder: a folder that exists whenever the storage is available.
    """
    if isinstance(error, OSError) and error.errno is not None:  # image libraries raise OSErrors without errno
        return error.errno not in FILE_ERRORS or not os.path.isdir(folder)
    return isinstance(error, MemoryError)


def with_retries(read: Callable[[], T], folder: str | Path, pauses: Sequence[int] = PAUSES) -> T:
    """Call `read`, and retry after pauses while the storage does not respond.

    Args:
        read: the call.
        folder: a folder that exists whenever the storage is available.
        pauses: seconds between the attempts.

    Raises:
        Exception: the last attempt failed, or the file itself is at fault. The latter is not retried.
    """
    for attempt, pause in enumerate(pauses):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not is_storage_error(error, folder):
                raise
            if attempt == 0:
                print_line(f"WARNING: {error or 'out of memory'}: retrying for {sum(pauses)} seconds")
            time.sleep(pause)
    return read()


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def missing_folders(*folders: Path) -> list[Path]:
    """List which of the folders and their parents do not exist, deepest first."""
    missing = {path for folder in folders for path in (folder, *folder.parents) if not path.exists()}
    return sorted(missing, key=lambda path: -len(path.parts))


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove the empty ones among the folders, in the given order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def make_folder(folder: Path, what: str) -> None:
    """Make a folder and check that it is writable.

    Args:
        folder: the folder.
        what: setting and value, for messages.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}); choose another folder") from None


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically: readers see the previous version or the complete new one, even after a power failure.

    Args:
        path: the file.
        write: writes to an open binary file.

    Raises:
        OSError: the file cannot be written. The previous version is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except RuntimeError as error:  # torch.save turns an OSError into a RuntimeError, and keeps it as `__context__`
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, write: Callable[[IO[bytes]], Any], what: str) -> None:
    """Write an output file atomically, and create its folder.

    Args:
        path: the file.
        write: writes to an open binary file.
        what: setting and value that name the file or its folder, for messages.

    Raises:
        UserError: the file cannot be written. The previous version is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, write)
    except OSError as error:
        advice = "free some disk space, or choose a different path"
        raise UserError(f"{what}: {path.name} could not be written ({error.strerror}); {advice}") from None


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
