"""Runs of segmentation and detection that are killed, preempted or given bad data; see test_faults.py.

The segmentor trains by iterations, the detector by epochs. Both with everything that is random: multi-scale, crops,
flips, photometric distortion, stochastic depth, sampling of boxes.
"""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import harness
import pytest
import torch
from conftest import ROOT, Code, refusal
from harness import DENSE_NAMES, LIMIT, RESUME_STATUS, DenseRun, assert_same_dense, damage, descendants, play_slurm

from sepvit_lib.mm.commands.train import build_train_parser, run_training
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.run import checkpoints
from sepvit_lib.run.output import read_log

KINDS = ("segmentation", "detection")
LAST = {"segmentation": "iter_12.pth", "detection": "epoch_2.pth"}
CONFIGS = {
    "segmentation": """
_base_ = "{root}/segmentation/configs/fpn_sepvit_lite_112x112_demo.py"
data_root = "{data}/ade/ADEChallengeData2016"
data = dict(data_root=data_root)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(64, 48), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(32, 32), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 48), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
model = dict(data_preprocessor=dict(size=(32, 32)), backbone=dict(drop_path_rate=0.3))
train_cfg = dict(max_iters=12, val_interval=6)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=6))
""",
    "detection": """
_base_ = "{root}/detection/configs/mask_rcnn_sepvit_lite_fpn_demo.py"
data_root = "{data}/coco/"
data = dict(data_root=data_root)
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomChoiceResize", scales=[(96, 64), (128, 96), (80, 80)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(32, 64), allow_negative_crop=True),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
model = dict(backbone=dict(drop_path_rate=0.3))
train_cfg = dict(max_epochs=2, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=4, by_epoch=False),
    dict(type="MultiStepLR", begin=0, end=2, by_epoch=True, milestones=[1], gamma=0.1),
]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
""",
}
LOADERS = """
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(**data, indices=12, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, indices=4, pipeline=test_pipeline))
"""
# A row of the table that the short form tries with one kind only, since both take the same code.
ONLY = {
    kind: pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=() if name == kind else pytest.mark.slow) for name in KINDS]
    )
    for kind in KINDS
}
BOTH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def configs(demo_data, tmp_path_factory) -> dict[str, Path]:
    """The configs, by kind."""
    return {kind: write_config(tmp_path_factory.mktemp("configs"), kind, demo_data) for kind in KINDS}


def write_config(folder: Path, kind: str, data: Path) -> Path:
    """Write the config of a kind, for data in the layout of the demo."""
    path = folder / f"{kind}.py"
    path.write_text((CONFIGS[kind] + LOADERS).replace("{root}", str(ROOT)).replace("{data}", str(data)))
    return path


@pytest.fixture(scope="module")
def undisturbed(configs, tmp_path_factory) -> dict[str, Path]:
    """The work dirs of undisturbed runs, by kind."""
    runs = {kind: DenseRun(kind, tmp_path_factory.mktemp(kind), configs[kind]) for kind in KINDS}
    processes = {kind: run.start() for kind, run in runs.items()}  # side by side
    assert {kind: process.wait(LIMIT) for kind, process in processes.items()} == dict.fromkeys(KINDS, 0)
    return {kind: run.output for kind, run in runs.items()}


@pytest.fixture(scope="module")
def undisturbed_pair(configs, tmp_path_factory) -> dict[str, Path]:
    """The same, on two processes each."""
    runs = {kind: DenseRun(kind, tmp_path_factory.mktemp(f"{kind}-pair"), configs[kind]) for kind in KINDS}
    return {kind: finished(run, 2) for kind, run in runs.items()}


@pytest.fixture
def run(kind, configs, tmp_path) -> DenseRun:
    """A run of the kind, in the test's folder."""
    return DenseRun(kind, tmp_path, configs[kind])


@pytest.fixture
def tried(kind, table) -> Callable[..., None]:
    """Enters a fault of the kind in the table."""
    return lambda fault, times=1: table.add(f"{fault}, {kind}", times)


def finished(run: DenseRun, processes: int = 0) -> Path:
    """Run the command to its end, and require that it succeeds. Returns the work dir."""
    if processes:
        assert [task.wait(LIMIT) for task in run.start_tasks(processes)] == [0] * processes, run.text()
    else:
        run.finish()
    assert "trained" in run.text() or "is complete" in run.text()
    return run.output


