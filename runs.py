"""A run: what it is, what it goes on from, and its files."""

import argparse
import fcntl
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import utils
from checkpoints import (
    BEST,
    NEWEST,
    NUMBERED,
    CheckpointWriter,
    load_optimizer,
    load_weights,
    name_also,
    newest_good,
    numbered,
    read_checkpoint,
    weights_of,
)
from engine import Precision, Training
from faults import gathered, patience_of
from training.commands import take_unprinted
from training.recipes import ARGS, write_recipe
from training.samples import ImageData, fingerprint
from utils import Log, Scalars, UserError, one_line, print_main

LOCK_WAIT = 60  # seconds, at least, in which the processes of a run that was killed have to end

# Settings that do not change what a run computes: it may go on with others.
FREE_SETTINGS = {
    "auto_resume", "checkpoint_every", "config", "data_path", "device", "dist_eval", "dist_url", "dump_bad_batch",
    "eval", "keep_checkpoints", "local_rank", "max_bad_steps", "model_ema_force_cpu", "num_workers", "on_bad_image",
    "output_dir", "pin_mem", "print_freq", "resume", "start_epoch", "throughput", "timeout", "world_size",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# What it is
# ----------------------------------------------------------------------------------------------------------------------


def describe_data(train: ImageData, val: ImageData) -> dict[str, Any]:
    """Size and fingerprint of the data sets."""
    return {name: dict(images=len(data.dataset), fingerprint=fingerprint(data))
            for name, data in (("train", train), ("val", val))}  # fmt: skip


def git_revision() -> str:
    """The commit this code is at, with "-dirty" where files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def describe_run(settings: dict[str, Any], data: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """What it takes to repeat a run."""
    packages = dict(python=platform.python_version(), torch=torch.__version__)
    packages |= {name: version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    is_gpu = precision.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_gpu else f"{precision.device.type} ({platform.machine()})"
    return dict(settings=settings, versions=packages, revision=git_revision(), device=device,
                processes=utils.get_world_size(), data=data)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# What it goes on from
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A checkpoint a run goes on from.

    Attributes:
        flag: that names it.
        path: its path or https address.
        checkpoint: what it holds.
    """

    flag: str
    path: str
    checkpoint: dict[str, Any]

    @property
    def what(self) -> str:
        """Flag and path, for messages."""
        return f"{self.flag} {self.path}"


def find_checkpoint(args: argparse.Namespace, folder: Path, data: dict[str, Any], is_stream: bool) -> Source | None:
    """The checkpoint to go on from; None to start afresh.

    That is `--resume`'s, or with `--auto-resume` the output folder's newest whole one where it has any. Where other
    processes than before go on, `--accum-steps` becomes what keeps the images a step.

    Args:
        args: the settings.
        folder: the output folder.
        data: as `describe_data` gives it.
        is_stream: whether the training images are read in turn.

    Raises:
        UserError: the checkpoint cannot be read, or is not of this run (`--auto-resume`).
    """
    path, flag = args.resume, "--resume"
    if args.auto_resume and (newest := _newest_checkpoint(folder)):
        path, flag = newest, "--auto-resume"
    if not path:
        if args.auto_resume:
            print_main(f"--auto-resume: no checkpoint in {folder}, starting afresh")
        return None
    source = Source(flag, path, read_checkpoint(path, flag))
    if flag == "--auto-resume":
        check_same_run(args, source, data)
    if "batches_per_step" in source.checkpoint:
        share_steps(args, source)
        if is_stream and source.checkpoint["epoch_step"]:
            check_same_readers(args, source)
    return source


def _newest_checkpoint(folder: Path) -> str:
    """The path of a folder's newest whole checkpoint, "" where there is none, the same on all processes."""
    found = []
    utils.on_main_process(lambda: found.append(str(newest_good(folder) or "")))
    return gathered(found)[0]


def check_same_run(args: argparse.Namespace, source: Source, data: dict[str, Any]) -> None:
    """Refuse to go on with a checkpoint of other settings or other images.

    Raises:
        UserError: names those that differ.
    """
    before, now = dict(vars_of(source.checkpoint.get("args", {}))), vars(args)
    differing = [f"--{name.replace('_', '-')} {now[name]} (was {before[name]})" for name in sorted(before.keys() & now)
                 if name not in FREE_SETTINGS and json.dumps(before[name]) != json.dumps(now[name])]  # fmt: skip
    if differing:
        raise UserError(f"{source.what}: of a run with other settings: {', '.join(differing)}; take those, or another "
                        f"--output_dir, or resume with these by --resume {source.path}")  # fmt: skip
    before = source.checkpoint.get("data", data)
    if differing := [_data_difference(split, before[split], data[split]) for split in data
                     if before[split] != data[split]]:  # fmt: skip
        raise UserError(f"{source.what}: of a run on other images than --data-path {args.data_path}: "
                        f"{', '.join(differing)}; name the run's images, or another --output_dir")  # fmt: skip


def _data_difference(split: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the images of a run before and now, in words."""
    name = {"train": "training", "val": "validation"}[split]
    if before["images"] != now["images"]:
        return f"{now['images']} {name} images (were {before['images']})"
    return f"{now['images']} {name} images as before, but with other names or labels"


def vars_of(settings: Any) -> dict[str, Any]:
    """The settings in a checkpoint, a dict, or a Namespace in published ones."""
    return settings if isinstance(settings, dict) else vars(settings)


def share_steps(args: argparse.Namespace, source: Source) -> None:
    """Make steps of as many images as before, on as many processes as there are.

    Raises:
        UserError: they cannot share the images, or other settings ask for others within an epoch.
    """
    checkpoint, processes = source.checkpoint, utils.get_world_size()
    before, batches = vars_of(checkpoint["args"]), checkpoint["batches_per_step"]
    if batches == args.accum_steps * processes and before["batch_size"] == args.batch_size:
        return
    same = (before["batch_size"], before["accum_steps"]) == (args.batch_size, args.accum_steps)
    if same and batches % processes == 0:
        args.accum_steps = batches // processes
        print_main(f"{source.what}: {batches} batches of {args.batch_size} images a step, as before: "
                   f"{processes} processes accumulate {args.accum_steps} each")  # fmt: skip
    elif same or checkpoint["epoch_step"]:
        fitting = [str(number) for number in range(1, batches + 1) if batches % number == 0]
        raise UserError(f"{source.what}: its steps are {batches} batches of {before['batch_size']} images, which "
                        f"{processes} processes with these settings cannot share; take {', '.join(fitting)}, with the "
                        "same settings")  # fmt: skip


def check_same_readers(args: argparse.Namespace, source: Source) -> None:
    """Refuse to go on within an epoch of images that are read in turn with other readers, each of which has its own.

    Raises:
        UserError: their number differs.
    """
    before = vars_of(source.checkpoint["args"])
    processes = len(source.checkpoint["losses"])  # each keeps its own
    was, now = ((number, max(1, workers)) for number, workers in
                ((processes, before["num_workers"]), (utils.get_world_size(), args.num_workers)))  # fmt: skip
    if was != now:
        raise UserError(f"{source.what}: within an epoch of {args.data_set}, which {was[0]} processes read with "
                        f"{was[1]} workers each, not {now[0]} with {now[1]}; take as many, or a checkpoint between "
                        "epochs")  # fmt: skip


def restore(args: argparse.Namespace, training: Training, source: Source) -> None:
    """Go on where a checkpoint is; a bare state dict gives the weights alone.

    Raises:
        UserError: it does not fit the settings.
    """
    what, checkpoint = source.what, source.checkpoint
    new_classes = "--finetune gives the model a new head"
    if load_weights(training.model, weights_of(checkpoint, what), what, classes_hint=new_classes):
        raise UserError(f"{what}: of another image size than --input-size {args.input_size}; --finetune takes it")
    if training.ema is not None:
        load_weights(training.ema.module, weights_of(checkpoint, what, prefer_ema=True), what)
    if "optimizer" not in checkpoint:
        print_main(f"{what}: weights only; the optimiser and the schedule start afresh")
        return
    optimizer = str(vars_of(checkpoint.get("args", {})).get("opt", args.opt)).lower()
    if optimizer != args.opt:
        raise UserError(f"{what}: its optimiser is {optimizer}, not --opt {args.opt}; take that, or --finetune for its "
                        "weights alone")  # fmt: skip
    try:
        load_optimizer(training.optimizer, training.model, checkpoint["optimizer"], args.sched == "plateau")
        if checkpoint.get("scaler") and training.scaler.is_enabled():
            training.scaler.load_state_dict(checkpoint["scaler"])
        if args.sched == "plateau":  # the one schedule with a memory; the others follow from the command's settings
            training.restore_schedule(checkpoint["lr_scheduler"])
        elif checkpoint["epoch"] >= 0:
            training.lr_scheduler.step(checkpoint["epoch"])
        training.restore_progress(checkpoint)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: its training state does not fit ({error}); --finetune takes its weights") from None
    print_main(f"{what}: going on with epoch {training.epoch}" + (f", step {training.step}" if training.step else ""))


# ----------------------------------------------------------------------------------------------------------------------
# Its files
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """A run's files; on the main process alone there are any.

    Attributes:
        log: log.txt.
        scalars: TensorBoard's files.
        checkpoints: writes checkpoints.
        lock: keeps other runs out.
    """

    log: Log | None = None
    scalars: Scalars | None = None
    checkpoints: CheckpointWriter | None = None
    lock: int | None = None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.log is not None:
            self._note_unprinted()
        if self.lock is not None:
            os.close(self.lock)

    def hold(self, folder: Path, patience: float) -> None:
        """Keep other runs out of a folder; see `lock_folder`."""
        if self.lock is None:
            self.lock = lock_folder(folder, patience)

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to log.txt; what is no epoch's figures is printed, too."""
        if self.log is not None:
            self.log.add(entry)
            if "train_loss" not in entry:
                print_main(one_line(", ".join(f"{name} {value}" for name, value in entry.items())))

    def save(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        """Write a checkpoint, and before it what log.txt has to say of the way there."""
        if self.checkpoints is not None:
            self._note_unprinted()
            self.log.flush()
            self.checkpoints.save(checkpoint, is_best)

    def _note_unprinted(self) -> None:
        """Add what could not be printed to log.txt."""
        if lines := take_unprinted():
            self.log.add({"not_printed": lines})

    def draw(self, stats: dict[str, float], epoch: int) -> None:
        """Add figures to TensorBoard's files."""
        if self.scalars is not None:
            self.scalars.add(stats, epoch)

    def close(self) -> None:
        """Wait until all is written.

        Raises:
            UserError: log.txt or the last checkpoint could not be.
        """
        if self.checkpoints is None:
            return
        self.checkpoints.wait()
        self._note_unprinted()
        self.log.flush()
        for what, failure in (("the last checkpoint", self.checkpoints.failure), ("log.txt", self.log.failure)):
            if failure:
                raise UserError(
                    f"--output_dir {self.checkpoints.folder}: {what} could not be written ({failure}); make room and "
                    "run it again with --auto-resume"
                )


def lock_folder(folder: Path, patience: float) -> int | None:
    """Keep other runs from writing to a folder until this process ends, however it ends.

    Args:
        folder: the folder.
        patience: seconds in which a process notices that it is alone; those whose launcher was killed train on that
            long, and are waited for.

    Returns:
        what holds the lock; None where there is no such folder yet, or no locking on its file system.

    Raises:
        UserError: another run writes there.
    """
    if not folder.is_dir():
        return None
    lock = os.open(folder, os.O_RDONLY)
    for second in range(max(LOCK_WAIT, math.ceil(2 * patience))):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if second == 0:
                print_main(f"--output_dir {folder}: another run writes there; waiting for its end")
            time.sleep(1)
        except OSError:
            return None
    raise UserError(f"--output_dir {folder}: another run writes there; end it, or name another folder")


def open_output(
    args: argparse.Namespace,
    output: Output,
    folder: Path,
    source: Source | None,
    training: Training,
    run: dict[str, Any],
) -> None:
    """Make the output folder ready for the run's files.

    Args:
        args: the settings.
        output: gets the files.
        folder: the output folder.
        source: the checkpoint the run goes on from, None for none.
        training: the run.
        run: what log.txt begins with.

    Raises:
        UserError: it cannot be written, or holds another run.
    """

    def prepare() -> None:
        utils.make_folder(folder, "--output_dir")
        output.hold(folder, patience_of(args.timeout))
        later = [path for path in numbered(folder) if path.name > NUMBERED.format(training.steps)]
        if is_taken(args, folder, source, later):
            raise UserError(
                f"--output_dir {folder}: holds a run already; go on with --auto-resume, or name another folder"
            )
        for damaged in later:
            damaged.rename(f"{damaged}.damaged")
        for unfinished in (*folder.glob("checkpoint*.pth.tmp"), *folder.glob("bad_batch-*.pth.tmp")):
            unfinished.unlink()
        try:
            output.log = Log(folder / "log.txt", training.epoch, training.step)
            write_recipe(folder / ARGS, run["settings"])
        except OSError as error:
            raise UserError(
                f"--output_dir {folder}: cannot be written ({error.strerror}); name another folder"
            ) from None
        output.log.add_run(run)
        output.scalars = Scalars(folder)
        output.checkpoints = CheckpointWriter(folder, args.keep_checkpoints)

    utils.on_main_process(prepare)


def is_taken(args: argparse.Namespace, folder: Path, source: Source | None, later: list[Path]) -> bool:
    """Whether a folder holds a run that going on from a checkpoint would overwrite.

    Args:
        args: the settings.
        folder: the output folder.
        source: the checkpoint, None for a run that starts afresh.
        later: the folder's checkpoints of later steps than that.
    """
    if source is None or Path(source.path).resolve().parent != folder.resolve():
        has_checkpoint = any((folder / name).exists() for name in (NEWEST, BEST)) or bool(numbered(folder))
        return has_checkpoint or (not args.auto_resume and bool(utils.epochs_of(utils.read_log(folder / "log.txt"))))
    if source.flag == "--auto-resume":  # later ones are damaged
        return False
    # the published run's way to go on is `--resume run/checkpoint.pth`, where there is no other one
    is_other = Path(source.path).name != NEWEST and (folder / NEWEST).exists()
    return bool(later) or (is_other and not numbered(folder))


def complete(folder: Path) -> None:
    """Give the newest checkpoint of a run that is at its end its name, and draw the curves."""
    try:
        if saved := numbered(folder):
            name_also(saved[0], NEWEST)
        utils.plot_curves(folder / "log.txt", folder / "curves.png")
    except OSError as error:
        print_main(f"WARNING: {folder / NEWEST} or curves.png could not be written ({error.strerror}); "
                   "make room and run the command again with --auto-resume")  # fmt: skip
