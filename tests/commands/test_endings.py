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
from conftest import ROOT, SMALLEST, refusal

import engine
import main
from sepvit_lib.common import storage
from sepvit_lib.common.errors import UserError
from sepvit_lib.run import checkpoints, output
from sepvit_lib.run.checkpoint_names import StepNames

sys.path.append(str(ROOT / "tests/faults"))
from harness import LIMIT, RESUME_STATUS, STARTED, Run, differences, kill_started

INTERRUPT_STATUS = 130
FLAGS = main.build_parser().flags()
CPU = [*SMALLEST, "--device", "cpu"]
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


def start_real(
    arguments: list[str | Path],
    folder: Path,
    before: tuple[str, ...] = (),
    redirection: str = "",
    stdout: int = subprocess.DEVNULL,
    script: str = "tests/fixtures/small_main.py",
    **variables: str,
) -> subprocess.Popen:
    """Start main.py through the shell in a new session. Its errors go to errors.txt.

    Args:
        arguments: arguments of main.py.
        folder: working folder.
        before: a command that runs main.py, with its own arguments.
        redirection: redirection of the shell.
        stdout: standard output, unless redirected.
        script: main.py, or a script that runs it.
        variables: environment variables to add.
    """
    folder.mkdir(exist_ok=True)
    whole = ["bash", "-c", f'exec "$@" {redirection}', "bash", *before, sys.executable, ROOT / script, *arguments]
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            list(map(str, whole)),
            cwd=folder,
            stdout=stdout,
            stderr=errors,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **variables,
                "PYTHONUNBUFFERED": "",
            },  # buffered, as in a user's shell
            start_new_session=True,
        )
    STARTED.append(process)
    return process


def errors_of(folder: Path) -> str:
    return (folder / "errors.txt").read_text()


def write_script(folder: Path, body: str) -> Path:
    """Write a script that changes main.py by some lines and runs it."""
    folder.mkdir(exist_ok=True)
    script = folder / "scripted.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import small_model, engine, main, utils\n"
        f"{body}\nsys.exit(main.run())\n"
    )
    return script


def start_script(script: Path, *arguments: str | Path) -> SimpleNamespace:
    """Start a script in its folder and a new session. `text()` returns what it has printed so far."""
    printed = script.parent / "printed.txt"
    texts = list(map(str, arguments))
    process = processes.Command(script, texts, script.parent, dict(os.environ), printed, printed, True)
    STARTED.append(process)
    return SimpleNamespace(process=process, text=lambda: printed.read_text() if printed.exists() else "")


def wait_for(fact: Callable[[], object], process: subprocess.Popen | processes.Command) -> None:
    """Wait until a condition holds or a process has ended."""
    end = time.monotonic() + LIMIT
    while not fact() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Printing
# ----------------------------------------------------------------------------------------------------------------------

OUTPUTS = {"full disk": ">/dev/full", "closed": ">&-", "broken pipe": ""}