@pytest.fixture(autouse=True)
def kill_leftovers():
    """Kill the processes that a failed test left running."""
    yield
    harness.kill_started()


def sabotaged(run: DenseRun, kind: str, **variables: str) -> DenseRun:
    """Make a run start sabotage_dense.py instead of train.py, with these environment variables."""
    run.command[run.command.index(str(ROOT / run.script))] = str(ROOT / "tests/faults/sabotage_dense.py")
    run.environment |= dict(KIND=kind, **variables)
    return run


def assert_nothing_saved_is_lost(run: DenseRun) -> None:
    """Require that the newest checkpoint reported as saved exists, and that every kept checkpoint is intact."""
    reported = re.findall(r"saved run/(\w+\.pth)", run.text())
    if reported:
        kept = DENSE_NAMES.numbered(run.output)
        newest, expected = (DENSE_NAMES.position(name) or () for name in (kept[0].name, reported[-1]))
        assert newest >= expected
        assert all(checkpoints.damage(path) is None or not path.exists() for path in kept)


def refused(capsys, config: Path, *arguments: object) -> str:
    """Run the command in this process, and require that it is refused. Returns the line that says why."""
    train = partial(run_training, build_train_parser(""))
    return refusal(train, "train", [config, "--from-scratch", *arguments], capsys)


def entries(folder: Path, name: str) -> list:
    """The values of a name in log.txt, in the lines that have it."""
    return [entry[name] for entry in read_log(folder / "log.txt") if name in entry]


# ----------------------------------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "one process": [],
    "one process, two workers": "--cfg-options train_dataloader.num_workers=2 val_dataloader.num_workers=1".split(),
    "two processes": [],
}
KILLS = [(kind, *row) for kind in KINDS for row in zip(SETTINGS, (13, 6, 12))]
KILLED = [("segmentation", "one process", 2), *(pytest.param(*row, marks=pytest.mark.slow) for row in KILLS)]


def kill_pair(run: DenseRun, rng: random.Random) -> bool:
    """Start the command on two processes and kill both at a random moment. Return False if they had already ended."""
    lines = run.text().count(run.step)
    tasks = run.start_tasks(2)
    if rng.random() < 0.8:  # start-up takes long and would be hit too often
        run.wait_for(tasks[0], run.step, lines + 1)
    time.sleep(rng.uniform(0, 2))
    was_running = any(task.poll() is None for task in tasks)
    for task in rng.sample(tasks, 2):
        with suppress(ProcessLookupError):
            os.killpg(task.pid, signal.SIGKILL)
        task.wait()
    return was_running


@pytest.mark.parametrize(("kind", "name", "kills"), KILLED)
def test_killed(kind, name, kills, configs, tmp_path, request, tried):
    processes = 2 if name == "two processes" else 0
    undisturbed = request.getfixturevalue("undisturbed_pair" if processes else "undisturbed")[kind]
    rng = random.Random(f"{kind} {name}")
    runs = (DenseRun(kind, tmp_path / f"run{i}", configs[kind], *SETTINGS[name]) for i in range(10 * kills))
    run, done = next(runs), 0
    while done < kills:
        done += kill_pair(run, rng) if processes else run.kill(rng)
        assert_nothing_saved_is_lost(run)
        if "trained" in run.text():  # complete: kill another run
            assert_same_dense(finished(run, processes), undisturbed)
            run = next(runs)
    assert_same_dense(finished(run, processes), undisturbed)
    tried(f"killed at a random moment, {name}", kills)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


