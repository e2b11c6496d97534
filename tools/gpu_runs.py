"""The rows of gpu_check.py that run main.py: training to an accuracy, resuming, bad steps, and no waiting for the GPU.

Commands run as in the tests: forked from the row's process, which has imported the libraries.
"""

if not __package__:
    import _repository  # noqa: F401
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

import main
from sepvit_lib.training.output import epoch_entries, read_log
from sepvit_lib.training.state import Training
from tools.gpu_record import Figures
from tools.gpu_rows import CheckError, Row, Setup, require

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import processes
from conftest import ROOT, differences

TOP1 = 95.0  # % that the demo reaches
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
        processes.fork_from_here()

    def start(self) -> subprocess.Popen | processes.Command:
        """Start the command. What it prints is appended to `printed`."""
        if not self.processes:
            return processes.Command(
                self.script, self.arguments, self.folder, self.environment, self.printed, self.printed
            )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        with self.printed.open("a") as printed:
            return subprocess.Popen(
                [*torchrun, self.script, *self.arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=printed,
                stderr=printed,
            )

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


def difference(run: Run, other: Run) -> str:
    """Where two runs first differ, bit by bit, in their checkpoints or in log.txt; "" if nowhere."""
    for path in sorted(run.output.glob("checkpoint*.pth")):  # numbered ones first, then the newest and the best
        if (other.output / path.name).exists():
            found = differences(*(torch.load(each.output / path.name, weights_only=True) for each in (run, other)))
            if found:
                return f"{path.name}: {len(found)} entries, {', '.join(sorted(found)[:5])}"
    logs = [(each.output / "log.txt").read_text() for each in (run, other)]
    return "" if logs[0] == logs[1] else "log.txt"


def record_run(figures: Figures, output: Path, least: float) -> None:
    """Record a run's losses and top-1, which has to reach `least` %."""
    entries = epoch_entries(read_log(output / "log.txt"))
    figures["training loss by epoch"] = [entry["train_loss"] for entry in entries]
    figures["top-1, %"] = entries[-1]["test_acc1"]
    figures["skipped steps"] = entries[-1]["bad_steps"]
    require(all(math.isfinite(entry["train_loss"]) for entry in entries), f"losses are not finite: {figures}")
    require(figures["top-1, %"] >= least, f"top-1 is below {least} %: {figures}")


def check_run(setup: Setup, figures: Figures, flags: Sequence[str]) -> None:
    """Train the demo to its accuracy, and evaluate its checkpoint."""
    common = [
        "--config",
        ROOT / "recipes" / "digits.yaml",
        "--data-path",
        setup.digits,
        "--output_dir",
        "run",
        "--device",
        setup.device.type,
        "--num_workers",
        "0" if setup.quick else "3",
        *flags,
    ]
    common += ["--input-size", "32", "--epochs", "1"] if setup.quick else []
    start = time.monotonic()
    run = Run(setup.folder, common)
    run.finish()
    figures["seconds"] = time.monotonic() - start
    record_run(figures, run.output, 0.0 if setup.quick else TOP1)
    Run(setup.folder, [*common, "--eval", "--resume", "run/checkpoint.pth"]).finish()
    evaluated = json.loads((run.output / "eval.json").read_text())["test_acc1"]
    require(evaluated == figures["top-1, %"], f"--eval gives {evaluated} %, training gave {figures['top-1, %']} %")


# Everything random or stateful: shuffle, augmentation, mixup, drop path, averaged weights, a best checkpoint.
RESUMABLE = [
    "--model",
    "SepViT_Lite",
    "--epochs",
    "2",
    "--model-ema",
    "--model-ema-warmup",
    "--warmup-epochs",
    "1",
    "--lr",
    "5e-3",
    "--output_dir",
    "run",
    "--auto-resume",
    "--print-freq",
    "5",
    "--deterministic",
    "--keep-checkpoints",
    "20",
]
SIZES = ["--batch-size", "64", "--num_workers", "3", "--checkpoint-every", "4"]
QUICK_SIZES = ["--batch-size", "16", "--num_workers", "0", "--checkpoint-every", "1", "--input-size", "32"]


def resumable(setup: Setup) -> list[object]:
    """Settings of a deterministic run with checkpoints within its epochs."""
    sizes = QUICK_SIZES if setup.quick else SIZES
    return [*RESUMABLE, *sizes, "--data-path", setup.digits, "--device", setup.device.type]


def check_resume(
    setup: Setup, figures: Figures, flags: Sequence[str] = (), processes: int = 0, repeats: bool = False
) -> None:
    """Compare a run that was killed and one that was stopped, both resumed, with an undisturbed one, bit for bit.

    `repeats` compares the undisturbed run with another one, too.
    """
    arguments = [*resumable(setup), *flags]
    undisturbed = [Run(setup.folder / name, arguments, processes) for name in ["whole", "repeated"][: 1 + repeats]]
    for run in undisturbed:
        run.finish()
    disturbed = []
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM))[: 1 if processes else 2]:
        disturbed.append(Run(setup.folder / name, arguments, processes))
        status = disturbed[-1].interrupt(number)
        require(number == signal.SIGKILL or status == 75, f"a stopped run ended with status {status}, not 75")
        place = re.search(r"resuming at (.*)", disturbed[-1].finish())
        figures[f"{name}, resumed at"] = place[1] if place else "the start"
    pairs = itertools.combinations([*undisturbed, *disturbed], 2)
    found = {f"{a.folder.name} and {b.folder.name}": difference(a, b) for a, b in pairs}
    figures["differences"] = {pair: text or "none" for pair, text in found.items()}
    require(not any(found.values()), "the runs differ")


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


