"""Training runs that are killed, preempted, starved and lied to, each compared with one that was left in peace."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Code, command, differences, free_port
from harness import LIMIT, RECIPE, RESUME_STATUS, Run, assert_same, damage, descendants, end_all
from PIL import Image

from training import checkpoints, output
from training.errors import UserError, is_transient
from training.storage import is_storage_error

LAST = "checkpoint-00000018.pth"  # 48 images, 8 a batch, three epochs


@pytest.fixture(scope="module")
def peaceful(few_digits, tmp_path_factory) -> Path:
    """The output folder of a run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("peaceful"), few_digits)
    assert "trained in" in run.finish()
    return run.output


@pytest.fixture(scope="module")
def peaceful_pair(few_digits, tmp_path_factory) -> Path:
    """Likewise, of two processes."""
    run = Run(tmp_path_factory.mktemp("pair"), few_digits, "--batch-size", "4")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [0, 0]
    return run.output


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A test that fails leaves no process behind."""
    yield
    end_all()


def sabotaged(run: Run, **variables: str) -> Run:
    """A run of sabotage.py in main.py's place."""
    run.command[run.command.index(str(ROOT / "main.py"))] = str(ROOT / "tests/faults/sabotage.py")
    run.environment |= variables
    return run


def assert_nothing_saved_is_lost(run: Run) -> None:
    """The newest checkpoint that was reported saved is there, and so are all that are to be kept."""
    reported = re.findall(r"saved run/(checkpoint-\d+\.pth)", run.text())
    if reported:
        newest = checkpoints.numbered(run.output)
        assert newest[0].name >= max(reported)
        # processes whose torchrun was killed save once more, and delete the oldest
        assert all(checkpoints.damage(path) is None or not path.exists() for path in newest)


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------

KILLED = {  # settings, processes, kills in the long form
    "one process": ([], 0, 25),
    "one process, two workers": (["--num_workers", "2"], 0, 10),
    "two processes": (["--batch-size", "4"], 2, 10),
    "three processes, accumulation": (["--batch-size", "2", "--accum-steps", "2"], 3, 5),
    "float16, plateau schedule": (["--amp", "float16", "--sched", "plateau", "--patience-epochs", "0"], 0, 5),
    "float16 on a GPU, --deterministic": (["--device", "cuda", "--amp", "float16", "--deterministic"], 0, 5),
}


def kill_often(name: str, kills: int, data: Path, folder: Path, peaceful: Path, table) -> None:
    settings, processes, _ = KILLED[name]
    rng = random.Random(name)
    run = Run(folder / "run", data, *settings, processes=processes)
    done = 0
    while done < kills:
        done += run.kill(rng)
        assert_nothing_saved_is_lost(run)
        if (run.output / LAST).exists() or "trained in" in run.text():  # another run for the kills that are left
            run.finish()
            assert_same(run.output, peaceful)
            run = Run(folder / f"run{len(list(folder.iterdir()))}", data, *settings, processes=processes)
    run.finish()
    assert_same(run.output, peaceful)
    table.add(f"killed at a random moment, {name}", kills)