@ONLY["detection"]
@pytest.mark.parametrize("how", ["truncated", pytest.param("changed", marks=pytest.mark.slow)])
def test_damaged_checkpoint(run, how, kind, tmp_path, undisturbed, tried):
    process = run.start()
    run.wait_for(process, "saved run/", 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    newest, before, *_ = DENSE_NAMES.numbered(run.output)
    damage(newest, how, random.Random(how))
    (run.output / "last_checkpoint").unlink()  # mmengine's pointer is not needed
    run.output = run.output.rename(tmp_path / "moved")
    run.command[run.command.index("run")] = "moved"
    printed = run.finish()
    assert f"WARNING: moved/{newest.name} is damaged (" in printed
    assert f"checkpoint moved/{before.name}: resuming at " in printed
    assert_same_dense(run.output, undisturbed[kind])
    tried("newest checkpoint truncated or changed")


@pytest.mark.slow
@ONLY["segmentation"]
def test_failed_write(run, kind, undisturbed, tried):
    """The file size limit is below the size of a checkpoint."""
    whole = run.command
    run.command = ["prlimit", "--fsize=20000000", *whole]
    assert run.start().wait(LIMIT) == 2
    assert run.text().count("could not be written (File too large): the previous checkpoint is kept") >= 6
    last = run.text().strip().splitlines()[-1]
    assert last.startswith("train.py: --work-dir run: the last checkpoint could not be written (File too large)")
    assert not list(run.output.glob("*.pth*"))
    run.command = whole
    assert_same_dense(finished(run), undisturbed[kind])
    tried("failed writes", 6)


@ONLY["segmentation"]
def test_code_in_the_newest_checkpoint_never_runs(kind, configs, tmp_path, undisturbed, capsys, tried):
    shutil.copytree(undisturbed[kind], tmp_path / "run")
    torch.save({"state_dict": {}, "meta": Code(tmp_path / "ran")}, tmp_path / "run" / LAST[kind])
    line = refused(capsys, configs[kind], "--work-dir", tmp_path / "run", "--auto-resume")
    assert "refused, it contains" in line
    assert not (tmp_path / "ran").exists()
    tried("newest checkpoint would run code")


# ----------------------------------------------------------------------------------------------------------------------
# Preempted
# ----------------------------------------------------------------------------------------------------------------------


@ONLY["detection"]
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_preempted(run, number, kind, undisturbed, tried):
    run.command += ["--cfg-options", "train_dataloader.num_workers=1", "val_dataloader.num_workers=1"]
    process = run.start()
    run.wait_for(process, run.step, 3 if number == signal.SIGTERM else 7)
    os.killpg(process.pid, number)  # schedulers signal the process group, with its loader workers
    assert process.wait(LIMIT) == RESUME_STATUS, run.text()
    assert "train.py: stopped by a signal before iteration" in run.text()
    assert_nothing_saved_is_lost(run)
    assert_same_dense(finished(run), undisturbed[kind])
    tried("SIGTERM or SIGUSR1 to the run")


@pytest.mark.slow
@ONLY["detection"]
def test_one_of_two_processes_preempted(run, kind, undisturbed_pair, tried):
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], run.step, 3)
    tasks[1].send_signal(signal.SIGUSR1)
    assert [task.wait(LIMIT) for task in tasks] == [RESUME_STATUS] * 2
    assert run.text().count("stopped by a signal before") == 1
    assert_same_dense(finished(run, 2), undisturbed_pair[kind])
    tried("SIGUSR1 to one process of two")


@pytest.mark.slow
@BOTH
def test_slurm_script_requeues_the_job(kind, configs, tmp_path, undisturbed, tried):
    environment = play_slurm(tmp_path, "SLURM_PROCID=0 SLURM_LOCALID=0") | dict(OMP_NUM_THREADS="1")
    run = DenseRun(kind, tmp_path / "job", configs[kind], environment=environment)
    _, _, config, *settings = run.command
    settings.remove("--auto-resume")  # the script's own
    settings[settings.index("run")] = str(run.output)
    run.command = ["bash", str(ROOT / "tools/slurm/dense.sh"), kind, config, *settings]
    process = run.start()
    run.wait_for(process, run.step, 3)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    run.finish()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"  # not requeued at the end
    assert entries(run.output, "train_loss") == entries(undisturbed[kind], "train_loss")
    tried("SIGUSR1 from SLURM, requeued")


WITH_HOOKS = """
import sys
sys.path.append({folder!r})
_base_ = {config!r}
custom_imports = dict(imports=["sepvit_lib.mm.backbone", "stop_in_validation"])
custom_hooks = [dict(type="EMAHook", momentum=0.5), dict(type="StopInValidation")]
"""


@pytest.mark.slow
def test_stopped_in_validation(configs, tmp_path, table):
    """A signal comes in the first validation, which uses averaged weights."""
    config = tmp_path / "config.py"
    config.write_text(WITH_HOOKS.format(config=str(configs["segmentation"]), folder=str(Path(__file__).parent)))
    alone = finished(DenseRun("segmentation", tmp_path / "alone", config))
    run = DenseRun("segmentation", tmp_path / "stopped", config, environment={"STOP_IN_VALIDATION": "1"})
    assert run.start().wait(LIMIT) == RESUME_STATUS
    shutil.copytree(run.output, tmp_path / "unvalidated/run")
    del run.environment["STOP_IN_VALIDATION"]
    assert_same_dense(finished(run), alone)
    table.add("SIGTERM or SIGUSR1 at a random moment, segmentation")
    run = DenseRun("segmentation", tmp_path / "unvalidated", config, "--no-validate")
    run.command[run.command.index("--auto-resume")] = "--resume"  # the way out where the validation cannot be done
    finished(run)
    assert DENSE_NAMES.numbered(run.output)[0].name == LAST["segmentation"]