MIXING = ["--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.1", "--reprob", "0.25", "--smoothing", "0.1"]


def check_no_waiting(setup: Setup, figures: Figures, flags: Sequence[str], first: int = 3, least: float = 0.0) -> None:
    """Run main.py while each call that makes the loop wait for the GPU raises an error.

    Args:
        setup: where to run.
        figures: the row's figures.
        flags: settings of main.py.
        first: the first step of an epoch that must not wait.
        least: top-1 (%) to reach.
    """
    train = main.train_one_epoch

    def watched(training: Training, loader: Any, criterion: Any, *rest: Any) -> dict[str, float]:
        numbers = itertools.count(1)

        def observed(*batch: Tensor) -> Tensor:
            is_guarded = first <= next(numbers) < len(loader)  # after the last step, the mean loss is read
            torch.cuda.set_sync_debug_mode("error" if is_guarded else "default")
            figures["guarded steps"] = figures.get("guarded steps", 0) + is_guarded
            return criterion(*batch)

        return train(training, loader, observed, *rest)

    main.train_one_epoch = watched  # type: ignore[assignment] # it passes the rest on
    output = setup.folder / "run"
    arguments = ["--config", ROOT / "recipes" / "digits.yaml", "--data-path", setup.digits, "--output_dir", output]
    arguments += ["--device", setup.device.type, "--model-ema", "--print-freq", 1000, "--num_workers", 3, *flags]
    status = main.run(list(map(str, arguments)))
    require(status == 0, f"main.py ended with status {status}")
    record_run(figures, output, least)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones((), device=setup.device).item()
    except RuntimeError:
        return
    raise CheckError("the debug mode notices no waiting, so the row shows nothing")


def check_out_of_memory(setup: Setup, figures: Figures) -> None:
    """Run main.py with a hundredth of the GPU's memory. It must end with one line and status 2."""
    torch.cuda.set_per_process_memory_fraction(0.01)
    errors = io.StringIO()
    arguments = [
        "--data-path",
        setup.digits,
        "--output_dir",
        setup.folder / "run",
        "--batch-size",
        128,
        "--device",
        setup.device.type,
        "--num_workers",
        3,
    ]
    with contextlib.redirect_stderr(errors):
        status = main.run(list(map(str, arguments)))
    figures["message"] = errors.getvalue().strip()
    require(status == 2, f"main.py ended with status {status}")
    require("main.py: out of memory" in figures["message"] and "--batch-size" in figures["message"], "another message")


def run_rows() -> list[Row]:
    """Rows that run main.py. Those that compile take longest and come first."""
    compiled = ("--compile", "--timeout", "600")
    rows = [
        Row("resume-compile", partial(check_resume, flags=compiled, repeats=True), limit=360),
        Row("run-compile", partial(check_no_waiting, flags=compiled, least=TOP1), limit=300, gpu=True),
        Row("resume-nccl", partial(check_resume, flags=("--dist-eval",), processes=1), limit=240),
    ]
    for amp, short in (("float32", "off"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        is_quick, flags = amp == "float32", ("--amp", short)
        # Steps that the search for float16's loss scale skips do wait.
        waiting = partial(
            check_no_waiting,
            flags=(*flags, "--batch-size", "64", "--epochs", "2", *MIXING),
            first=12 if amp == "float16" else 3,
        )
        rows += [
            Row(f"resume-{amp}", partial(check_resume, flags=flags), limit=240),
            Row(f"run-{amp}", partial(check_run, flags=flags), quick=is_quick),
            Row(f"no-waiting-{amp}", waiting, gpu=True),
        ]
    return [*rows, Row("bad-steps", check_bad_steps, quick=True), Row("out-of-memory", check_out_of_memory, gpu=True)]
