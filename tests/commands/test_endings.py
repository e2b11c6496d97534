"""How commands print, react to signals and end: with one line and an exit status that says what to do.

Commands that depend on the interpreter's start-up or shutdown run in new processes, the others in forked ones
(`commands`).
"""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import ROOT, SMALL, command, refusal
from torch._utils import ExceptionWrapper

import engine
import main
from sepvit_lib.training import checkpoints, output, storage, watchdog
from sepvit_lib.training.commands import run_command
from sepvit_lib.training.errors import UserError, out_of_memory, out_of_shared_memory
from sepvit_lib.training.naming import StepNames
from sepvit_lib.training.watchdog import Heartbeat, Preemption, RankState, Watchdog

sys.path.append(str(ROOT / "tests/faults"))
from harness import LIMIT, RESUME_STATUS, STARTED, Run, differences, kill_started

INTERRUPT_STATUS = 130
FLAGS = main.build_parser().flags()
CPU = [*SMALL, "--device", "cpu"]
# Six steps of eight images, without checkpoints in between.
SIX_STEPS = ["--epochs", "1", "--checkpoint-every", "0", "--timeout", "600"]


@pytest.fixture(autouse=True)
def kill_leftovers(monkeypatch) -> Iterator[None]:
    """Use one thread per process, as many run at once. Kill the processes that a failed test left running."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    kill_started()


def real_environment(**variables: str) -> dict[str, str]:
    """Environment variables as in a user's shell, with buffered output."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables, "PYTHONUNBUFFERED": ""}


def start_real(
    arguments: list[str | Path],
    folder: Path,
    before: tuple[str, ...] = (),
    redirection: str = "",
    stdout: int = subprocess.DEVNULL,
    **variables: str,
) -> subprocess.Popen:
    """Start main.py through the shell in a new session. Its errors go to errors.txt.

    Args:
        arguments: arguments of main.py.
        folder: working folder.
        before: a command that runs main.py, with its own arguments.
        redirection: redirection of the shell.
        stdout: standard output, unless redirected.
        variables: environment variables to add.
    """
    folder.mkdir(exist_ok=True)
    whole = ["bash", "-c", f'exec "$@" {redirection}', "bash", *before, sys.executable, ROOT / "main.py", *arguments]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            list(map(str, whole)),
            cwd=folder,
            stdout=stdout,
            stderr=errors,
            text=True,
            env=real_environment(**variables),
            start_new_session=True,
        )
    STARTED.append(process)
    return process


def errors_of(folder: Path) -> str:
    return (folder / "errors.txt").read_text()


def run_here(arguments: list[str | Path], capsys: pytest.CaptureFixture) -> tuple[int, str, list[str]]:
    """Run main.py in this process. Return its status, its output and the lines of its errors."""
    status = main.run(list(map(str, arguments)))
    printed, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if "Warning" not in line and not line.startswith(" ")]
    return status, printed, lines


def write_script(folder: Path, body: str) -> Path:
    """Write a script that changes main.py by some lines and runs it."""
    folder.mkdir(exist_ok=True)
    script = folder / "scripted.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport engine, main, utils\n"
        f"{body}\nsys.exit(main.run())\n"
    )
    return script


def start_script(script: Path, *arguments: str | Path) -> SimpleNamespace:
    """Start a script in its folder and a new session. `text()` returns what it has printed so far."""
    printed = script.parent / "printed.txt"
    process = processes.Command(
        script, list(map(str, arguments)), script.parent, dict(os.environ), printed, printed, start_new_session=True
    )
    STARTED.append(process)
    return SimpleNamespace(process=process, text=lambda: printed.read_text() if printed.exists() else "")


def wait_for(fact: Callable[[], object], process: subprocess.Popen | processes.Command) -> None:
    """Wait until a condition holds or a process has ended."""
    end = time.monotonic() + LIMIT
    while not fact() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


