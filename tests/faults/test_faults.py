"""Training runs that are killed, preempted or given bad data, each compared with an undisturbed run."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
import torch
from conftest import ROOT, Code, free_port, refusal
from harness import LIMIT, RECIPE, RESUME_STATUS, Run, assert_same, assert_same_state, damage, descendants, play_slurm
from PIL import Image

import main
from sepvit_lib.common.errors import UserError, is_transient
from sepvit_lib.common.storage import is_storage_error
from sepvit_lib.run import checkpoints, output
from sepvit_lib.run.checkpoint_names import StepNames

WEIGHTS = ("model", "model_ema", "optimizer")  # of runs in other folders, or with copies of the images


@pytest.fixture(scope="module")
def undisturbed(few_digits, tmp_path_factory) -> Path:
    """The output folder of an undisturbed run."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), few_digits)
    assert "trained in" in run.finish()
    return run.output


@pytest.fixture(scope="module")
def undisturbed_pair(few_digits, tmp_path_factory) -> Path:
    """The output folder of an undisturbed run on two processes."""
    run = pair(tmp_path_factory.mktemp("pair"), few_digits)
    assert statuses(run) == [0, 0]
    return run.output


def pair(folder: Path, data: Path, *settings: str, **others) -> Run:
    """A run on two processes with half the batch each."""
    return Run(folder, data, "--batch-size", "4", *settings, **others)


def statuses(run: Run, count: int = 2) -> list[int]:
    """Run the command on several ranks. Return their exit statuses."""
    return [task.wait(LIMIT) for task in run.start_tasks(count)]


def events(folder: Path, name: str) -> list:
    """Values of a field in the lines of log.txt that have it."""
    return [entry[name] for entry in output.read_log(folder / "log.txt") if name in entry]


@pytest.fixture(autouse=True)
def kill_leftovers():
    """Kill the processes that a failed test left running."""
    yield
    harness.kill_started()


def sabotaged(run: Run, **variables: str) -> Run:
    """Make a run start sabotage.py, with these environment variables."""
    run.command[run.command.index(str(ROOT / run.script))] = str(ROOT / "tests/faults/sabotage.py")
    run.environment |= variables
    return run


def assert_nothing_saved_is_lost(run: Run) -> None:
    """Require that the newest checkpoint reported as saved exists, and that every kept checkpoint is intact."""
    reported = re.findall(r"saved run/(checkpoint-\d+\.pth)", run.text())
    if reported:
        newest = StepNames(1).numbered(run.output)
        assert newest[0].name >= max(reported)
        # processes that outlive torchrun save once more and delete the oldest
        assert all(checkpoints.damage(path) is None or not path.exists() for path in newest)


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------

LITE = ["--model", "SepViT_Lite"]
KILLED = {  # name: settings, processes, kills in the long form
    "one process": (LITE, 0, 25),
    "one process, two workers": (["--num_workers", "2"], 0, 10),
    "two processes": (["--batch-size", "4"], 2, 10),
    "three processes, accumulation": (["--batch-size", "2", "--accum-steps", "2"], 3, 5),
    "float16, plateau schedule": (["--amp", "float16", "--sched", "plateau", "--patience-epochs", "0"], 0, 5),
    "float16 on a GPU, --deterministic": (["--device", "cuda", "--amp", "float16", "--deterministic"], 0, 5),
}


def kill_repeatedly(start: Callable[[Path], Run], kills: int, folder: Path, undisturbed: Path) -> None:
    """Kill a run at random moments and start it again until it ends, and again another one."""
    rng, last = random.Random(folder.name), StepNames(1).numbered(undisturbed)[0].name
    run, done = start(folder / "run"), 0
    while done < kills:
        done += run.kill(rng)
        assert_nothing_saved_is_lost(run)
        if (run.output / last).exists() or "trained in" in run.text():  # complete: kill another run
            run.finish()
            assert_same(run.output, undisturbed)
            run = start(folder / f"run{len(list(folder.iterdir()))}")
    run.finish()
    assert_same(run.output, undisturbed)