@pytest.fixture(scope="module")
def unprinted(few_digits, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Training runs that cannot print, started together, and a user's mistake whose error cannot be printed either."""
    root, processes = tmp_path_factory.mktemp("unprinted"), {}
    arguments = [*CPU, "--print-freq", "1", "--data-path", few_digits, "--output_dir", "run"]
    for name, redirection in OUTPUTS.items():
        stdout = subprocess.DEVNULL if redirection else subprocess.PIPE
        processes[name] = start_real(arguments, root / name, redirection=redirection, stdout=stdout)
    processes["mistake"] = start_real(["--epochs", "0"], root / "mistake", redirection=">/dev/full 2>&1")
    reader = processes["broken pipe"].stdout
    assert reader is not None
    assert reader.readline()
    reader.close()
    return {
        name: SimpleNamespace(status=process.wait(LIMIT), run=root / name / "run", errors=errors_of(root / name))
        for name, process in processes.items()
    }


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_run_survives_failed_printing(kind, unprinted):
    ended = unprinted[kind]
    assert ended.status == 0, ended.errors
    assert "Exception ignored" not in ended.errors
    assert "Traceback" not in ended.errors
    assert len(output.epoch_entries(output.read_log(ended.run / "log.txt"))) == 1
    assert checkpoints.damage(ended.run / "checkpoint.pth") is None


def test_a_mistake_that_cannot_be_printed_keeps_its_status(unprinted):
    assert unprinted["mistake"].status == 2


def ascii_stream() -> io.TextIOWrapper:
    """A strict ASCII stream, like standard output in an ASCII environment."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)


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
    flags = [*CPU, *"--batch-size 2 --throughput --data-path ü".split()]
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    process = start_real(flags, tmp_path, redirection=">printed.txt", **locale)
    assert process.wait(LIMIT) == 0, errors_of(tmp_path)
    assert "UnicodeEncodeError" not in errors_of(tmp_path)
    assert b"validation batches are 1.5 \\xd7 --batch-size 2" in (tmp_path / "printed.txt").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


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
    (line,) = [line for line in errors.splitlines() if line.startswith("main.py: ")]
    assert line.startswith("main.py: /dev/shm (1 MiB in all) is full")
    assert "--shm-size" in line
    assert "--num_workers" in line


MEMORY_SETTINGS = ("--batch-size", "--accum-steps", "--grad-checkpointing", "--input-size")
OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation"),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "),
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


@pytest.mark.slow
def test_memory_limit(few_digits, tmp_path):
    """The limit leaves 400 MB. SepViT_Lite's first stage needs more for images of 1024 × 1024 pixels."""
    script = write_script(
        tmp_path,
        """
import resource
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 400_000_000,) * 2)""",
    )
    large = [*CPU, "--model", "SepViT_Lite", "--input-size", "1024"]
    started = start_script(script, "--eval", *large, "--data-path", few_digits)
    assert started.process.wait(LIMIT) == 2, started.text()
    last = started.text().splitlines()[-1]
    assert last.startswith("main.py: out of memory (")
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
    flags = [*SMALL_BATCHES, "--timeout", "10", "--data-path", few_digits]
    evaluation = start_script(write_script(tmp_path / "eval", STUCK), "--eval", *flags)
    throughput = start_script(write_script(tmp_path / "throughput", STUCK), "--throughput", *flags)
    for process, text, place, advice in (
        (training, run.text, "epoch 0, step 3", main.RESUME),
        (evaluation.process, evaluation.text, "batch 1 of validation", "run the same command again"),
        (throughput.process, throughput.text, "throughput, warm-up", "run the same command again"),
    ):
        assert process.wait(LIMIT) == RESUME_STATUS, text()
        pattern = rf"main\.py: process 0 \([^)]*\) hangs at {place}: no progress for \d+ s; {advice}"
        assert re.fullmatch(pattern, text().splitlines()[-1]), text()
    assert "--auto-resume" in main.RESUME


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
    flags = [*SMALL_BATCHES, "--num_workers", "1", "--data-path", few_digits]
    started = start_script(write_script(tmp_path, STUCK), "--eval", *flags)
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


@pytest.mark.parametrize("module", ["torch", "sepvit_lib.common.devices"])
def test_interrupt_while_importing(module, tmp_path):
    """Early and late in start-up."""
    (tmp_path / "sitecustomize.py").write_text(STUCK_IMPORT.format(module=module))
    process = start_real(["--help"], tmp_path, script="main.py", PYTHONPATH=str(tmp_path))
    wait_for((tmp_path / "reached").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) in (-signal.SIGINT, INTERRUPT_STATUS)
    assert "Traceback" not in errors_of(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Folders and files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "."])
def test_folder_without_permission(name, few_digits):
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to other users
        data = Path(folder, "data")
        shutil.copytree(few_digits / "val", data / "val")
        for path in (Path(folder), data, *data.rglob("*")):
            path.chmod(0o755)
        args = main.build_parser().parse_args([*CPU, "--data-path", str(data)])
        assert main.build_data(args, is_train=False).num_classes == 3
        (data / name).chmod(0)
        try:
            os.seteuid(user or 65534)
            with pytest.raises(UserError, match=rf"^`data_path` {data}: ") as error:
                main.build_data(args, is_train=False)
        finally:
            os.seteuid(user)
            (data / name).chmod(0o755)
    assert str(data / name) in str(error.value)
    assert "Permission denied" in str(error.value)