def copy_images(few_digits: Path, folder: Path) -> Path:
    """Copy the images, so that a test can change them."""
    shutil.copytree(few_digits, folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Printing
# ----------------------------------------------------------------------------------------------------------------------

OUTPUTS = {"full disk": ">/dev/full", "closed": ">&-", "broken pipe": ""}


@pytest.fixture(scope="module")
def unprinted(few_digits, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Training runs that cannot print, started together, and a user's mistake whose error cannot be printed either."""
    root, processes = tmp_path_factory.mktemp("unprinted"), {}
    folder = root / "broken pipe/run"
    folder.mkdir(parents=True)
    lock = output.lock_folder(
        folder, heartbeat_timeout=1, what="--output_dir run"
    )  # the run prints that it waits, until its reader has gone
    for name, redirection in OUTPUTS.items():
        stdout = subprocess.DEVNULL if redirection else subprocess.PIPE
        processes[name] = start_real(
            [*CPU, "--print-freq", "1", "--data-path", few_digits, "--output_dir", "run", "--warmup-epochs", "0"],
            root / name,
            redirection=redirection,
            stdout=stdout,
        )
    processes["mistake"] = start_real(["--epochs", "0"], root / "mistake", redirection=">/dev/full 2>&1")
    reader = processes["broken pipe"].stdout
    assert reader is not None
    assert lock is not None
    first = reader.readline().rstrip("\n")
    reader.close()
    os.close(lock)
    return {
        name: SimpleNamespace(
            status=process.wait(LIMIT), run=root / name / "run", errors=errors_of(root / name), read=first
        )
        for name, process in processes.items()
    }


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_run_survives_failed_printing(kind, unprinted):
    """The run completes, and log.txt holds what it could not print."""
    ended = unprinted[kind]
    assert ended.status == 0, ended.errors
    assert "Exception ignored" not in ended.errors
    assert "Traceback" not in ended.errors
    log = output.read_log(ended.run / "log.txt")
    lines = [line for entry in log for line in entry.get("not_printed", [])]
    assert any(line.startswith("epoch 0 [3/3] loss") for line in lines)
    assert lines[-1].startswith("trained in")
    assert len(output.epoch_entries(log)) == 1
    assert checkpoints.damage(ended.run / "checkpoint.pth") is None
    if kind == "broken pipe":
        assert ended.read.startswith("output folder run: another run writes to it; waiting")
        assert ended.read not in lines


def test_a_mistake_that_cannot_be_printed_keeps_its_status(unprinted):
    assert unprinted["mistake"].status == 2


def ascii_stream() -> io.TextIOWrapper:
    """A strict ASCII stream, like standard output in an ASCII environment."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)


def test_help_in_ascii(monkeypatch):
    stream = ascii_stream()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        main.run(["--help"])
    assert not end.value.code
    printed = stream.buffer.getvalue().decode("ascii")
    assert printed.startswith("usage: ")
    assert "a timm reader: wds/\\u2026" in " ".join(printed.split())


def test_names_in_ascii(few_digits, tmp_path, capsys, monkeypatch):
    """A folder's name is escaped in output and used unchanged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ü").symlink_to(few_digits)
    out, err = ascii_stream(), ascii_stream()
    with monkeypatch.context() as here:
        here.setattr(sys, "stdout", out)
        here.setattr(sys, "stderr", err)
        assert main.run([*CPU, "--batch-size", "48", "--data-path", "ü", "--output_dir", "aü"]) == 0
        assert main.run([*CPU, "--eval", "--data-path", "ü", "--resume", "aü/checkpoint.pth"]) == 0
        assert main.run([*CPU, "--eval", "--data-path", "ö"]) == 2
    printed = out.buffer.getvalue().decode("ascii")
    assert "are in a\\xfc" in printed
    assert "validation: top-1 " in printed
    assert err.buffer.getvalue().decode("ascii").endswith("main.py: --data-path \\xf6: no such folder\n")
    assert (tmp_path / "aü/checkpoint.pth").exists()


@pytest.mark.slow
def test_names_in_the_c_locale(few_digits, tmp_path):
    """File names are not UTF-8 in the C locale. `--throughput` prints "×", and the folder is called "ü"."""
    (tmp_path / "ü").symlink_to(few_digits)
    process = start_real(
        [*CPU, "--batch-size", "2", "--throughput", "--data-path", "ü"],
        tmp_path,
        redirection=">printed.txt",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert process.wait(LIMIT) == 0, errors_of(tmp_path)
    assert "UnicodeEncodeError" not in errors_of(tmp_path)
    assert b"validation batches are 1.5 \\xd7 --batch-size 2" in (tmp_path / "printed.txt").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


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


def test_small_shared_memory(few_digits, tmp_path):
    """A batch is larger than /dev/shm, as may happen in containers."""
    small = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "bash", "-c", small]).returncode != 0:
        pytest.skip("mounting a small /dev/shm in a mount namespace is not permitted")
    arguments = [*CPU, "--input-size", "64", "--batch-size", "24", "--num_workers", "2", "--data-path", few_digits]
    process = start_real(arguments, tmp_path, ("unshare", "-m", "bash", "-c", f'{small} && exec "$@"', "bash"))
    assert process.wait(LIMIT) == 2
    errors = errors_of(tmp_path)
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("main.py: /dev/shm (1 MiB in all) is full")
    assert "--shm-size" in lines[0]
    assert "--num_workers" in lines[0]


MEMORY_SETTINGS = ("--batch-size", "--accum-steps", "--grad-checkpointing", "--input-size")
OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"
        " of which 1 MiB is free.\nSee documentation for Memory Management"
    ),
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("memory", OUT_OF_MEMORY)
def test_out_of_memory(memory, few_digits, tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise OUT_OF_MEMORY[memory]

    monkeypatch.setattr(engine.DistillationLoss, "forward", fail)
    line = refusal(main.run, "main", [*CPU, "--data-path", few_digits, "--output_dir", tmp_path / "run"], capsys)
    assert line.startswith("main.py: out of memory (")
    assert all(setting in line for setting in MEMORY_SETTINGS)


def test_memory_errors_are_recognised():
    assert all(out_of_memory(error) for error in OUT_OF_MEMORY.values())
    assert not out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.slow
def test_memory_limit(few_digits, tmp_path):
    """The limit leaves 400 MB. The first stage alone needs more for images of 1024 × 1024 pixels."""
    script = write_script(
        tmp_path,
        """
import resource
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 400_000_000,) * 2)""",
    )
    started = start_script(script, "--eval", *CPU, "--input-size", "1024", "--data-path", few_digits)
    assert started.process.wait(LIMIT) == 2, started.text()
    last = started.text().splitlines()[-1]
    assert last.startswith("main.py: out of memory (")
    assert "Traceback" not in started.text()
    assert all(setting in last for setting in MEMORY_SETTINGS)


# ----------------------------------------------------------------------------------------------------------------------
# Hanging
# ----------------------------------------------------------------------------------------------------------------------

# The second progress report never returns.
STUCK = """
report, reports = utils.Progress.report, []


def stuck(self, **values):
    report(self, **values)
    reports.append(values)
    while len(reports) == 2:
        time.sleep(0.2)


utils.Progress.report = stuck
"""
SMALL_BATCHES = [*CPU, "--batch-size", "4", "--print-freq", "1"]


def test_a_hanging_single_process(few_digits, tmp_path):
    """It ends itself and prints where it hung and how to restart: training, evaluation and throughput."""
    run = Run(tmp_path / "train", few_digits, *SIX_STEPS, "--timeout", "10", environment=dict(HANG="0:4"))
    run.command[1] = str(ROOT / "tests/faults/sabotage.py")
    training = run.start()
    evaluation = start_script(
        write_script(tmp_path / "eval", STUCK), "--eval", *SMALL_BATCHES, "--timeout", "10", "--data-path", few_digits
    )
    throughput = start_script(
        write_script(tmp_path / "throughput", STUCK),
        "--throughput",
        *SMALL_BATCHES,
        *"--timeout 10 --data-path".split(),
        few_digits,
    )
    for process, text, place, advice in (
        (training, run.text, "epoch 0, step 3", main.RESUME),
        (evaluation.process, evaluation.text, "batch 1 of validation", "run the same command again"),
        (throughput.process, throughput.text, "throughput, warm-up", "run the same command again"),
    ):
        assert process.wait(LIMIT) == RESUME_STATUS, text()
        last = text().splitlines()[-1]
        pattern = rf"main\.py: process 0: hangs at {place}: no progress for \d+ s; {advice}"
        assert re.fullmatch(pattern, last), last
    assert "--auto-resume" in main.RESUME


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
            RankState.FAILED,
            "UserError: --data-path /x: no such folder",
            1,
            "; fix the cause that it printed, then run the same",
        ),
        (RankState.LOST, "MachineError: storage", RESUME_STATUS, "(MachineError: storage); run the same command with"),
    ],
    ids=["failed", "lost"],
)
def test_advice_when_another_process_has_ended(state, cause, status, way_out, no_exit, capsys):
    """A process that failed with an error of the program would fail again."""
    sent = cause.replace("--data-path", "`data_path`")  # a rank's error names the setting
    beats = [Heartbeat(s, sent, (0, 4), "epoch 0, step 3", "there", False, 0.0) for s in (RankState.RUNNING, state)]
    beats = [Heartbeat.from_json(beat.to_json()) for beat in beats]  # as received
    with pytest.raises(EndedError) as end:
        Watchdog(10, "env://", Preemption("main.py"), main.RESUME, FLAGS)._judge(beats, [0.0, 2.0], 0.0)
    assert end.value.args == (status,)
    line = capsys.readouterr().err
    assert line.startswith(
        f"main.py: process 0: process 1 (there), last seen at epoch 0, step 3, {state.value} ({cause})"
    )
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
            dog._watch_alone()
        assert "hangs at the start: no progress for 11 s" in capsys.readouterr().err
    else:
        dog._watch_alone()


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C
# ----------------------------------------------------------------------------------------------------------------------


