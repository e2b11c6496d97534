"""Harness of the fault tests: real training runs that are killed and compared with an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import small_model
import torch
from conftest import ROOT, differences
from processes import Command, start_tasks

from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.mm.training_run import DenseNames

DENSE_NAMES = DenseNames(interval=0, keep=1, keep_regular=-1)  # to list checkpoints

RESUME_STATUS = 75
LIMIT = 900  # seconds that a test waits for anything, enough for slow machines
# Everything random or stateful: shuffle, augmentation, mixup, drop path, averaged weights, a best checkpoint.
RECIPE = (
    f"--model {small_model.MODEL} --input-size 32 --batch-size 8 --epochs 2 --model-ema --model-ema-warmup "
    "--warmup-epochs 1 --lr 5e-3 --output_dir run --device cpu --checkpoint-every 2 --auto-resume --print-freq 1 "
    "--keep-checkpoints 3 --timeout 100 --num_workers 0".split()
)
DENSE_RECIPE = "--from-scratch --auto-resume --work-dir run --checkpoint-every 2 --timeout 100".split()

STARTED: list[subprocess.Popen | Command] = []


def kill_started() -> None:
    """Kill all processes that a test started and left running, with their descendants."""
    for process in STARTED:
        if process.poll() is None:
            for number in (*descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()
    STARTED.clear()


class Run:
    """A training run of main.py, with the smallest network, in its own folder; restarted with the same command.

    Attributes:
        script: the command's script.
        step: words that each step prints.

    Args:
        folder: working folder.
        data: images in ImageNet layout.
        settings: settings added to `RECIPE`; later ones win.
        processes: number of processes for torchrun; 0 runs one process without torchrun.
        launcher: torchrun's own settings.
        environment: environment variables to add.
    """

    script = "tests/fixtures/small_main.py"
    step = "] loss"

    def __init__(
        self,
        folder: Path,
        data: Path,
        *settings: str,
        processes: int = 0,
        launcher: tuple[str, ...] = ("--standalone",),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.output = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", *launcher, f"--nproc_per_node={processes}"]
        self.command = [*start, str(ROOT / self.script), *self.arguments(data), *map(str, settings)]
        self.environment = {**os.environ, **(environment or {})}

    def arguments(self, data: Path) -> list[str]:
        """The command's arguments, to which a test adds others."""
        return [*RECIPE, "--data-path", str(data)]

    def start(self) -> subprocess.Popen | Command:
        """Start the command in a new session, so that all its processes can be killed together."""
        printed = self.folder / "printed.txt"
        if self.command[0] == sys.executable and self.command[1].endswith(".py"):
            script, *arguments = self.command[1:]
            STARTED.append(Command(Path(script), arguments, self.folder, self.environment, printed, printed, True))
        else:
            with printed.open("a+") as log:
                STARTED.append(
                    subprocess.Popen(
                        self.command,
                        cwd=self.folder,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=self.environment,
                        start_new_session=True,
                    )
                )
        return STARTED[-1]

    def start_tasks(self, count: int) -> list[Command]:
        """Start the command on several ranks without torchrun."""
        printed = self.folder / "printed.txt"
        tasks = start_tasks(
            count, Path(self.command[1]), self.command[2:], self.folder, self.environment, printed, printed
        )
        STARTED.extend(tasks)
        return tasks

    def text(self) -> str:
        """Everything printed so far, by all starts of the command."""
        printed = self.folder / "printed.txt"
        return printed.read_text() if printed.exists() else ""

    def finish(self, timeout: float = LIMIT) -> str:
        """Run the command to its end and require that it succeeds. Return what it printed."""
        before = len(self.text())
        process = self.start()
        status = process.wait(timeout)
        printed = self.text()[before:]
        assert status == 0, printed
        return printed

    def wait_for(self, process: subprocess.Popen | Command, words: str, count: int = 1, timeout: float = LIMIT) -> None:
        """Wait until all starts together have printed `words` `count` times, or the command has ended."""
        end = time.monotonic() + timeout
        while self.text().count(words) < count and process.poll() is None:
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def start_and_wait(self, rng: random.Random) -> subprocess.Popen | Command:
        """Start the command and wait until a random moment."""
        lines = self.text().count(self.step)
        process = self.start()
        if rng.random() < 0.8:  # start-up takes long and would be hit too often
            self.wait_for(process, self.step, lines + 1)
        time.sleep(rng.uniform(0, 2))
        return process

    def kill(self, rng: random.Random) -> bool:
        """Start the command and kill all its processes at a random moment. Return False if it had already ended."""
        process = self.start_and_wait(rng)
        if process.poll() is not None:
            return False
        # torchrun's workers have their own sessions: sometimes let them outlive it for a while
        workers = descendants(process.pid) if rng.random() < 0.7 else []
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            return False
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        process.wait()
        return True