def test_killed(few_digits, tmp_path, peaceful, table):
    kill_often("one process", 2, few_digits, tmp_path, peaceful, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_many_times(name, few_digits, tmp_path, table):
    settings, processes, kills = KILLED[name]
    if "cuda" in settings and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    left_alone = Run(tmp_path / "peaceful", few_digits, *settings, processes=processes)
    left_alone.finish()
    kill_often(name, kills, few_digits, tmp_path, left_alone.output, table)


@pytest.mark.slow
def test_workers_change_nothing(few_digits, tmp_path, peaceful):
    run = Run(tmp_path, few_digits, "--num_workers", "2")
    run.finish()
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run.output, peaceful))
    a["args"]["num_workers"] = 0
    assert differences(a, b) == []


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", pytest.param("changed", marks=pytest.mark.slow)])
def test_damaged_checkpoint(how, few_digits, tmp_path, peaceful, table):
    rng = random.Random(how)
    run = Run(tmp_path, few_digits)
    process = run.start()
    run.wait_for(process, "saved ", 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    newest, before, *_ = checkpoints.numbered(run.output)
    damage(newest, how, rng)
    printed = run.finish()
    what = "truncated" if how == "truncated" else "wrong checksum"
    assert f"WARNING: run/{newest.name} is damaged ({what}" in printed
    assert f"checkpoint run/{before.name}: resuming at epoch 0, step 4" in printed
    assert_same(run.output, peaceful)
    table.add("newest checkpoint truncated or changed")


def test_no_whole_checkpoint(few_digits, tmp_path, peaceful, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(peaceful, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*.pth"):
        damage(path, "truncated", random.Random(0))
    with pytest.raises(UserError, match="no checkpoint in run is intact; empty the folder to start a fresh run"):
        checkpoints.newest_good(Path("run"))


def is_mountable(folder: Path) -> bool:
    """Whether a small file system can be mounted; unmounts it again."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    return mount.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def test_full_disk(few_digits, tmp_path, peaceful, table):
    """A file system that is full for a while: every write fails, training continues, nothing that was there is lost."""
    output = tmp_path / "run"
    output.mkdir()
    if not is_mountable(output):
        pytest.skip("no right to mount a small file system; test_failed_write has the same faults by a limit")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", output], check=True)
    try:
        run = Run(tmp_path, few_digits)
        process = run.start()
        run.wait_for(process, "No space left on device): the previous checkpoint is kept, training continues")
        held = checkpoints.numbered(output)
        assert held
        assert all(checkpoints.damage(path) is None for path in held)
        subprocess.run(["mount", "-o", "remount,size=400m", output], check=True)
        assert process.wait(LIMIT) == 0
        assert not list(output.glob("*.tmp"))
        assert_same(output, peaceful)
    finally:
        subprocess.run(["umount", output], check=True)
    table.add("full file system")


def test_failed_write(few_digits, tmp_path, peaceful, table):
    """No file may become as large as a checkpoint."""
    run = Run(tmp_path, few_digits)
    run.command = ["prlimit", "--fsize=20000000", *run.command]
    assert run.start().wait(LIMIT) == 2
    printed = run.text()
    assert printed.count("WARNING: run/checkpoint-000000") == 12
    last = printed.strip().splitlines()[-1]
    assert last.startswith("main.py: --output_dir run: the last checkpoint could not be written (File too large)")
    assert not list(run.output.glob("*.pth*"))
    assert (run.output / "log.txt").read_text() == (peaceful / "log.txt").read_text()
    table.add("failed writes", 12)


@pytest.mark.slow
def test_preempted_when_writes_fail(few_digits, tmp_path, peaceful, table):
    run = Run(tmp_path, few_digits)
    whole = run.command
    run.command = ["prlimit", "--fsize=20000000", *whole]
    process = run.start()
    run.wait_for(process, "] loss", 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert "WARNING: --output_dir run: the last checkpoint could not be written (File too large)" in run.text()
    assert "the same command with --auto-resume resumes from the last checkpoint" in run.text()
    run.command = whole
    run.finish()
    assert_same(run.output, peaceful)
    table.add("SIGTERM when writes fail")


# ----------------------------------------------------------------------------------------------------------------------
# Preempted
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_preempted(number, few_digits, tmp_path, peaceful, table):
    run = Run(tmp_path, few_digits, "--num_workers", "1")
    process = run.start()
    run.wait_for(process, "] loss", 4 if number == signal.SIGTERM else 9)
    os.killpg(process.pid, number)  # schedulers signal whole groups: the loaders' workers get it, too
    assert process.wait(LIMIT) == RESUME_STATUS
    assert "main.py: stopped by a signal before epoch" in run.text()
    assert_nothing_saved_is_lost(run)
    run.command += ["--num_workers", "0"]
    run.finish()
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run.output, peaceful))
    assert differences(a, b) == []
    table.add("SIGTERM or SIGUSR1 to the run")


@pytest.mark.slow
def test_preempted_many_times(few_digits, tmp_path, peaceful, table):
    """At random moments, while it starts and evaluates too."""
    rng = random.Random("preempted")
    done = 0
    run = Run(tmp_path / "run0", few_digits)
    while done < 10:
        process = run.start_and_wait(rng)
        process.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        status = process.wait(LIMIT)
        assert status in (RESUME_STATUS, 0, -signal.SIGTERM, -signal.SIGUSR1), run.text()  # the last two: importing
        assert_nothing_saved_is_lost(run)
        done += status != 0
        if status == 0:
            assert_same(run.output, peaceful)
            run = Run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", few_digits)
    run.finish()
    assert_same(run.output, peaceful)
    table.add("SIGTERM or SIGUSR1 at a random moment", done)


def test_one_process_of_two_preempted(few_digits, tmp_path, peaceful_pair, table):
    run = Run(tmp_path, few_digits, "--batch-size", "4")
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], "] loss", 3)
    tasks[1].send_signal(signal.SIGUSR1)
    assert [task.wait(LIMIT) for task in tasks] == [RESUME_STATUS] * 2
    assert run.text().count("stopped by a signal before") == 1
    tasks = run.start_tasks(2)
    assert [task.wait(LIMIT) for task in tasks] == [0, 0]
    assert_same(run.output, peaceful_pair)
    table.add("SIGUSR1 to one process of two")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_preempted(number, few_digits, tmp_path, peaceful_pair, table):
    launcher = ("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    run = Run(tmp_path, few_digits, "--batch-size", "4", processes=2, launcher=launcher)
    process = run.start()
    run.wait_for(process, "] loss", 3)
    process.send_signal(number)
    assert process.wait(LIMIT) == 1
    assert "stopped by a signal before" in run.text()
    run.finish()
    assert_same(run.output, peaceful_pair)
    table.add("SIGTERM or SIGUSR1 to torchrun")


# ----------------------------------------------------------------------------------------------------------------------
# Lost processes
# ----------------------------------------------------------------------------------------------------------------------


LONG_FORM = [pytest.param(*other, marks=pytest.mark.slow) for other in ((0, signal.SIGKILL), (1, signal.SIGSTOP))]
LOST = [(1, signal.SIGKILL), (0, signal.SIGSTOP), *LONG_FORM]


@pytest.mark.parametrize(("process", "number"), LOST)
def test_lost_process(process, number, few_digits, tmp_path, peaceful_pair, table):
    """Without torchrun, the processes have to notice by themselves."""
    run = Run(tmp_path, few_digits, "--batch-size", "4")
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], "] loss", 4)
    lost, other = tasks[process], tasks[1 - process]
    lost.send_signal(number)
    assert other.wait(LIMIT) == RESUME_STATUS
    what = {0: "does not respond", 1: r"\(.*\), last seen at .*, has sent no heartbeat"}[process]
    assert re.search(rf"main\.py: process {1 - process}: process {process} {what}", run.text())
    lost.kill()
    lost.wait()
    tasks = run.start_tasks(2)
    assert [task.wait(LIMIT) for task in tasks] == [0, 0]
    assert_same(run.output, peaceful_pair)
    table.add("process lost to SIGKILL or SIGSTOP")


@pytest.mark.parametrize("process", [0, 1])
def test_failing_process(process, few_digits, tmp_path, table):
    """By an error of its own, which it would meet again: the status does not ask for another start."""
    run = sabotaged(Run(tmp_path, few_digits, "--batch-size", "4"), FAIL=f"{process}:4")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [1, 1]
    other = f"process {1 - process}: process {process} "
    assert re.search(rf"{other}\(.*\), last seen at .*, failed \(RuntimeError: out of memory\)", run.text())
    table.add("process that fails with an error of the program")


@pytest.mark.slow
def test_network_error(few_digits, tmp_path, peaceful_pair, table):
    """All processes live; another start may find the network whole."""
    run = sabotaged(Run(tmp_path, few_digits, "--batch-size", "4"), CUT_OFF="1:4")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [RESUME_STATUS] * 2
    assert "main.py: process 1: DistBackendError: NCCL error: unhandled system error" in run.text()
    run.environment.pop("CUT_OFF")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [0, 0]
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run.output, peaceful_pair))
    assert differences(a["model"], b["model"]) == []
    table.add("network error")


@pytest.mark.slow
def test_lost_loader_worker(few_digits, tmp_path, peaceful, table):
    """As the system kills where memory runs out."""
    run = Run(tmp_path, few_digits, "--num_workers", "1")
    process = run.start()
    run.wait_for(process, "] loss", 4)
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert re.search(r"main\.py: process 0: DataLoader worker .*; run the same command again", run.text())
    assert "Traceback" not in run.text()
    run.finish()
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (run.output, peaceful))
    assert differences(a, b) == []
    table.add("loader worker killed")


def test_hanging_process(few_digits, tmp_path, table):
    """It lives, but does not come to the next step."""
    run = sabotaged(Run(tmp_path, few_digits, "--batch-size", "4", "--timeout", "20"), HANG="1:4")
    tasks = run.start_tasks(2)
    assert [task.wait(LIMIT) for task in tasks] == [RESUME_STATUS] * 2
    assert re.search(
        r"process 0: process 1 \([^)]*\) hangs at epoch 0, step 3: no progress for \d+ s", run.text()
    )
    table.add("hanging process")


def test_torchrun_restarts_by_itself(few_digits, tmp_path, peaceful_pair, table):
    run = Run(tmp_path, few_digits, "--batch-size", "4", processes=2, launcher=("--standalone", "--max-restarts=1"))
    process = run.start()
    run.wait_for(process, "] loss", 4)
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    assert process.wait(LIMIT) == 0
    assert run.text().count("checkpoint run/checkpoint-") == 1
    assert_same(run.output, peaceful_pair)
    table.add("process killed under torchrun --max-restarts, on one node and on two")


@pytest.mark.slow
def test_torchrun_on_two_nodes_restarts_by_itself(few_digits, tmp_path, peaceful_pair, table):
    """The settings of docs/training.md; both nodes are this machine."""
    launcher = ("--nnodes=2", "--max-restarts=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}")
    run = Run(tmp_path, few_digits, "--batch-size", "4", processes=1, launcher=launcher,
              environment=dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", OMP_NUM_THREADS="1"))  # fmt: skip
    nodes = [run.start() for _ in range(2)]
    run.wait_for(nodes[0], "] loss", 4)
    os.kill(descendants(nodes[1].pid)[0], signal.SIGKILL)
    assert [node.wait(LIMIT) for node in nodes] == [0, 0]
    assert run.text().count("checkpoint run/checkpoint-") == 1
    assert_same(run.output, peaceful_pair)
    table.add("process killed under torchrun --max-restarts, on one node and on two")


def test_elastic(few_digits, tmp_path, table):
    """Four processes, then three, which cannot share four batches a step, then two: as two all the time would."""
    run = Run(tmp_path, few_digits, "--batch-size", "2")
    tasks = run.start_tasks(4)
    run.wait_for(tasks[0], "saved ", 2)
    for task in tasks:
        task.kill()
        task.wait()
    assert [task.wait(LIMIT) for task in run.start_tasks(3)] == [2, 2, 2]
    assert "its steps have 4 batches of 2 images, which 3 processes with these settings cannot share" in run.text()
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [0, 0]
    assert "4 batches of 2 images a step, as before: 2 processes accumulate 2 each" in run.text()
    pair = Run(tmp_path / "pair", few_digits, "--batch-size", "2", "--accum-steps", "2")
    assert [task.wait(LIMIT) for task in pair.start_tasks(2)] == [0, 0]
    log, other = (output.epoch_entries(output.read_log(folder / "log.txt")) for folder in (run.output, pair.output))
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    checkpoint = torch.load(run.output / "checkpoint.pth", weights_only=True)
    assert (checkpoint["steps"], checkpoint["batches_per_step"]) == (18, 4)
    losses, others = ([entry["train_loss"] for entry in entries] for entries in (log, other))
    assert losses == pytest.approx(others, rel=1e-3)
    table.add("four processes, resumed by two")


# ----------------------------------------------------------------------------------------------------------------------
# Bad numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_loss_on_one_process_of_two(few_digits, tmp_path, table):
    run = sabotaged(Run(tmp_path, few_digits, "--batch-size", "4", "--dump-bad-batch"), BAD_LOSS="1:3,8")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [0, 0]
    events = [entry for entry in output.read_log(run.output / "log.txt") if "not_finite" in entry]
    assert events == [dict(epoch=epoch, step=step, not_finite="loss", in_row=1) for epoch, step in ((0, 3), (1, 2))]
    assert output.epoch_entries(output.read_log(run.output / "log.txt"))[-1]["bad_steps"] == 2
    checkpoint = torch.load(run.output / "checkpoint.pth", weights_only=True)
    assert checkpoint["steps"] == 18
    assert checkpoint["optimizer"]["state"][0]["step"] == 16
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    batch = torch.load(run.output / "bad_batch-00000003-process1.pth", weights_only=True)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert (batch["epoch"], batch["step"]) == (0, 3)
    table.add("non-finite losses, for one step", 2)


def test_bad_losses_are_known_a_step_later_on_gpus(few_digits, tmp_path, table):
    """Here too, by LAG; the last step's and those before a checkpoint included: nothing else changes."""
    outputs = []
    for lag in ("0", "1"):
        run = sabotaged(Run(tmp_path / lag, few_digits), BAD_LOSS="0:3,8,18", LAG=lag)
        run.finish()
        outputs.append(run.output)
    assert_same(*outputs)
    assert output.epoch_entries(output.read_log(outputs[1] / "log.txt"))[-1]["bad_steps"] == 3
    table.add("non-finite losses, for one step", 3)


def test_too_many_bad_losses(few_digits, tmp_path, table):
    steps = ",".join(map(str, range(8, 19)))
    run = sabotaged(Run(tmp_path, few_digits, "--max-bad-steps", "4"), BAD_LOSS=f"0:{steps}")
    assert run.start().wait(LIMIT) == 2
    assert "\nmain.py: --max-bad-steps 4: that many steps in a row were not finite" in run.text()
    newest = checkpoints.numbered(run.output)[0]
    assert newest.name == "checkpoint-00000006.pth"
    assert checkpoints.damage(newest) is None
    table.add("non-finite losses, for good")


@pytest.mark.slow
def test_gradients_that_never_become_finite_with_float16(few_digits, tmp_path, table):
    """Halving the loss scale from 65,536 on does not help: from 1 on it is no search any more."""
    steps = ",".join(map(str, range(3, 60)))
    run = sabotaged(Run(tmp_path, few_digits, "--amp", "float16", "--batch-size", "2", "--max-bad-steps", "4"),
                    BAD_GRADIENTS=f"0:{steps}")  # fmt: skip
    assert run.start().wait(LIMIT) == 2
    assert "main.py: --max-bad-steps 4: that many steps in a row were not finite" in run.text()
    events = [entry["not_finite"] for entry in output.read_log(run.output / "log.txt") if "not_finite" in entry]
    assert events == ["gradients"] * 4
    table.add("non-finite gradients, for good")


# ----------------------------------------------------------------------------------------------------------------------
# Bad data
# ----------------------------------------------------------------------------------------------------------------------


def test_unreadable_images(few_digits, tmp_path, table):
    """Two of 48 images are more than 0.1 %, for which one may always be broken."""
    data = tmp_path / "broken"
    shutil.copytree(few_digits, data)
    first, second, *_ = sorted((data / "train/1").iterdir())
    first.write_bytes(first.read_bytes()[:60])
    second.write_text("no image")
    run = Run(tmp_path / "two", data, "--num_workers", "1")
    assert run.start().wait(LIMIT) == 2
    last = run.text().strip().splitlines()[-1]
    assert last.startswith("main.py: --on-bad-image skip: 2 of 48 training images are unreadable (limit 1), e.g. ")
    second.unlink()
    run = Run(tmp_path / "one", data)
    printed = run.finish()
    assert printed.count(str(first)) == 1
    log = output.read_log(run.output / "log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [str(first)]
    assert output.epoch_entries(log)[-1]["unreadable_images"] == 1
    run = Run(tmp_path / "fail", data, "--on-bad-image", "fail")
    assert run.start().wait(LIMIT) == 2
    assert f"--on-bad-image fail: 1 of 47 training images are unreadable (limit 0), e.g. {first}; " in run.text()
    table.add("unreadable images", 3)


def test_unreadable_validation_image(few_digits, tmp_path, table):
    shutil.copytree(few_digits, tmp_path / "data")
    broken = next((tmp_path / "data/val/1").iterdir())
    broken.write_text("no image")
    for workers in (0, 1):
        result = command("--eval", *RECIPE[:4], "--data-path", tmp_path / "data", "--num_workers", workers)
        assert result.returncode == 2
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith(f"main.py: image {broken}: cannot be read (UnidentifiedImageError")
    table.add("unreadable images", 2)


def test_validation_that_fails_costs_no_epoch(few_digits, tmp_path, peaceful, table):
    data = tmp_path / "data"
    shutil.copytree(few_digits, data)
    broken = next((data / "val/1").iterdir())
    whole = broken.read_bytes()
    broken.write_text("no image")
    run = Run(tmp_path, data, "--checkpoint-every", "0")
    assert run.start().wait(LIMIT) == 2
    assert run.text().splitlines()[-1].startswith(f"main.py: image {broken}: cannot be read")
    broken.write_bytes(whole)
    assert "resuming at epoch 0, step 6" in run.finish()
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run.output, peaceful))
    for key in ("model", "optimizer", "model_ema", "best_accuracy"):
        assert differences(a[key], b[key]) == []
    table.add("unreadable images")


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_storage_that_does_not_answer(workers, few_digits, tmp_path, peaceful, table):
    """For a moment, which the run waits for, then for good, which is not a mistake: the same command resumes."""
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
    assert not any("unreadable_image" in entry for entry in output.read_log(run.output / "log.txt"))
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run.output, peaceful))
    assert differences(a["model"], b["model"]) == []
    table.add("storage that does not respond, briefly and for good", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Going on with the right run
# ----------------------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(few_digits, tmp_path, peaceful):
    shutil.copytree(peaceful, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    run = Run(tmp_path, few_digits, "--lr", "1e-3", "--smoothing", "0.2")
    assert run.start().wait(LIMIT) == 2
    assert "--lr 0.001 (was 0.005), --smoothing 0.2 (was 0.1)" in run.text()
    fewer = tmp_path / "fewer"
    shutil.copytree(few_digits, fewer, symlinks=True)
    next((fewer / "train/0").iterdir()).unlink()
    run = Run(tmp_path, few_digits, "--data-path", fewer)
    assert run.start().wait(LIMIT) == 2
    assert "of a run on other images" in run.text()
    run = Run(tmp_path, few_digits)
    run.command.remove("--auto-resume")
    assert run.start().wait(LIMIT) == 2
    assert "already holds a run; resume it with --auto-resume, or name another folder" in run.text()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_another_run_writes_to(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "LOCK_TIMEOUT", 1)
    lock = output.lock_folder(tmp_path, heartbeat_timeout=1)
    with pytest.raises(UserError, match="another run writes to it; end that run, or name another folder"):
        output.lock_folder(tmp_path, heartbeat_timeout=1)
    os.close(lock)
    os.close(output.lock_folder(tmp_path, heartbeat_timeout=1))


@pytest.mark.parametrize("source", ["checkpoint-00000014.pth", "weights.pth"])
def test_a_run_is_not_overwritten_from_its_middle(source, few_digits, tmp_path, peaceful):
    """Nor from other weights that lie in its folder."""
    shutil.copytree(peaceful, tmp_path / "run")
    torch.save(torch.load(peaceful / "checkpoint.pth", weights_only=True)["model"], tmp_path / "run/weights.pth")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    run = Run(tmp_path, few_digits, "--resume", f"run/{source}")
    run.command.remove("--auto-resume")
    assert run.start().wait(LIMIT) == 2
    assert "--output_dir run: already holds a run; resume it with --auto-resume, or name another folder" in run.text()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_a_run_at_its_end_stays_as_it_is(few_digits, tmp_path, peaceful):
    shutil.copytree(peaceful, tmp_path / "run")
    shutil.copyfile(tmp_path / "run/checkpoint-00000016.pth", tmp_path / "run/checkpoint.pth")  # killed before its name
    (tmp_path / "run/curves.png").unlink()
    assert "the run in run is complete: 3 epochs are done" in Run(tmp_path, few_digits).finish()
    assert_same(tmp_path / "run", peaceful)
    assert (tmp_path / "run/curves.png").exists()


def test_a_broken_log_is_refused_by_name(few_digits, tmp_path, peaceful):
    shutil.copytree(peaceful, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-0000001[68].pth"):
        path.unlink()
    (tmp_path / "run/log.txt").write_text('{"epoch": 0')
    run = Run(tmp_path, few_digits)
    assert run.start().wait(LIMIT) == 2
    assert run.text().splitlines()[-1].startswith("main.py: run/log.txt: not a run's log (")
    assert (tmp_path / "run/log.txt").read_text() == '{"epoch": 0'
    (tmp_path / "run/log.txt").unlink()
    run.finish()
    assert [entry["epoch"] for entry in output.epoch_entries(output.read_log(run.output / "log.txt"))] == [2]


def test_log_begins_with_what_it_takes_to_repeat_the_run(peaceful, few_digits):
    run = output.read_log(peaceful / "log.txt")[0]
    assert run["settings"]["lr"] == 5e-3
    assert run["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", run["revision"])
    assert run["data"]["train"]["images"] == 48
    assert re.fullmatch(r"[0-9a-f]{16}", run["data"]["train"]["fingerprint"])
    assert run["processes"] == 1
    assert run["device"].startswith("cpu")


def test_code_in_the_newest_checkpoint_never_runs(few_digits, tmp_path, peaceful, table):
    shutil.copytree(peaceful, tmp_path / "run")
    newest = checkpoints.numbered(tmp_path / "run")[0]
    newest.unlink()
    torch.save({"model": {}, "args": Code(tmp_path / "ran")}, newest)
    run = Run(tmp_path, few_digits)
    assert run.start().wait(LIMIT) == 2
    assert "refused, it holds" in run.text()
    assert not (tmp_path / "ran").exists()
    table.add("newest checkpoint would run code")


def test_slurm_script_goes_back_to_the_queue(few_digits, tmp_path, peaceful, table):
    """srun and scontrol are played by scripts: one task, and a note of what was asked."""
    port = free_port()
    (tmp_path / "srun").write_text(
        f'#!/usr/bin/env bash\nexport SLURM_NTASKS=1 MASTER_PORT={port}\n"$@" &\necho $! > {tmp_path}/task\nwait $!\n'
    )
    (tmp_path / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/scontrol.txt\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    run = Run(tmp_path / "job", few_digits, environment=dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="77", PYTHON=sys.executable, SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_CPUS_PER_TASK="0",
    ))  # fmt: skip
    script = run.command.index(str(ROOT / "main.py"))
    run.command = ["bash", str(ROOT / "tools/slurm/train.sh"), *run.command[script + 1 :]]
    run.command += ["--output_dir", str(run.output)]
    process = run.start()
    run.wait_for(process, "] loss", 4)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    run.finish()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"  # not at the end
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (run.output, peaceful))
    assert differences(a, b) == []
    table.add("SIGUSR1 from SLURM, requeued")


def test_fused_optimizer_leaves_bad_steps_out_on_the_device():
    """What GPUs do, on the CPU's form of the same optimiser."""
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
    for value, moved in ((torch.nan, False), (1.0, True)):
        before = weights.detach().clone()
        weights.grad = torch.full((3,), value)
        optimizer.found_inf = (~weights.grad.norm().isfinite()).float()
        optimizer.step()
        assert torch.equal(weights, before) != moved


def test_whose_error_it_is(tmp_path):
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. "
    own = "Caught RuntimeError in DataLoader worker process 0.\nTraceback …\nRuntimeError: size mismatch"
    assert is_transient(RuntimeError(killed))
    assert not is_transient(RuntimeError(own))
    for error, folder, expected in (
        (OSError(errno.EIO, "Input/output error"), tmp_path, True),
        (OSError(errno.ESTALE, "Stale file handle"), tmp_path, True),
        (MemoryError(), tmp_path, True),
        (FileNotFoundError(errno.ENOENT, "No such file"), tmp_path, False),
        (FileNotFoundError(errno.ENOENT, "No such file"), tmp_path / "away", True),
        (OSError("image file is truncated"), tmp_path / "away", False),
        (ValueError("not an image"), tmp_path, False),
    ):
        assert is_storage_error(error, folder) == expected


def test_pictures_are_whole(peaceful):
    with Image.open(peaceful / "curves.png") as picture:
        picture.verify()