# In the third step, SIGINT to the whole process group, as terminals send it, then SIGTERM, as launchers send it.
INTERRUPTED = """
forward, steps = engine.DistillationLoss.forward, []


def interrupted(self, *batch):
    steps.append(batch)
    if len(steps) == 3:
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)
    return forward(self, *batch)


engine.DistillationLoss.forward = interrupted
"""


def test_interrupted_training_resumes(few_digits, tmp_path):
    undisturbed = Run(tmp_path / "undisturbed", few_digits, *SIX_STEPS)
    undisturbed.finish()
    run = Run(tmp_path / "run", few_digits, *SIX_STEPS, "--num_workers", "1")
    script, run.command[1] = run.command[1], str(write_script(tmp_path / "script", INTERRUPTED))
    process = run.start()
    assert process.wait(LIMIT) == INTERRUPT_STATUS, run.text()
    assert run.text().count("main.py: interrupted: finishing the step and saving") == 1
    last = run.text().splitlines()[-1]
    assert last.startswith("main.py: stopped by a signal before epoch 0, step 3; the same command with --auto-resume")
    assert "Traceback" not in run.text()
    assert [path.name for path in StepNames(1).numbered(run.output)] == ["checkpoint-00000003.pth"]
    run.command[1] = script
    assert "resuming at epoch 0, step 3" in run.finish()
    a, b = (torch.load(output / "checkpoint.pth", weights_only=True) for output in (run.output, undisturbed.output))
    assert differences(a["model"], b["model"]) == []
    assert differences(a["optimizer"], b["optimizer"]) == []