def test_names_with_line_breaks_and_invalid_utf8(few_digits, tmp_path, capsys, monkeypatch):
    """Training accepts them, reports an unreadable image once with its full name, and escapes line breaks."""
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(few_digits, tmp_path / "data")
    for split in ("train", "val"):
        os.rename(os.fsencode(data / split / "1"), os.fsencode(data / split) + b"/caf\xe9")
    folder = os.fsencode(data / "train") + b"/caf\xe9"
    os.rename(os.path.join(folder, sorted(os.listdir(folder))[0]), folder + b"/a\nb.png")
    with open(folder + b"/a\nb.png", "w") as file:
        file.write("no image")
    assert main.run([*CPU, "--data-path", "data", "--output_dir", "run"]) == 0
    printed = capsys.readouterr().out
    name = os.fsdecode(b"data/train/caf\xe9/a\nb.png")
    log = output.read_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [name]
    assert output.epoch_entries(log)[-1]["unreadable_images"] == 1
    named = [line for line in printed.splitlines() if "unreadable_image " in line]
    assert len(named) == 1
    assert r"unreadable_image data/train/caf\udce9/a\nb.png, reason Unidentified" in named[0]
    assert "\nb.png" not in printed
    Path("data/val/2/a\nb.png").write_text("no image")
    line = refusal(main.run, "main", ["--eval", *CPU, "--data-path", "data"], capsys)
    assert line.startswith(r"main.py: image data/val/2/a\nb.png: cannot be read (UnidentifiedImageError")


@pytest.mark.parametrize("workers", [0, 1])
def test_pipes_among_images(workers, few_digits, tmp_path, capsys):
    """In training, one counts as an unreadable image. Reading it would block forever."""
    data = shutil.copytree(few_digits, tmp_path / "data")
    os.mkfifo(data / "train/1/x.png")
    arguments = [*CPU, "--num_workers", str(workers), *"--batch-size 14 --epochs 4 --data-path".split(), str(data)]
    assert main.run([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    log = output.read_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [f"{data}/train/1/x.png"]
    os.mkfifo(data / "val/1/x.png")
    line = refusal(main.run, "main", ["--eval", *arguments], capsys)
    assert line.startswith(f"main.py: image {data}/val/1/x.png: cannot be read (OSError: not a regular file)")


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


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (dict(RANK="0"), "MASTER_ADDR"),
        (dict(RANK="x"), "RANK=x"),
        (dict(RANK="0", WORLD_SIZE="two"), "WORLD_SIZE=two"),
        (dict(RANK="1", WORLD_SIZE="two"), "WORLD_SIZE=two"),  # not rank 0, which may have no mistake to report
        (dict(RANK="5", WORLD_SIZE="2"), "RANK=5: must be an integer from 0 to 1"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"), "abc"),
        (dict(SLURM_PROCID="0", SLURM_NTASKS="two"), "SLURM_NTASKS=two"),
    ],
)
def test_invalid_launcher_variables(variables, named, few_digits, tmp_path, capsys, monkeypatch):
    assert named in refusal_of_rank(variables, few_digits, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("address", ["nonsense", "http://x"])
def test_invalid_addresses(address, few_digits, tmp_path, capsys, monkeypatch):
    variables = dict(RANK="0", WORLD_SIZE="2")
    line = refusal_of_rank(variables, few_digits, tmp_path, capsys, monkeypatch, "--dist_url", address)
    assert f"--dist_url {address}: unknown; choose env://, tcp://HOST:PORT or file://PATH" in line


def refusal_of_rank(variables, data, folder, capsys, monkeypatch, *flags: str) -> str:
    """Run main.py with a mistake as a launcher with these variables would start it. Return the line that it prints."""
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if re.match("RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|SLURM_", name):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refusal(main.run, "main", [*CPU, "--data-path", data, *flags], capsys)
    assert os.listdir(folder) == []
    return line