# ----------------------------------------------------------------------------------------------------------------------
# Lost processes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("process", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_lost_process(run, kind, process, number, undisturbed_pair, tried):
    """Without torchrun, the remaining process has to notice the loss."""
    tasks = run.start_tasks(2)
    run.wait_for(tasks[0], run.step, 3)
    lost, other = tasks[process], tasks[1 - process]
    lost.send_signal(number)
    assert other.wait(LIMIT) == RESUME_STATUS
    what = {0: "does not respond", 1: r"\(.*\), last seen at .*, has sent no heartbeat"}[process]
    assert re.search(rf"train\.py: process {1 - process}: process {process} {what}", run.text())
    lost.kill()
    lost.wait()
    assert_same_dense(finished(run, 2), undisturbed_pair[kind])
    tried("process lost to SIGKILL or SIGSTOP")


SPOILED = {  # what happens to the second process in its fourth batch: exit status, words of the first, and the fault
    "HANG": (RESUME_STATUS, r"\([^)]*\) hangs at .*iter [23].*: no progress for \d+ s", "hanging process"),
    "FAIL": (1, r".* failed \(RuntimeError: out of memory\)", "process that fails with an error of the program"),
}


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("variable", SPOILED)
def test_hanging_or_failing_process(run, kind, variable, tried):
    """A hanging process is alive but makes no progress. An error would occur again, so no restart is asked for."""
    status, words, fault = SPOILED[variable]
    run.command += ["--timeout", "20"]
    sabotaged(run, kind, **{variable: "1:4"})
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [status] * 2
    assert re.search(f"process 0: process 1 {words}", run.text())
    tried(fault)


@pytest.mark.slow
@BOTH
def test_network_error(run, kind, undisturbed_pair, tried):
    """All processes are alive, and a restart may succeed."""
    sabotaged(run, kind, CUT_OFF="1:4")
    assert [task.wait(LIMIT) for task in run.start_tasks(2)] == [RESUME_STATUS] * 2
    assert "train.py: process 1: DistBackendError: NCCL error: unhandled system error" in run.text()
    run.environment.pop("CUT_OFF")
    assert_same_dense(finished(run, 2), undisturbed_pair[kind])
    tried("network error")


@pytest.mark.slow
@BOTH
def test_lost_loader_worker(run, kind, undisturbed, tried):
    """SIGKILL, as the kernel sends it when memory runs out."""
    run.command += ["--cfg-options", "train_dataloader.num_workers=1"]
    process = run.start()
    run.wait_for(process, run.step, 3)
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    assert process.wait(LIMIT) == RESUME_STATUS
    assert re.search(r"train\.py: process 0: DataLoader worker .*; run the same command again", run.text())
    assert "Traceback" not in run.text()
    assert_same_dense(finished(run), undisturbed[kind])
    tried("loader worker killed")


@pytest.mark.slow
@BOTH
def test_torchrun_restarts(kind, configs, tmp_path, undisturbed_pair, tried):
    launcher = ("--standalone", "--max-restarts=1")
    run = DenseRun(kind, tmp_path, configs[kind], "--launcher", "pytorch", processes=2, launcher=launcher)
    process = run.start()
    run.wait_for(process, run.step, 4)
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    assert process.wait(LIMIT) == 0, run.text()
    assert len(re.findall(r"checkpoint run/\w+\.pth: resuming at", run.text())) == 1
    assert_same_dense(run.output, undisturbed_pair[kind])
    tried("process killed under torchrun --max-restarts")


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite losses and gradients
# ----------------------------------------------------------------------------------------------------------------------