def test_second_interrupt_ends_at_once(few_digits, tmp_path):
    run = Run(tmp_path, few_digits, *SIX_STEPS, "--num_workers", "1", environment=dict(HANG="0:3"))
    run.command[1] = str(ROOT / "tests/faults/sabotage.py")
    process = run.start()
    run.wait_for(process, "] loss", 2)
    os.killpg(process.pid, signal.SIGINT)
    run.wait_for(process, "press Ctrl-C again to end at once")
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) == INTERRUPT_STATUS
    assert run.text().splitlines()[-1] == "main.py: interrupted"
    assert "Traceback" not in run.text()


def test_interrupt_before_the_first_step(few_digits, tmp_path):
    """Nothing is saved."""
    body = "build = main.build_model\nmain.build_model = lambda *built: (os.killpg(0, signal.SIGINT), build(*built))[1]"
    started = start_script(write_script(tmp_path, body), *CPU, "--data-path", few_digits, "--output_dir", "run")
    assert started.process.wait(LIMIT) == INTERRUPT_STATUS
    (line,) = [line for line in started.text().splitlines() if "WARNING" not in line]  # of the warm-up
    assert line == "main.py: interrupted before the first step; run the same command again"
    assert not (tmp_path / "run").exists()


def test_interrupted_evaluation(few_digits, tmp_path):
    started = start_script(
        write_script(tmp_path, STUCK), "--eval", *SMALL_BATCHES, "--num_workers", "1", "--data-path", few_digits
    )
    wait_for(lambda: "validation [2/4]" in started.text(), started.process)
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.process.wait(LIMIT) == INTERRUPT_STATUS
    assert started.text().count("main.py: ") == 1
    assert started.text().splitlines()[-1] == "main.py: interrupted"
    assert "Traceback" not in started.text()