def test_killed(few_digits, tmp_path, undisturbed, table):
    kill_repeatedly(lambda folder: Run(folder, few_digits), 2, tmp_path, undisturbed)
    table.add("killed at a random moment, one process", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_many_times(name, few_digits, tmp_path, table):
    """SepViT_Lite in one process, the smallest network in the other forms."""
    settings, processes, kills = KILLED[name]
    if "cuda" in settings and not torch.cuda.is_available():
        pytest.skip("needs a GPU")

    def start(folder: Path) -> Run:
        return Run(folder, few_digits, *settings, processes=processes)

    start(tmp_path / "undisturbed").finish()
    kill_repeatedly(start, kills, tmp_path / "killed", tmp_path / "undisturbed/run")
    table.add(f"killed at a random moment, {name}", kills)


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_with_a_table_of_imbalanced_classes(kills, few_digits, tmp_path, table):
    """Split by a share, drawn by class, with weights of classes, and ended early by the balanced accuracy."""
    train = few_digits / "train"
    images = [
        path for label, count in (("0", 16), ("1", 10), ("2", 6)) for path in sorted((train / label).iterdir())[:count]
    ]
    listing, weights = tmp_path / "table.csv", tmp_path / "weights.json"
    listing.write_text("path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in images))
    weights.write_text('{"0": 0.5, "1": 1, "2": 2}')
    settings = ["--data-set", f"csv/{listing}", "--val-fraction", "0.25", "--sampler", "balanced"]
    settings += ["--class-weights", str(weights), "--watch", "balanced-accuracy", "--early-stop", "4", "--epochs", "30"]
    settings += ["--warmup-epochs", "0", "--lr", "0.1"]

    def start(folder: Path) -> Run:
        return Run(folder, train, *settings)

    undisturbed = start(tmp_path / "undisturbed")
    assert "--early-stop 4" in undisturbed.finish()
    assert 6 <= len(events(undisturbed.output, "class_counts")) < 30
    kill_repeatedly(start, kills, tmp_path / "killed", undisturbed.output)
    for run in (tmp_path / "killed").iterdir():
        assert (run / "run/split.csv").read_bytes() == (undisturbed.output / "split.csv").read_bytes()
    table.add("killed at a random moment, a table with imbalanced classes, ended early", kills)


@pytest.mark.slow
def test_loader_workers_do_not_change_results(few_digits, tmp_path, undisturbed):
    run = Run(tmp_path, few_digits, "--num_workers", "2")
    run.finish()
    assert_same_state(run.output, undisturbed)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", pytest.param("changed", marks=pytest.mark.slow)])
def test_damaged_checkpoint(how, few_digits, tmp_path, undisturbed, table):
    run = Run(tmp_path, few_digits)
    process = run.start()
    run.wait_for(process, "saved ", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    newest, before, *_ = StepNames(1).numbered(run.output)
    damage(newest, how, random.Random(how))
    printed = run.finish()
    assert f"WARNING: run/{newest.name} is damaged (" in printed
    assert f"checkpoint run/{before.name}: resuming at epoch 0, step 4" in printed
    assert_same(run.output, undisturbed)
    table.add("newest checkpoint truncated or changed")


def is_mountable(folder: Path) -> bool:
    """Whether this user may mount a small file system at a folder. Unmounts it again."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    return mount.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def test_full_disk(few_digits, tmp_path, undisturbed, table):
    """While a file system is full, every write fails, training continues, and no existing checkpoint is lost."""
    output = tmp_path / "run"
    output.mkdir()
    if not is_mountable(output):
        pytest.skip("no right to mount a small file system; test_failed_write has the same faults by a limit")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", output], check=True)
    try:
        run = Run(tmp_path, few_digits)
        process = run.start()
        run.wait_for(process, "No space left on device): the previous checkpoint is kept, training continues")
        held = StepNames(1).numbered(output)
        assert held
        assert all(checkpoints.damage(path) is None for path in held)
        subprocess.run(["mount", "-o", "remount,size=400m", output], check=True)
        assert process.wait(LIMIT) == 0
        assert not list(output.glob("*.tmp"))
        assert_same(output, undisturbed)
    finally:
        subprocess.run(["umount", output], check=True)
    table.add("full file system")


def test_failed_write(few_digits, tmp_path, undisturbed, table):
    """The file size limit is below the size of a checkpoint."""
    run = Run(tmp_path, few_digits)
    run.command = ["prlimit", "--fsize=100000", *run.command]
    assert run.start().wait(LIMIT) == 2
    printed = run.text()
    assert printed.count("WARNING: run/checkpoint-000000") == 8
    last = printed.strip().splitlines()[-1]
    assert last.startswith("main.py: --output_dir run: the last checkpoint could not be written (File too large)")
    assert not list(run.output.glob("*.pth*"))
    assert (run.output / "log.txt").read_text() == (undisturbed / "log.txt").read_text()
    table.add("failed writes", 8)


@pytest.mark.slow
def test_preempted_when_writes_fail(few_digits, tmp_path, undisturbed, table):
    run = Run(tmp_path, few_digits)
    whole = run.command
    run.command = ["prlimit", "--fsize=100000", *whole]
    process = run.start()
    run.wait_for(process, "] loss", 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert "WARNING: --output_dir run: the last checkpoint could not be written (File too large)" in run.text()
    assert "the same command with --auto-resume resumes from the last checkpoint" in run.text()
    run.command = whole
    run.finish()
    assert_same(run.output, undisturbed)
    table.add("SIGTERM when writes fail")


# ----------------------------------------------------------------------------------------------------------------------
# Preempted
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_preempted(number, few_digits, tmp_path, undisturbed, table):
    run = Run(tmp_path, few_digits, "--num_workers", "1")
    process = run.start()
    run.wait_for(process, "] loss", 4 if number == signal.SIGTERM else 9)
    os.killpg(process.pid, number)  # schedulers signal the process group, with its loader workers
    assert process.wait(LIMIT) == RESUME_STATUS
    assert "main.py: stopped by a signal before epoch" in run.text()
    assert_nothing_saved_is_lost(run)
    run.command += ["--num_workers", "0"]
    run.finish()
    assert_same_state(run.output, undisturbed)
    table.add("SIGTERM or SIGUSR1 to the run")


@pytest.mark.slow
def test_preempted_many_times(few_digits, tmp_path, undisturbed, table):
    """At random moments, including start-up and validation."""
    rng = random.Random("preempted")
    done = 0
    run = Run(tmp_path / "run0", few_digits)
    while done < 10:
        process = run.start_and_wait(rng)
        process.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        status = process.wait(LIMIT)
        assert status in (RESUME_STATUS, 0, -signal.SIGTERM, -signal.SIGUSR1), run.text()  # killed while importing
        assert_nothing_saved_is_lost(run)
        done += status != 0
        if status == 0:
            assert_same(run.output, undisturbed)
            run = Run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", few_digits)
    run.finish()
    assert_same(run.output, undisturbed)
    table.add("SIGTERM or SIGUSR1 at a random moment", done)


def test_one_of_two_processes_preempted(few_digits, tmp_path, undisturbed_pair, table):
    run = pair(tmp_path, few_digits)
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], "] loss", 3)
    tasks[1].send_signal(signal.SIGUSR1)
    assert [task.wait(LIMIT) for task in tasks] == [RESUME_STATUS] * 2
    assert run.text().count("stopped by a signal before") == 1
    assert statuses(run) == [0, 0]
    assert_same(run.output, undisturbed_pair)
    table.add("SIGUSR1 to one process of two")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_preempted(number, few_digits, tmp_path, undisturbed_pair, table):
    launcher = ("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    run = pair(tmp_path, few_digits, processes=2, launcher=launcher)
    process = run.start()
    run.wait_for(process, "] loss", 3)
    process.send_signal(number)
    assert process.wait(LIMIT) == 1
    assert "stopped by a signal before" in run.text()
    run.finish()
    assert_same(run.output, undisturbed_pair)
    table.add("SIGTERM or SIGUSR1 to torchrun")


# ----------------------------------------------------------------------------------------------------------------------
# Lost processes
# ----------------------------------------------------------------------------------------------------------------------


LOST = [
    pytest.param(process, number, marks=() if (process, number) == (1, signal.SIGKILL) else pytest.mark.slow)
    for process in (0, 1)
    for number in (signal.SIGKILL, signal.SIGSTOP)
]


@pytest.mark.parametrize(("process", "number"), LOST)
def test_lost_process(process, number, few_digits, tmp_path, undisturbed_pair, table):
    """Without torchrun, the remaining process has to notice the loss."""
    run = pair(tmp_path, few_digits)
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], "] loss", 4)
    lost, other = tasks[process], tasks[1 - process]
    lost.send_signal(number)
    assert other.wait(LIMIT) == RESUME_STATUS
    what = {0: "does not respond", 1: r"\(.*\), last seen at .*, has sent no heartbeat"}[process]
    assert re.search(rf"main\.py: process {1 - process}: process {process} {what}", run.text())
    lost.kill()
    lost.wait()
    assert statuses(run) == [0, 0]
    assert_same(run.output, undisturbed_pair)
    table.add("process lost to SIGKILL or SIGSTOP")


HANGS = r"\([^)]*\) hangs at epoch 0, step 3: no progress for \d+ s"
FAILS = r"\(.*\), last seen at .*, failed \(RuntimeError: out of memory\)"


@pytest.mark.parametrize(
    ("process", "variable", "status", "words", "fault"),
    [
        (0, "FAIL", 1, FAILS, "process that fails with an error of the program"),
        (1, "FAIL", 1, FAILS, "process that fails with an error of the program"),
        pytest.param(1, "HANG", RESUME_STATUS, HANGS, "hanging process", marks=pytest.mark.slow),
    ],
)
def test_hanging_or_failing_process(process, variable, status, words, fault, few_digits, tmp_path, table):
    """A hanging process is alive but makes no progress. An error would occur again, so no restart is asked for."""
    run = sabotaged(pair(tmp_path, few_digits, "--timeout", "20"), **{variable: f"{process}:4"})
    assert statuses(run) == [status] * 2
    assert re.search(rf"process {1 - process}: process {process} {words}", run.text())
    table.add(fault)


@pytest.mark.slow
def test_network_error(few_digits, tmp_path, undisturbed_pair, table):
    """All processes are alive, and a restart may succeed."""
    run = sabotaged(pair(tmp_path, few_digits), CUT_OFF="1:4")
    assert statuses(run) == [RESUME_STATUS] * 2
    assert "main.py: process 1: DistBackendError: NCCL error: unhandled system error" in run.text()
    run.environment.pop("CUT_OFF")
    assert statuses(run) == [0, 0]
    assert_same_state(run.output, undisturbed_pair)
    table.add("network error")


@pytest.mark.slow
def test_lost_loader_worker(few_digits, tmp_path, undisturbed, table):
    """SIGKILL, as the kernel sends it when memory runs out."""
    run = Run(tmp_path, few_digits, "--num_workers", "1")
    process = run.start()
    run.wait_for(process, "] loss", 4)
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert re.search(r"main\.py: process 0: DataLoader worker .*; run the same command again", run.text())
    assert "Traceback" not in run.text()
    run.finish()
    assert_same_state(run.output, undisturbed)
    table.add("loader worker killed")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_torchrun_restarts(count, few_digits, tmp_path, undisturbed_pair, table):
    """On one node, and on two with the settings from docs/training.md. Both nodes are this machine."""
    launcher = {
        1: "--standalone --max-restarts=1",
        2: f"--nnodes=2 --max-restarts=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:{free_port()}",
    }[count]
    environment = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", OMP_NUM_THREADS="1") if count == 2 else None
    run = pair(tmp_path, few_digits, processes=2 // count, launcher=launcher.split(), environment=environment)
    nodes = [run.start() for _ in range(count)]
    run.wait_for(nodes[0], "] loss", 4)
    os.kill(descendants(nodes[-1].pid)[-1 if count == 1 else 0], signal.SIGKILL)
    assert [node.wait(LIMIT) for node in nodes] == [0] * count
    assert run.text().count("checkpoint run/checkpoint-") == 1
    assert_same(run.output, undisturbed_pair)
    table.add("process killed under torchrun --max-restarts, on one node and on two")


@pytest.mark.slow
def test_elastic(few_digits, tmp_path, table):
    """Start on four processes, fail on three, which cannot share four batches per step, and finish on two.

    The losses match a run on two processes throughout.
    """
    run = Run(tmp_path, few_digits, "--batch-size", "2")
    tasks = run.start_tasks(4)
    run.wait_for(tasks[0], "saved ", 2)
    for task in tasks:
        task.kill()
        task.wait()
    assert statuses(run, 3) == [2, 2, 2]
    assert "step has 4 batches of 2 images, which 3 processes with these settings cannot divide evenly" in run.text()
    assert statuses(run) == [0, 0]
    assert "4 batches of 2 images per step, as before; 2 processes accumulate 2 each" in run.text()
    whole = Run(tmp_path / "pair", few_digits, "--batch-size", "2", "--accum-steps", "2")
    assert statuses(whole) == [0, 0]
    checkpoint = torch.load(run.output / "checkpoint.pth", weights_only=True)
    assert (checkpoint["steps"], checkpoint["batches_per_step"]) == (12, 4)
    losses, others = (events(folder, "train_loss") for folder in (run.output, whole.output))
    assert len(losses) == 2
    assert losses == pytest.approx(others, rel=1e-3)
    table.add("four processes, resumed by two")


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite losses and gradients
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_loss_on_one_of_two_processes(few_digits, tmp_path, table):
    run = sabotaged(pair(tmp_path, few_digits, "--dump-bad-batch"), BAD_LOSS="1:3,8")
    assert statuses(run) == [0, 0]
    bad = [entry for entry in output.read_log(run.output / "log.txt") if "not_finite" in entry]
    assert bad == [dict(epoch=epoch, step=step, not_finite="loss", in_row=1) for epoch, step in ((0, 3), (1, 2))]
    assert events(run.output, "bad_steps")[-1] == 2
    checkpoint = torch.load(run.output / "checkpoint.pth", weights_only=True)
    assert checkpoint["steps"] == 12
    assert checkpoint["optimizer"]["state"][0]["step"] == 10
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    batch = torch.load(run.output / "bad_batch-00000003-process1.pth", weights_only=True)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert (batch["epoch"], batch["step"]) == (0, 3)
    table.add("non-finite losses, for one step", 2)


@pytest.mark.slow
def test_bad_losses_may_be_read_one_step_late(few_digits, tmp_path, table):
    """GPUs read flags one step late, which LAG imitates. Results are identical, also at checkpoints and at the end."""
    runs = [sabotaged(Run(tmp_path / lag, few_digits), BAD_LOSS="0:3,8,12", LAG=lag) for lag in ("0", "1")]
    for run in runs:
        run.finish()
    assert_same(runs[0].output, runs[1].output)
    assert events(runs[1].output, "bad_steps")[-1] == 3
    table.add("non-finite losses, for one step", 3)


def test_too_many_bad_losses(few_digits, tmp_path, table):
    run = sabotaged(Run(tmp_path, few_digits, "--max-bad-steps", "4"), BAD_LOSS="0:8,9,10,11,12")
    assert run.start().wait(LIMIT) == 2
    assert "\nmain.py: --max-bad-steps 4: this many consecutive steps were not finite" in run.text()
    newest = StepNames(1).numbered(run.output)[0]
    assert newest.name == "checkpoint-00000006.pth"
    assert checkpoints.damage(newest) is None
    table.add("non-finite losses, for good")


@pytest.mark.slow
def test_float16_gradients_that_stay_non_finite(few_digits, tmp_path, table):
    """Halving the loss scale from 65,536 does not help. Once it is below 1, skipped steps count as bad."""
    steps = ",".join(map(str, range(3, 60)))
    settings = "--amp float16 --batch-size 2 --max-bad-steps 4"
    run = sabotaged(Run(tmp_path, few_digits, *settings.split()), BAD_GRADIENTS=f"0:{steps}")
    assert run.start().wait(LIMIT) == 2
    assert "main.py: --max-bad-steps 4: this many consecutive steps were not finite" in run.text()
    assert events(run.output, "not_finite") == ["gradients"] * 4
    table.add("non-finite gradients, for good")


# ----------------------------------------------------------------------------------------------------------------------
# Bad data
# ----------------------------------------------------------------------------------------------------------------------


def test_unreadable_images(few_digits, tmp_path, table):
    """The limit is 0.1 % of the images, and at least one image. Two of 48 exceed it."""
    data = tmp_path / "broken"
    shutil.copytree(few_digits, data)
    first, second, *_ = sorted((data / "train/1").iterdir())
    first.write_bytes(first.read_bytes()[:60])
    second.write_text("no image")
    run = Run(tmp_path / "two", data, "--num_workers", "1")
    assert run.start().wait(LIMIT) == 2
    assert "main.py: --on-bad-image skip: 2 of 48 training images are unreadable (limit 1), e.g. " in run.text()
    second.unlink()
    run = Run(tmp_path / "one", data)
    assert run.finish().count(str(first)) == 1
    assert events(run.output, "unreadable_image") == [str(first)]
    assert events(run.output, "unreadable_images")[-1] == 1
    run = Run(tmp_path / "fail", data, "--on-bad-image", "fail")
    assert run.start().wait(LIMIT) == 2
    assert f"--on-bad-image fail: 1 of 47 training images are unreadable (limit 0), e.g. {first} (" in run.text()
    table.add("unreadable images", 3)


def test_failed_validation_loses_no_epoch(few_digits, tmp_path, undisturbed, table):
    data = tmp_path / "data"
    shutil.copytree(few_digits, data)
    broken = next((data / "val/1").iterdir())
    whole = broken.read_bytes()
    broken.write_text("no image")
    run = sabotaged(Run(tmp_path, data, "--checkpoint-every", "0"), SLOW_SAVING="2")
    assert run.start().wait(LIMIT) == 2
    assert run.text().splitlines()[-1].startswith(f"main.py: image {broken}: cannot be read")  # after "saved …"
    broken.write_bytes(whole)
    assert "resuming at epoch 0, step 6" in run.finish()
    assert_same_state(run.output, undisturbed, "model", "optimizer", "model_ema", "best_accuracy")
    table.add("unreadable images")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_storage_outage(workers, few_digits, tmp_path, undisturbed, table):
    """The run waits out a short outage. A long one ends it with a transient error, and the same command resumes."""
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(few_digits, data)
    run = sabotaged(Run(tmp_path, data, "--num_workers", workers), PAUSES="1,1,1")
    process = run.start()
    run.wait_for(process, "] loss", 2)
    data.rename(away)
    run.wait_for(process, "retrying for 3 seconds")
    away.rename(data)
    run.wait_for(process, "] loss", 9)
    data.rename(away)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert re.search(r"main\.py: process 0: image .*cannot be read.*; run the same command again", run.text())
    assert "Traceback" not in run.text()
    assert_nothing_saved_is_lost(run)
    away.rename(data)
    run.finish()
    assert not events(run.output, "unreadable_image")
    assert_same_state(run.output, undisturbed, *WEIGHTS)
    table.add("storage that does not respond, briefly and for good", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming the right run
# ----------------------------------------------------------------------------------------------------------------------


REFUSED = {
    "other settings": (["--lr", "1e-3", "--smoothing", "0.2"], "--lr 0.001 (was 0.005), --smoothing 0.2 (was 0.1)"),
    "other images": (["--data-path", "fewer"], "by a run on different images"),
    "a fresh run": (["--no-auto-resume"], "--output_dir run: already contains a run"),
    "an older checkpoint": (["--no-auto-resume", "--resume", "run/checkpoint-00000008.pth"], "already contains a run"),
    "other weights": (["--no-auto-resume", "--resume", "run/weights.pth"], "already contains a run"),
}


@pytest.fixture
def copy(tmp_path, undisturbed, monkeypatch) -> Path:
    """A copy of the undisturbed run's folder, `run` in the current one."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_is_neither_mixed_with_another_nor_overwritten(what, few_digits, copy, capsys):
    settings, words = REFUSED[what]
    torch.save(torch.load(copy / "checkpoint.pth", weights_only=True)["model"], copy / "weights.pth")
    shutil.copytree(few_digits, "fewer", symlinks=True)
    next(Path("fewer/train/0").iterdir()).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert words in refusal(main.run, "main", [*RECIPE, "--data-path", few_digits, *settings], capsys)
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_folder_in_use_by_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "LOCK_TIMEOUT", 1)
    lock = output.lock_folder(tmp_path, 1, "--output_dir run")
    with pytest.raises(UserError, match="another run is writing to it"):
        output.lock_folder(tmp_path, 1, "--output_dir run")
    os.close(lock)
    os.close(output.lock_folder(tmp_path, 1, "--output_dir run"))


def test_restarting_a_complete_run_only_adds_missing_files(few_digits, copy, undisturbed, capsys):
    # as if the run was killed before it updated checkpoint.pth
    shutil.copyfile(copy / "checkpoint-00000010.pth", copy / "checkpoint.pth")
    (copy / "curves.png").unlink()
    assert main.run([*RECIPE, "--data-path", str(few_digits)]) == 0
    assert "the run in run is complete: 2 epochs are done" in capsys.readouterr().out
    assert_same(copy, undisturbed)
    with Image.open(copy / "curves.png") as picture:
        picture.verify()


def test_damaged_log_is_refused(few_digits, copy, capsys):
    for path in copy.glob("checkpoint-0000001[02].pth"):
        path.unlink()
    (copy / "log.txt").write_text('{"epoch": 0')
    arguments = [*RECIPE, "--data-path", str(few_digits)]
    assert refusal(main.run, "main", arguments, capsys).startswith("main.py: run/log.txt: not a run's log (")
    assert (copy / "log.txt").read_text() == '{"epoch": 0'
    (copy / "log.txt").unlink()
    assert main.run(arguments) == 0
    assert [entry["epoch"] for entry in output.epoch_entries(output.read_log(copy / "log.txt"))] == [1]


def test_log_starts_with_settings_versions_and_data(undisturbed):
    run = output.read_log(undisturbed / "log.txt")[0]
    assert run["settings"]["lr"] == 5e-3
    assert run["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", run["revision"])
    assert run["data"]["train"]["images"] == 48
    assert re.fullmatch(r"[0-9a-f]{16}", run["data"]["train"]["fingerprint"])
    assert run["processes"] == 1
    assert run["device"].startswith("cpu")


def test_code_in_the_newest_checkpoint_never_runs(few_digits, copy, capsys, table):
    newest = StepNames(1).numbered(copy)[0]
    newest.unlink()
    torch.save({"model": {}, "args": Code(copy / "ran")}, newest)
    assert "refused, it contains" in refusal(main.run, "main", [*RECIPE, "--data-path", few_digits], capsys)
    assert not (copy / "ran").exists()
    table.add("newest checkpoint would run code")


def test_no_intact_checkpoint(few_digits, copy, capsys):
    for path in copy.glob("checkpoint*.pth"):
        damage(path, "truncated", random.Random(0))
    assert main.run([*RECIPE, "--data-path", str(few_digits)]) == 2
    assert "no checkpoint in run is intact" in capsys.readouterr().err


@pytest.mark.slow
def test_slurm_script_requeues_the_job(few_digits, tmp_path, table):
    undisturbed = Run(tmp_path / "undisturbed", few_digits, *LITE)
    undisturbed.finish()
    environment = play_slurm(tmp_path, f"MASTER_PORT={free_port()}") | dict(SLURM_CPUS_PER_TASK="0")
    run = Run(tmp_path / "job", few_digits, *LITE, environment=environment)
    script = run.command.index(str(ROOT / run.script))
    run.command = ["bash", str(ROOT / "tools/slurm/train.sh"), *run.command[script + 1 :]]
    run.command += ["--output_dir", str(run.output)]
    process = run.start()
    run.wait_for(process, "] loss", 4)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    run.finish()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"  # not requeued at the end
    assert_same_state(run.output, undisturbed.output, *WEIGHTS)
    table.add("SIGUSR1 from SLURM, requeued")


def test_fused_optimizer_skips_bad_steps_on_the_device():
    """As on GPUs, here with the CPU version of the fused optimiser."""
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
    for value, moved in ((torch.nan, False), (1.0, True)):
        before = weights.detach().clone()
        weights.grad = torch.full((3,), value)
        optimizer.found_inf = (~weights.grad.norm().isfinite()).float()
        optimizer.step()
        assert torch.equal(weights, before) != moved


def test_transient_and_storage_errors(tmp_path):
    assert is_transient(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert not is_transient(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback …"))
    missing = FileNotFoundError(errno.ENOENT, "No such file")
    for error in (OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), MemoryError()):
        assert is_storage_error(error, tmp_path)
    assert is_storage_error(missing, tmp_path / "away")
    assert not is_storage_error(missing, tmp_path)
    assert not is_storage_error(OSError("image file is truncated"), tmp_path / "away")
    assert not is_storage_error(ValueError("not an image"), tmp_path)
