"""Runs scripts as commands, each in a process of its own that has the big libraries imported already.

Importing them takes a command five to ten seconds, and the tests run more than a hundred commands.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ["torchvision", "timm", "torch.utils.tensorboard", "mmengine.runner", "mmseg.apis", "mmdet.apis"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


class Command:
    """A script that runs, in a process with the interface of `subprocess.Popen`'s, as far as the tests need it.

    Args:
        script: the script.
        arguments: of the command.
        folder: to run in.
        environment: all its variables.
        stdout: file to which it appends what it prints.
        stderr: likewise.
        start_new_session: whether it and what it starts can be signalled together, by `os.killpg`.
    """

    def __init__(
        self,
        script: Path,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        stdout: Path,
        stderr: Path,
        start_new_session: bool = False,
    ) -> None:
        self.script, self.arguments = script, arguments
        self._process = _server.Process(
            target=_work, args=(script, arguments, folder, environment, (stdout, stderr), start_new_session)
        )
        self._process.start()
        self.pid = self._process.pid or 0  # not None any more: it has started

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit status.

        Raises:
            TimeoutExpired: it takes too long.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired([str(self.script), *self.arguments], timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _work(
    script: Path,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    printed: tuple[Path, Path],
    start_new_session: bool,
) -> None:
    """The command's process: as if the script had been started by itself."""
    multiprocessing.set_start_method(None, force=True)  # the server handed down its own, which is slower for loaders
    if start_new_session:
        os.setsid()
    for descriptor, path in zip((1, 2), printed):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which is read when torch is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(script), *arguments]
    own = [str(ROOT), str(ROOT / "tests"), ""]  # what the tests themselves see, scripts have to find by themselves
    sys.path[:] = [str(script.parent), *(entry for entry in sys.path if entry not in own)]
    runpy.run_path(str(script), run_name="__main__")


def start_tasks(
    count: int, script: Path, arguments: list[str], folder: Path, environment: dict[str, str], stdout: Path, stderr: Path
) -> list[Command]:
    """Start processes that find each other by the variables that torchrun sets."""
    tasks = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1")
    return [Command(script, arguments, folder, {**environment, **tasks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout, stderr, start_new_session=True) for rank in range(count)]  # fmt: skip


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(
    script: Path, arguments: list[str], folder: Path, environment: dict[str, str], timeout: float, count: int = 0
) -> CompletedProcess:
    """Run a script, on one process or (`count`) on several; returns the finished process with what it printed.

    Its status is the first process's that fails, as torchrun's would be.

    Raises:
        TimeoutExpired: it took too long, and was killed.
    """
    with tempfile.TemporaryDirectory() as place:
        printed = [Path(place, name) for name in ("stdout", "stderr")]
        start = partial(start_tasks, count) if count else lambda *what: [Command(*what)]
        processes = start(script, arguments, folder, environment, *printed)
        end = time.monotonic() + timeout
        try:
            statuses = [process.wait(end - time.monotonic()) for process in processes]
        except TimeoutExpired as error:
            for process in processes:
                process.kill()
                process.wait()
            raise TimeoutExpired(error.cmd, timeout, *(path.read_text() for path in printed)) from None
        status = next((status for status in statuses if status), 0)
        return CompletedProcess([str(script), *arguments], status, *(path.read_text() for path in printed))