# Python runs this sitecustomize.py at start-up. The import of one module then never returns.
STUCK_IMPORT = """
import sys, time
from pathlib import Path


class Stuck:
    def find_spec(self, name, *_):
        if name == {module!r}:
            Path("reached").touch()
            time.sleep(3600)


sys.meta_path.insert(0, Stuck())
"""


@pytest.mark.parametrize("module", ["torch", "sepvit_lib.training.devices"])
def test_interrupt_while_importing(module, tmp_path):
    """Early and late in start-up."""
    (tmp_path / "sitecustomize.py").write_text(STUCK_IMPORT.format(module=module))
    process = start_real(["--help"], tmp_path, PYTHONPATH=str(tmp_path))
    wait_for((tmp_path / "reached").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) in (-signal.SIGINT, INTERRUPT_STATUS)
    assert "Traceback" not in errors_of(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Folders and files
# ----------------------------------------------------------------------------------------------------------------------


def without_root_rights() -> tuple[str, ...]:
    """A command prefix that drops root's right to read every file. Empty for other users."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv, by which root gives up its right to read whatever there is")
    rights = "-dac_override,-dac_read_search"
    return "setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"


def test_class_folder_without_permission(few_digits, tmp_path):
    data = copy_images(few_digits, tmp_path / "data")
    closed = data / "val/1"
    before = without_root_rights()
    closed.chmod(0)
    try:
        process = start_real(["--eval", *CPU, "--data-path", data], tmp_path, before)
        assert process.wait(LIMIT) == 2
    finally:
        closed.chmod(0o755)
    errors = errors_of(tmp_path)
    assert errors.startswith(f"main.py: --data-path {data}: {closed} cannot be read (Permission denied)")
    assert errors.count("\n") == 1


@pytest.fixture
def open_data(few_digits) -> Iterator[Path]:
    """Images in a folder that every user may read."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is closed to other users
    try:
        shutil.copytree(few_digits / "val", folder / "data/val")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        yield folder / "data"
    finally:
        for path in (folder, folder / "data", folder / "data/val"):
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["val", "."])
def test_folder_without_permission(name, open_data):
    closed = open_data / name
    args = main.build_parser().parse_args([*CPU, "--data-path", str(open_data)])
    assert main.build_data(args, is_train=False).num_classes == 3
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError) as error:
            main.build_data(args, is_train=False)
    finally:
        os.seteuid(user)
    line = str(error.value)
    assert line.startswith(f"`data_path` {open_data}: ")
    assert f"{closed}" in line
    assert "Permission denied" in line


def test_names_with_line_breaks_and_invalid_utf8(few_digits, tmp_path, capsys, monkeypatch):
    """Training accepts them, reports an unreadable image once with its full name, and escapes line breaks."""
    monkeypatch.chdir(tmp_path)
    data = copy_images(few_digits, tmp_path / "data")
    for split in ("train", "val"):
        os.rename(os.fsencode(data / split / "1"), os.fsencode(data / split) + b"/caf\xe9")
    folder = os.fsencode(data / "train") + b"/caf\xe9"
    os.rename(os.path.join(folder, sorted(os.listdir(folder))[0]), folder + b"/a\nb.png")
    with open(folder + b"/a\nb.png", "w") as file:
        file.write("no image")
    status, printed, lines = run_here([*CPU, "--data-path", "data", "--output_dir", "run"], capsys)
    assert (status, lines) == (0, [])
    name = os.fsdecode(b"data/train/caf\xe9/a\nb.png")
    log = output.read_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [name]
    assert output.epoch_entries(log)[-1]["unreadable_images"] == 1
    named = [line for line in printed.splitlines() if "unreadable_image " in line]
    assert len(named) == 1
    assert r"unreadable_image data/train/caf\udce9/a\nb.png, reason Unidentified" in named[0]
    assert "\nb.png" not in printed