@ONLY["segmentation"]
def test_bad_loss_on_one_of_two_processes(run, kind, tried):
    """The end is saved, too, after a skipped step. Without validation, which saves in any case."""
    run.command.append("--no-validate")
    last = {"segmentation": 13, "detection": 7}[kind]  # each process starts with a pass that is discarded
    finished(sabotaged(run, kind, BAD_LOSS=f"1:3,5,{last}"), 2)
    assert entries(run.output, "not_finite") == ["loss"] * 3
    assert "3 steps skipped" in run.text()
    newest = DENSE_NAMES.numbered(run.output)[0]
    assert newest.name == LAST[kind]
    checkpoint = read_checkpoint(str(newest), "the last checkpoint")
    steps = {int(value["step"]) for value in checkpoint["optimizer"]["state"].values()}
    assert steps == {checkpoint["run"]["global_step"] - 3}
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    tried("non-finite losses, for one step", 3)


@pytest.mark.slow
@BOTH
def test_bad_steps_may_be_read_one_step_late(kind, configs, tmp_path, tried):
    """GPUs read flags one step late, which LAG imitates. Results are identical, also at checkpoints and at the end."""
    faults = dict(BAD_LOSS="0:3,6,12", BAD_GRADIENTS="0:9")
    runs = [sabotaged(DenseRun(kind, tmp_path / lag, configs[kind]), kind, **faults, LAG=lag) for lag in ("0", "1")]
    assert_same_dense(*map(finished, runs), in_order=False)  # a step's event comes after the next step's figures
    assert entries(runs[1].output, "not_finite") == ["loss", "loss", "gradients", "loss"]
    tried("non-finite losses, for one step", 3)
    tried("non-finite gradients, for one step")


@ONLY["detection"]
def test_too_many_bad_losses(run, kind, tried):
    run.command += ["--max-bad-steps", "4"]
    sabotaged(run, kind, BAD_LOSS="0:7,8,9,10,11,12")
    assert run.start().wait(LIMIT) == 2
    assert "\ntrain.py: --max-bad-steps 4: this many consecutive steps were not finite" in run.text()
    newest = DENSE_NAMES.numbered(run.output)[0]
    assert checkpoints.damage(newest) is None
    assert newest.name in ("epoch_1.pth", "iter_6.pth")
    tried("non-finite losses, for good")


# ----------------------------------------------------------------------------------------------------------------------
# Bad data
# ----------------------------------------------------------------------------------------------------------------------


