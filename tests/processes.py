"""Run scripts as commands, in forked processes that have already imported the large libraries.

Importing them takes five to ten seconds per command, and the tests run more than a hundred commands.
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
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ["torchvision", "timm", "torch.utils.tensorboard", "mmengine.runner"]
LIBRARIES += ["late_operators", "mmseg.apis", "mmdet.apis", "prepared"]  # these import mmcv's operators

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


class Command:
    """A running script, with the part of the `subprocess.Popen` interface that the tests need.

    Args:
        script: the script.
        arguments: the script's arguments.
        folder: working folder.
        environment: all environment variables.
        stdout: file that standard output is appended to.
        stderr: file that standard error is appended to.
        start_new_session: start a new session, so that `os.killpg` reaches the script and its children.
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
        with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT / "tests")):  # for the server, which the first one starts
            self._process.start()
        self.pid = self._process.pid or 0  # not None once started

    def poll(self) -> int | None:
        """The exit status, negative if a signal ended the process; None while it is running."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process ends. Return its exit status.

        Raises:
            TimeoutExpired: it is still running after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired([str(self.script), *self.arguments], timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


def _work(
    script: Path,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    printed: tuple[Path, Path],
    start_new_session: bool,
) -> None:
    """Run the script in the forked process as if it had been started directly."""
    multiprocessing.set_start_method(None, force=True)  # forkserver, inherited, slows data loaders down
    if start_new_session:
        os.setsid()
    for descriptor, path in zip((1, 2), printed):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch reads it only when imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(script), *arguments]
    own = ("", str(ROOT))  # scripts must not rely on the tests' path
    kept = (entry for entry in sys.path if entry not in own and not entry.startswith(str(ROOT / "tests")))
    sys.path[:] = [str(script.parent), *kept]
    runpy.run_path(str(script), run_name="__main__")


def start_tasks(
    count: int, script: Path, arguments: list[str], folder: Path, environment: dict[str, str], *printed: Path
) -> list[Command]:
    """Start the ranks of a distributed run with the environment variables that torchrun would set."""
    tasks = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1")
    ranks = ({**environment, **tasks, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    stdout, stderr = printed
    return [Command(script, arguments, folder, rank, stdout, stderr, start_new_session=True) for rank in ranks]


def free_port() -> str:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(
    script: Path, arguments: list[str], folder: Path, environment: dict[str, str], timeout: float, count: int = 0
) -> CompletedProcess:
    """Run a script in one process, or in `count` processes. Return the finished process with its output.

    The exit status is that of the first rank that failed.

    Raises:
        TimeoutExpired: it took too long and was killed.
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