def test_folder_names_that_are_not_utf8(few_digits, tmp_path, capsys):
    """Checkpoints can be read from them, but TensorBoard cannot write to them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    arguments = [*CPU, "--data-path", str(few_digits)]
    assert main.run([*arguments, "--output_dir", str(folder)]) == 2
    assert capsys.readouterr().err.endswith(
        "caf\\udce9: its name is not UTF-8, which TensorBoard needs; name another folder\n"
    )
    assert not folder.exists()
    assert main.run([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    (tmp_path / "run").rename(folder)
    assert main.run([*arguments, "--eval", "--resume", str(folder / "checkpoint.pth")]) == 0


def test_validation_image_whose_name_has_a_line_break(few_digits, tmp_path, capsys):
    data = copy_images(few_digits, tmp_path / "data")
    (data / "val/1/a\nb.png").write_text("no image")
    line = refusal(main.run, "main", ["--eval", *CPU, "--data-path", data], capsys)
    assert line.startswith(rf"main.py: image {data}/val/1/a\nb.png: cannot be read (UnidentifiedImageError")


def test_pipe_among_training_images(few_digits, tmp_path):
    """It counts as an unreadable image. Reading it would block forever."""
    data = copy_images(few_digits, tmp_path / "data")
    os.mkfifo(data / "train/1/x.png")
    arguments = [*CPU, "--num_workers", "1", "--batch-size", "14", "--epochs", "4", "--data-path", data]
    result = command(*arguments, "--output_dir", tmp_path / "run", timeout=LIMIT)
    assert result.returncode == 0, result.stdout + result.stderr
    log = output.read_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [f"{data}/train/1/x.png"]


def test_pipe_among_validation_images(few_digits, tmp_path):
    data = copy_images(few_digits, tmp_path / "data")
    os.mkfifo(data / "val/1/x.png")
    result = command("--eval", *CPU, "--data-path", data, timeout=LIMIT)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"main.py: image {data}/val/1/x.png: cannot be read (OSError: not a regular file)")


def test_pipe_as_a_checkpoint(few_digits, tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    result = command("--eval", *CPU, "--data-path", few_digits, "--resume", tmp_path / "x.pth", timeout=LIMIT)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"main.py: --resume {tmp_path}/x.pth: a pipe or a device")


@pytest.mark.parametrize("before", [None, '{"test_acc1": 50.0}\n'], ids=["first results", "earlier results"])
def test_evaluation_on_a_full_disk(before, few_digits, tmp_path, capsys, monkeypatch):
    """eval.json is absent or keeps the earlier results. It is never empty."""

    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if before:
        (tmp_path / "eval.json").write_text(before)
    monkeypatch.setattr(storage.os, "fsync", fail)
    line = refusal(main.run, "main", ["--eval", *CPU, "--data-path", few_digits, "--output_dir", tmp_path], capsys)
    assert line.startswith(f"main.py: --output_dir {tmp_path}: eval.json could not be written (No space left on device")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"eval.json": before} if before else {})


# ----------------------------------------------------------------------------------------------------------------------
# Launchers
# ----------------------------------------------------------------------------------------------------------------------

LAUNCHER_VARIABLES = [
    *"RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_JOB_ID".split(),
    *"SLURM_STEP_NODELIST SLURM_JOB_NODELIST OMPI_COMM_WORLD_RANK".split(),
]
ADDRESS = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
INVALID_VARIABLES = [
    (dict(RANK="0"), "RANK=0 is set, MASTER_ADDR and MASTER_PORT not"),
    (dict(RANK="x"), "RANK=x"),
    (dict(RANK="5", WORLD_SIZE="2", **ADDRESS), "RANK=5: takes a whole number from 0 to 1"),
    (dict(RANK="0", WORLD_SIZE="two", **ADDRESS), "WORLD_SIZE=two"),
    (dict(RANK="0", WORLD_SIZE="2", **ADDRESS | dict(MASTER_PORT="abc")), "MASTER_PORT=abc"),
    (dict(RANK="1", WORLD_SIZE="2", **ADDRESS | dict(MASTER_PORT="99999")), "MASTER_PORT=99999"),
    (dict(SLURM_PROCID="0", SLURM_NTASKS="two"), "SLURM_NTASKS=two"),
    (dict(SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_JOB_NODELIST="localhost", SLURM_JOB_ID="q"), "SLURM_JOB_ID=q"),
]


@pytest.mark.parametrize(("variables", "named"), INVALID_VARIABLES, ids=[named for _, named in INVALID_VARIABLES])
def test_invalid_launcher_variables(variables, named, few_digits, tmp_path):
    others = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    arguments = [*CPU, "--data-path", str(few_digits)]
    result = processes.run(ROOT / "main.py", arguments, tmp_path, others | variables, timeout=LIMIT)
    assert result.returncode == 2
    assert result.stderr.startswith("main.py: environment variable ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