def copied_data(kind: str, data: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Copy the first scenes of the demo's data. Returns the copy and its training images."""
    part = "ade" if kind == "segmentation" else "coco"
    shutil.copytree(data / part, folder / part)
    images = "ADEChallengeData2016/images/training" if kind == "segmentation" else "train2017"
    return folder, sorted((folder / part / images).iterdir())


@ONLY["segmentation"]
def test_unreadable_images(kind, demo_data, tmp_path, capsys, tried):
    """The limit is 0.1 % of the images, and at least one image. Two of 12 exceed it."""
    data, images = copied_data(kind, demo_data, tmp_path / "data")
    config = write_config(tmp_path, kind, data)
    images[0].write_bytes(images[0].read_bytes()[:60])
    run = DenseRun(kind, tmp_path / "one", config, "--cfg-options", "train_dataloader.num_workers=1")
    finished(run)
    assert entries(run.output, "unreadable_image") == [str(images[0])]
    images[1].write_text("no image")
    line = refused(capsys, config, "--work-dir", tmp_path / "two")
    assert line.startswith("train.py: --on-bad-image skip: 2 of 12 training images are unreadable (limit 1), e.g. ")
    assert "--on-bad-image fail: " in refused(capsys, config, "--work-dir", tmp_path / "fail", "--on-bad-image", "fail")
    tried("unreadable images", 3)


@pytest.mark.slow
@BOTH
def test_storage_outage(run, kind, demo_data, tmp_path, tried):
    """The run waits out a short outage. A long one ends it with a transient error, and the same command resumes."""
    data, _ = copied_data(kind, demo_data, tmp_path / "data")
    config = write_config(tmp_path, kind, data)
    undisturbed = finished(DenseRun(kind, tmp_path / "undisturbed", config))
    away = tmp_path / "away"
    run = sabotaged(DenseRun(kind, tmp_path, config), kind, PAUSES="1,1,1")
    process = run.start()
    run.wait_for(process, run.step, 2)
    data.rename(away)
    run.wait_for(process, "retrying for 3 seconds")
    away.rename(data)
    run.wait_for(process, run.step, 5)
    data.rename(away)
    assert process.wait(LIMIT) == RESUME_STATUS, run.text()
    assert re.search(r"train\.py: process 0: image .*cannot be read.*; run the same command again", run.text())
    assert "Traceback" not in run.text()
    assert_nothing_saved_is_lost(run)
    away.rename(data)
    run.environment.pop("PAUSES")
    assert_same_dense(finished(run), undisturbed)
    assert not entries(run.output, "unreadable_image")
    tried("storage that does not respond, briefly and for good", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming the right run
# ----------------------------------------------------------------------------------------------------------------------


LR, INDICES = "optim_wrapper.optimizer.lr=0.01", "train_dataloader.dataset.indices=11"
SGD = "optim_wrapper.optimizer.type=SGD optim_wrapper.optimizer.momentum=0.9"
OTHERS = {
    f"--auto-resume --cfg-options {LR} {INDICES}": "optim_wrapper.optimizer.lr 0.01 (was 0.001), "
    "train_dataloader.dataset.indices 11 (was 12)",
    "--auto-resume --seed 1": "randomness.seed 1 (was 0)",
    "": "already contains a run; resume it with --auto-resume",
    f"--resume --cfg-options {LR}": "its run has optim_wrapper.optimizer.lr=0.001, not 0.01",
    f"--resume --cfg-options {SGD}": "optim_wrapper.optimizer",
}


@pytest.mark.parametrize("settings", OTHERS)
def test_other_settings_and_taken_folders_are_refused(settings, configs, tmp_path, undisturbed, capsys):
    folder = shutil.copytree(undisturbed["detection"], tmp_path / "run")
    (folder / LAST["detection"]).unlink()  # as if the run was not complete
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    line = refused(capsys, configs["detection"], "--work-dir", folder, "--checkpoint-every", "2", *settings.split())
    assert OTHERS[settings] in line
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_images_are_refused(demo_data, tmp_path, undisturbed, capsys):
    shutil.copytree(undisturbed["segmentation"], tmp_path / "run")
    (tmp_path / "run/iter_12.pth").unlink()  # as if the run was not complete
    data, images = copied_data("segmentation", demo_data, tmp_path / "data")
    label = Path(str(images[0]).replace("/images/", "/annotations/")).with_suffix(".png")
    for path in (images[0], label):
        path.unlink()
    config = write_config(tmp_path, "segmentation", data)
    line = refused(capsys, config, "--work-dir", tmp_path / "run", "--auto-resume")
    assert f"train_dataloader.dataset.data_root {data}/" in line
    assert DENSE_NAMES.numbered(tmp_path / "run")[0].name == "iter_10.pth"
    run = DenseRun("segmentation", tmp_path, config)
    run.command[run.command.index("--auto-resume")] = "--resume"
    assert ": its run had different images: 12 training images as before, but with different names" in run.finish()


@ONLY["segmentation"]
def test_complete_run(run, kind, configs, tmp_path, undisturbed, capsys):
    shutil.copytree(undisturbed[kind], tmp_path / "run")
    assert "the run in run is complete: all " in run.finish()
    line = refused(capsys, configs[kind], "--work-dir", tmp_path / "run", "--resume", tmp_path / "run" / LAST[kind])
    assert "are done; nothing left to train" in line
    assert_same_dense(tmp_path / "run", undisturbed[kind])


@BOTH
def test_log_starts_with_settings_versions_and_data(kind, undisturbed):
    run = read_log(undisturbed[kind] / "log.txt")[0]
    assert run["settings"]["optim_wrapper.optimizer.lr"] == 1e-3
    assert run["versions"]["torch"] == torch.__version__
    assert "onedl-mmengine" in run["versions"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", run["revision"])
    assert run["data"]["train"]["images"] == 12
    assert re.fullmatch(r"[0-9a-f]{16}", run["data"]["train"]["fingerprint"])
    assert run["processes"] == 1


@pytest.mark.slow
@BOTH
def test_each_line_of_the_log_has_figures(kind, undisturbed_pair):
    """The first validation of two processes detects nothing. A line without figures looks like one of training."""
    assert all(entry.keys() - {"epoch", "step", "iter"} for entry in read_log(undisturbed_pair[kind] / "log.txt"))


def test_best_and_regular_checkpoints_are_kept(undisturbed):
    names = {kind: {path.name for path in folder.glob("*.pth")} for kind, folder in undisturbed.items()}
    assert names["segmentation"] == {"iter_6.pth", "iter_10.pth", "iter_12.pth", "best.pth"}
    assert names["detection"] == {"epoch_1.pth", "epoch_1_iter_4.pth", "epoch_2.pth", "best.pth"}
