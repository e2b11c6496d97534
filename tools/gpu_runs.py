"""The rows of gpu_check.py that run main.py: training to an accuracy, resuming, bad steps, and no waiting for the GPU.

Commands run as in the tests: forked from the row's process, which has imported the libraries.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:
    import _repository  # noqa: F401
import main
from tools.gpu_record import Figures
from tools.gpu_rows import CheckError, Row, Setup, require
from training.output import epoch_entries, read_log
from training.state import Training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import commands
from conftest import ROOT, differences

LIMIT = 600.0  # seconds that a command may take; rows have shorter limits


class Run:
    """A script in a folder of its own, restarted with the same command.

    Args:
        folder: working folder.
        arguments: the script's arguments.
        processes: number of processes for torchrun; 0 runs one process without torchrun.
        script: the script.
        environment: environment variables to add.

    Attributes:
        output: the output folder of a run whose arguments name `run`.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[object],
        processes: int = 0,
        script: str = "main.py",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.output = folder / "run"
        self.arguments = list(map(str, arguments))
        self.processes = processes
        self.script = ROOT / script
        self.environment = {**os.environ, **(environment or {})}
        self.printed = folder / "printed.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.printed.touch()
        commands.fork_from_here()

    def start(self) -> subprocess.Popen | commands.Command:
        """Start the command. What it prints is appended to `printed`."""
        if not self.processes:
            return commands.Command(self.script, self.arguments, self.folder, self.environment, self.printed,
                                    self.printed)  # fmt: skip
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        with self.printed.open("a") as printed:
            return subprocess.Popen([*torchrun, self.script, *self.arguments], cwd=self.folder, env=self.environment,
                                    stdout=printed, stderr=printed)  # fmt: skip

    def finish(self) -> str:
        """Run the command to its end. Returns what it printed.

        Raises:
            CheckError: its exit status is not 0.
        """
        before = len(self.text())
        status = self.start().wait(LIMIT)
        printed = self.text()[before:]
        print(printed)
        require(status == 0, f"{self.script.name} ended with status {status}: {last_line(printed)}")
        return printed

    def interrupt(self, number: signal.Signals) -> int:
        """Start the command, and send a signal after its first checkpoint. Returns its exit status.

        SIGKILL goes to all its processes.

        Raises:
            CheckError: it had already ended.
        """
        process = self.start()
        while "saved " not in self.text() and process.poll() is None:
            time.sleep(0.02)
        require(process.poll() is None, f"the run ended before it could be interrupted: {last_line(self.text())}")
        for target in (process.pid, *(descendants(process.pid) if number == signal.SIGKILL else [])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
        return process.wait(LIMIT)

    def text(self) -> str:
        """Everything printed so far, by all starts of the command."""
        return self.printed.read_text(errors="replace")


def descendants(parent: int) -> list[int]:
    """Process IDs of all descendants of a process, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [parent]
    for number in found:
        found += children.get(number, [])
    return found[1:]


def last_line(text: str) -> str:
    """The last line of a text that is not blank."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def assert_same(run: Run, other: Run) -> None:
    """Require that checkpoints and log.txt of two runs are identical, bit by bit.

    Raises:
        CheckError: they are not.
    """
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        found = differences(*(torch.load(each.output / name, weights_only=True) for each in (run, other)))
        require(not found, f"{run.folder.name} differs from {other.folder.name} in {name}: {found[:5]}")
    logs = [(each.output / "log.txt").read_text() for each in (run, other)]
    require(logs[0] == logs[1], f"{run.folder.name} differs from {other.folder.name} in log.txt")


def check_run(
    setup: Setup, figures: Figures, flags: Sequence[str] = (), processes: int = 0, compares: bool = False
) -> None:
    """Train the demo to its accuracy, and evaluate its checkpoint if `compares`."""
    common = ["--config", ROOT / "recipes" / "digits.yaml", "--data-path", setup.digits, "--output_dir", "run",
              "--device", setup.device.type, "--num_workers", "0" if setup.quick else "3", *flags]  # fmt: skip
    common += ["--input-size", "32", "--epochs", "1"] if setup.quick else []
    start = time.monotonic()
    run = Run(setup.folder, common, processes)
    run.finish()
    figures["seconds"] = time.monotonic() - start
    entries = epoch_entries(read_log(run.output / "log.txt"))
    figures["training loss by epoch"] = [entry["train_loss"] for entry in entries]
    figures["top-1, %"] = entries[-1]["test_acc1"]
    figures["skipped steps"] = entries[-1]["bad_steps"]
    require(all(math.isfinite(entry["train_loss"]) for entry in entries), f"losses are not finite: {figures}")
    require(setup.quick or figures["top-1, %"] >= 95, f"top-1 is below the demo's 95 %: {figures}")
    if compares:
        Run(setup.folder, [*common, "--eval", "--resume", "run/checkpoint.pth"]).finish()
        evaluated = json.loads((run.output / "eval.json").read_text())["test_acc1"]
        require(evaluated == figures["top-1, %"], f"--eval gives {evaluated} %, training gave {figures['top-1, %']} %")


# Everything random or stateful: shuffle, augmentation, mixup, drop path, averaged weights, a best checkpoint.
RESUMABLE = [
    "--model", "SepViT_Lite", "--epochs", "2", "--model-ema", "--model-ema-warmup", "--warmup-epochs", "1", "--lr",
    "5e-3", "--output_dir", "run", "--auto-resume", "--print-freq", "5", "--deterministic",
]  # fmt: skip
SIZES = ["--batch-size", "64", "--num_workers", "3", "--checkpoint-every", "5"]
QUICK_SIZES = ["--batch-size", "16", "--num_workers", "0", "--checkpoint-every", "1", "--input-size", "32"]


def resumable(setup: Setup) -> list[object]:
    """Settings of a deterministic run with checkpoints within its epochs."""
    sizes = QUICK_SIZES if setup.quick else SIZES
    return [*RESUMABLE, *sizes, "--data-path", setup.digits, "--device", setup.device.type]


def check_resume(setup: Setup, figures: Figures, flags: Sequence[str] = (), processes: int = 0) -> None:
    """Compare a run that was killed and one that was stopped, both resumed, with an undisturbed one, bit for bit."""
    arguments = [*resumable(setup), *flags]
    whole = Run(setup.folder / "whole", arguments, processes)
    whole.finish()
    signals = {"killed": signal.SIGKILL} | ({} if processes else {"stopped": signal.SIGTERM})
    for name, number in signals.items():
        run = Run(setup.folder / name, arguments, processes)
        status = run.interrupt(number)
        require(number == signal.SIGKILL or status == 75, f"a stopped run ended with status {status}, not 75")
        place = re.search(r"resuming at (.*)", run.finish())
        figures[f"{name}, resumed at"] = place[1] if place else "the start"
        assert_same(run, whole)
    figures["bit for bit"] = True


def check_bad_steps(setup: Setup, figures: Figures) -> None:
    """Make losses and gradients of some steps non-finite. They must be skipped on the device, counted and logged."""
    arguments = [*resumable(setup), "--epochs", 1, "--checkpoint-every", 0]
    faults = dict(BAD_LOSS="0:1", BAD_GRADIENTS="0:3")
    run = Run(setup.folder, arguments, script="tests/faults/sabotage.py", environment=faults)
    run.finish()
    entries = read_log(run.output / "log.txt")
    events = [(entry["step"], entry["not_finite"]) for entry in entries if "not_finite" in entry]
    figures["skipped steps"] = [f"{what} of step {step}" for step, what in events]
    checkpoint = torch.load(run.output / "checkpoint.pth", weights_only=True)
    steps, taken = checkpoint["steps"], int(checkpoint["optimizer"]["state"][0]["step"])
    figures["steps"], figures["steps taken"] = steps, taken
    require(events == [(1, "loss"), (3, "gradients")], f"other steps were skipped: {figures}")
    require(taken == steps - 2, f"skipped steps changed the optimiser's state: {figures}")


def check_no_waiting(setup: Setup, figures: Figures, flags: Sequence[str]) -> None:
    """Run main.py while each call that makes the loop wait for the GPU raises an error, from the third step on."""
    train, guarded = main.train_one_epoch, itertools.count()

    def watched(training: Training, loader: Any, criterion: Any, *rest: Any) -> dict[str, float]:
        numbers = itertools.count(1)

        def observed(*batch: Tensor) -> Tensor:
            number = next(numbers)
            last = number == len(loader)  # the epoch's mean loss is read after its last step
            torch.cuda.set_sync_debug_mode("error" if number > 2 and not last else "default")
            figures["guarded steps"] = next(guarded) if number > 2 and not last else figures.get("guarded steps", 0)
            return criterion(*batch)

        return train(training, loader, observed, *rest)

    main.train_one_epoch = watched  # type: ignore[assignment] # it passes the rest on
    arguments = ["--config", ROOT / "recipes" / "digits.yaml", "--data-path", setup.digits, "--output_dir",
                 setup.folder / "run", "--device", setup.device.type, "--batch-size", 64, "--epochs", 2, "--mixup", 0.8,
                 "--cutmix", 1, "--drop-path", 0.1, "--reprob", 0.25, "--smoothing", 0.1, "--model-ema", "--print-freq",
                 1000, "--num_workers", 3, *flags]  # fmt: skip
    status = main.run(list(map(str, arguments)))
    require(status == 0, f"main.py ended with status {status}")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones((), device=setup.device).item()
    except RuntimeError:
        return
    raise CheckError("the debug mode notices no waiting, so the row shows nothing")


def check_out_of_memory(setup: Setup, figures: Figures) -> None:
    """Run main.py with a hundredth of the GPU's memory. It must end with one line and status 2."""
    torch.cuda.set_per_process_memory_fraction(0.01, setup.device)
    errors = io.StringIO()
    arguments = ["--data-path", setup.digits, "--output_dir", setup.folder / "run", "--batch-size", 128,
                 "--device", setup.device.type, "--num_workers", 3]  # fmt: skip
    with contextlib.redirect_stderr(errors):
        status = main.run(list(map(str, arguments)))
    figures["message"] = errors.getvalue().strip()
    require(status == 2, f"main.py ended with status {status}")
    require("main.py: out of memory" in figures["message"] and "--batch-size" in figures["message"], "another message")


def run_rows() -> list[Row]:
    """Rows that run main.py."""
    compiled = ("--compile", "--timeout", "600")
    rows = [
        Row("resume-compile", partial(check_resume, flags=compiled), limit=300),
        Row("resume-nccl", partial(check_resume, processes=1), limit=240),
        Row("run-compile", partial(check_run, flags=compiled), limit=240),
        Row("run-nccl", partial(check_run, flags=("--dist-eval",), processes=1)),
        Row("no-waiting-compile", partial(check_no_waiting, flags=compiled), limit=240, gpu=True),
    ]
    for amp, short in (("float32", "off"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        is_quick, flags = amp == "float32", ("--amp", short)
        rows += [
            Row(f"run-{amp}", partial(check_run, flags=flags, compares=True), quick=is_quick),
            Row(f"resume-{amp}", partial(check_resume, flags=flags), limit=240, quick=is_quick),
            Row(f"no-waiting-{amp}", partial(check_no_waiting, flags=flags), gpu=True),
        ]
    return [*rows, Row("bad-steps", check_bad_steps, quick=True), Row("out-of-memory", check_out_of_memory, gpu=True)]
