"""How failures are recognised and reported: errors of memory, shared memory and open files; hanging and lost ranks."""

import errno
import os

import pytest
from torch._utils import ExceptionWrapper

import main
from sepvit_lib.common.command_line import run_command
from sepvit_lib.common.errors import RESUME_STATUS, out_of_shared_memory
from sepvit_lib.run import watchdog
from sepvit_lib.run.watchdog import FAILED, LOST, RUNNING, Heartbeat, Preemption, Watchdog

FLAGS = main.build_parser().flags()


def worker_error(error: Exception) -> RuntimeError:
    """A loader worker's error, as PyTorch re-raises it."""
    try:
        raise error
    except RuntimeError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RuntimeError) as raised:
        wrapper.reraise()
    return raised.value


FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


BUS_ERROR = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)


def test_shared_memory_errors_are_recognised():
    assert out_of_shared_memory(worker_error(RuntimeError(FULL)))
    assert out_of_shared_memory(RuntimeError(FULL))
    assert out_of_shared_memory(RuntimeError(BUS_ERROR))
    assert not out_of_shared_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_shared_memory(worker_error(RuntimeError("size mismatch")))
    assert not out_of_shared_memory(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert out_of_shared_memory(RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"))
    assert not out_of_shared_memory(RuntimeError("OutOfResources: out of resource: shared memory, Required: 131072"))
    assert not out_of_shared_memory(RuntimeError("unable to open shared memory object: Too many open files (24)"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        worker_error(RuntimeError("unable to open: Too many open files (24)")),
    ],
)
def test_too_many_open_files_give_advice(error, capsys):
    def fail() -> None:
        raise error

    assert run_command("main.py", fail, main.build_parser()) == 2
    assert capsys.readouterr().err.startswith(
        "main.py: too many open files; raise the limit (ulimit -n), or use fewer --num_workers"
    )


@pytest.mark.parametrize(
    "error", [worker_error(RuntimeError(FULL)), RuntimeError(BUS_ERROR)], ids=["full", "bus error"]
)
def test_full_shared_memory_gives_advice(error, capsys):
    def fail() -> None:
        raise error

    assert run_command("main.py", fail, main.build_parser()) == 2
    line = capsys.readouterr().err
    assert line.startswith("main.py: /dev/shm")
    assert line.count("\n") == 1
    assert "--shm-size" in line
    assert "--num_workers" in line


def test_startup_has_a_longer_hang_timeout(monkeypatch):
    """Half an hour, since finding the images may take long, or `--timeout` if that is longer."""
    dog = Watchdog(10, "env://", Preemption("main.py"), main.RESUME, FLAGS)
    assert dog._hang_timeout() == watchdog.STARTUP_TIMEOUT
    dog.preemption.has_progress = True
    assert dog._hang_timeout() == 10
    assert watchdog.startup_timeout(7200) == 7200


class EndedError(Exception):
    """Raised instead of ending the process."""


@pytest.fixture
def no_exit(monkeypatch) -> None:
    """Raise an error with the exit status instead of ending the process."""

    def end(status: int) -> None:
        raise EndedError(status)

    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.parametrize(
    ("state", "cause", "status", "way_out"),
    [
        (
            FAILED,
            "UserError: --data-path /x: no such folder",
            1,
            "; fix the error that it printed, then run the same",
        ),
        (LOST, "MachineError: storage", RESUME_STATUS, "(MachineError: storage); run the same command with"),
    ],
    ids=["failed", "lost"],
)
def test_advice_when_another_process_has_ended(state, cause, status, way_out, no_exit, capsys):
    """A process that failed with an error of the program would fail again."""
    sent = cause.replace("--data-path", "`data_path`")  # a rank's error names the setting
    beats = [Heartbeat(s, sent, (0, 4), "epoch 0, step 3", "there", False, 0.0) for s in (RUNNING, state)]
    with pytest.raises(EndedError) as end:
        Watchdog(10, "env://", Preemption("main.py"), main.RESUME, FLAGS)._judge(beats, [0.0, 2.0], 0.0)
    assert end.value.args == (status,)
    line = capsys.readouterr().err
    assert line.startswith(f"main.py: process 1 (there), last seen at epoch 0, step 3, {state} ({cause})")
    assert way_out in line
    assert line.count("\n") == 1


class Polls:
    """Stands in for the watchdog's event and clock. Each wait takes the next number of seconds from a list."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def wait(self, timeout: float) -> bool:
        self.now += self.seconds.pop(0) if self.seconds else 0.0
        return not self.seconds


@pytest.mark.parametrize(
    ("seconds", "ends"), [([1.0] * 14, True), ([1.0, 1.0, 60.0, *[1.0] * 9], False)], ids=["hangs", "suspended"]
)
def test_a_suspended_process_does_not_hang(seconds, ends, no_exit, monkeypatch, capsys):
    """Ctrl-Z suspends the watchdog, too."""
    preemption = Preemption("main.py")
    preemption.has_progress = True
    dog = Watchdog(10, "env://", preemption, main.RESUME, FLAGS)
    dog._ended = Polls(seconds)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: dog._ended.now)
    if ends:
        with pytest.raises(EndedError):
            dog._watch()
        assert "hangs at the start: no progress for 11 s" in capsys.readouterr().err
    else:
        dog._watch()