class DenseRun(Run):
    """A training run of segmentation or detection.

    Args:
        kind: 'segmentation' or 'detection'.
        folder: working folder.
        config: the config.
        *settings: settings added to `DENSE_RECIPE`.
        **others: see `Run`.
    """

    step = "(train) ["  # of the line that mmengine prints

    def __init__(self, kind: str, folder: Path, config: Path, *settings: str, **others: Any) -> None:
        self.script = f"{kind}/train.py"
        super().__init__(folder, config, *settings, **others)

    def arguments(self, data: Path) -> list[str]:
        """The command's arguments: the config comes first."""
        return [str(data), *DENSE_RECIPE]

    def start_tasks(self, count: int) -> list[Command]:
        """Start the command on several ranks without torchrun."""
        self.command += ["--launcher", "pytorch"] if "--launcher" not in self.command else []
        return super().start_tasks(count)


def play_slurm(folder: Path, variables: str) -> dict[str, str]:
    """Write scripts that stand in for srun, which runs one task, and scontrol, which records its arguments.

    Returns:
        environment variables of a job with them.
    """
    srun = f'export SLURM_NTASKS=1 {variables}\n"$@" &\necho $! > {folder}/task\nwait $!\n'
    for name, body in (("srun", srun), ("scontrol", f'echo "$@" >> {folder}/scontrol.txt\n')):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(ROOT), PYTHON=sys.executable)
    return {**job, "PATH": f"{folder}:{os.environ['PATH']}"}


def descendants(parent: int) -> list[int]:
    """Process IDs of all descendants of a process."""
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return [number for child in map(int, listed) for number in (child, *descendants(child))]


def assert_same_state(output: Path, other: Path, *parts: str) -> None:
    """Require that the newest checkpoints of two runs are identical, bit by bit, but for the number of loader workers.

    Args:
        output: a run's folder.
        other: another one's.
        *parts: the parts to compare; all by default.
    """
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (output, other))
    a["args"]["num_workers"] = b["args"]["num_workers"]
    assert a.keys() == b.keys()
    for part in parts or a:
        found = differences(a[part], b[part])
        assert not found, f"{part}: {found[:5]}"


def assert_same(output: Path, other: Path) -> None:
    """Require that checkpoints and log.txt of two runs are identical, bit by bit."""
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (output, other))
        found = differences(a, b)
        assert not found, f"{name}: {found[:5]}"
    ours, theirs = ((folder / "log.txt").read_text().splitlines() for folder in (output, other))
    assert ours == theirs, [pair for pair in zip(ours, theirs) if pair[0] != pair[1]]


def assert_same_dense(output: Path, other: Path, in_order: bool = True) -> None:
    """Require that the last and best checkpoints and log.txt of two runs are identical, bit by bit, but for times.

    Args:
        output: a run's folder.
        other: another one's.
        in_order: whether the lines of log.txt have to be in the same order, too.
    """
    last = DENSE_NAMES.numbered(other)[0].name
    has_best = (other / "best.pth").exists()  # not without a single detection
    assert (output / "best.pth").exists() == has_best
    for name in (last, "best.pth") if has_best else (last,):
        a, b = (read_checkpoint(str(folder / name), name) for folder in (output, other))
        for part in ("state_dict", "optimizer", "param_schedulers", "run", "args", "data"):
            found = differences(a[part], b[part])
            assert not found, f"{name}: {part}: {found[:5]}"
        logged, also = (dict(checkpoint["message_hub"]["log_scalars"]) for checkpoint in (a, b))
        assert logged.keys() == also.keys()
        for key in logged.keys() - {"train/time", "train/data_time", "val/time", "val/data_time"}:
            assert np.array_equal(logged[key].data, also[key].data), f"{name}: {key}"
    ours, theirs = ((folder / "log.txt").read_text().splitlines() for folder in (output, other))
    if not in_order:
        ours, theirs = sorted(ours), sorted(theirs)
    assert ours == theirs, [pair for pair in zip(ours, theirs) if pair[0] != pair[1]]


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Damage a file: truncate it, or flip one bit of a tensor."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: rng.randrange(len(content) // 2, len(content) - 1)]
    else:
        content[rng.randrange(len(content) // 4, len(content) // 2)] ^= 0x40
    path.unlink()  # its other hard links keep their content
    path.write_bytes(content)
