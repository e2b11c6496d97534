"""Resuming a run: find its checkpoint, check that it belongs to the run, and restore the run's state."""

import json
import math
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.processes import all_gather, get_world_size, on_main_process, print_main
from sepvit_lib.common.saved_settings import img_size_of, settings_in
from sepvit_lib.pipeline.samples import ImageData, fingerprint
from sepvit_lib.run.checkpoint_names import CheckpointNames
from sepvit_lib.run.checkpoints import load_optimizer, load_weights, newest_good, read_checkpoint, weights_of
from sepvit_lib.run.state import Training

# Settings that do not change what a run computes. A run may be resumed with different values.
FREE_SETTINGS = set(
    "auto_resume check_duplicates checkpoint_every class_map config corruptions data_path device dist_eval dist_url "
    "dump_bad_batch eval keep_checkpoints local_rank max_bad_steps model_ema_force_cpu num_workers "
    "on_bad_image output_dir pin_mem print_freq profile report resume start_epoch throughput timeout weight_column "
    "world_size".split()
)

SPLITS = {"train": "training", "val": "validation"}
PACKAGES = ("torchvision", "timm", "numpy", "pillow")  # packages whose versions are recorded, besides torch

# ----------------------------------------------------------------------------------------------------------------------
# Description of a run
# ----------------------------------------------------------------------------------------------------------------------


def describe_data(train: ImageData, val: ImageData) -> dict[str, Any]:
    """Size and fingerprint of a run's training and validation sets."""
    return {
        name: dict(images=len(data), fingerprint=fingerprint(data)) for name, data in (("train", train), ("val", val))
    }


def git_revision() -> str:
    """The commit of this code, with "-dirty" if files have been changed since; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def describe_run(
    settings: Mapping[str, Any], data: dict[str, Any], device: torch.device, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """Everything needed to repeat a run: settings, versions, revision, device, processes and data.

    Args:
        settings: the run's settings by name.
        data: size and fingerprint of the run's data sets.
        device: the process's device.
        packages: packages whose versions are recorded, besides torch.
    """
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    versions |= {name: version(name) for name in packages}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    where = dict(revision=git_revision(), device=name, processes=get_world_size())
    return dict(settings=dict(settings), versions=versions, **where, data=data)


# ----------------------------------------------------------------------------------------------------------------------
# Finding the checkpoint
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint that a run resumes from.

    Attributes:
        path: path or https address of the checkpoint.
        is_automatic: whether it was found in the output folder, and not named by the user.
        checkpoint: content of the checkpoint.
    """

    path: str
    is_automatic: bool
    checkpoint: dict[str, Any]

    @property
    def what(self) -> str:
        """Setting and path, for messages."""
        return setting("auto_resume" if self.is_automatic else "resume", self.path)


def find_checkpoint(
    path: str,
    automatic: bool,
    folder: Path,
    names: CheckpointNames,
    read: Callable[[str, str], dict[str, Any]] = read_checkpoint,
) -> Source | None:
    """Find the checkpoint to resume from; None for a fresh run. A collective call.

    Args:
        path: checkpoint named by the user, "" for none.
        automatic: prefer the newest intact checkpoint in the output folder, if there is one.
        folder: the output folder.
        names: names of the folder's checkpoints.
        read: reads a checkpoint, from its path and a description for messages.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    newest = _newest_checkpoint(folder, names) if automatic else ""
    if newest:
        path = newest
    elif not path:
        if automatic:
            print_main(f"no checkpoint in {folder} to resume from; starting a fresh run")
        return None
    source = Source(path, bool(newest), {})
    return replace(source, checkpoint=read(path, source.what))


def _newest_checkpoint(folder: Path, names: CheckpointNames) -> str:
    """Find a folder's newest intact checkpoint on rank 0, and return its path on every rank; "" if there is none."""
    found: list[str] = []

    def find() -> None:
        try:
            found.append(str(newest_good(folder, names) or ""))
        except UserError as error:
            raise UserError(f"{setting('auto_resume')}: {error}") from None

    on_main_process(find)
    return all_gather(found)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Checking that the checkpoint belongs to the run
# ----------------------------------------------------------------------------------------------------------------------


def check_source(
    source: Source, settings: Mapping[str, Any], data: dict[str, Any], is_stream: bool, defaults: Mapping[str, Any]
) -> int:
    """Check that a run with these settings can resume from a checkpoint.

    Args:
        source: the checkpoint.
        settings: the run's settings by name.
        data: returned by `describe_data`.
        is_stream: whether the training images are read from a streaming data set.
        defaults: values of the settings that a checkpoint of an older version lacks.

    Returns:
        the number of batches that each rank must accumulate per step; see `accumulation`.

    Raises:
        UserError: the checkpoint belongs to a different run, or its steps cannot be divided among the processes.
    """
    if source.is_automatic:
        saved = settings_in(source.checkpoint)
        check_same_run(source, {**defaults, **saved} if saved else {}, settings, data)
    if "batches_per_step" not in source.checkpoint:
        return int(settings["accum_steps"])
    accum_steps = accumulation(source, settings)
    if is_stream and source.checkpoint["epoch_step"]:
        check_same_readers(source, settings)
    return accum_steps


def check_same_run(
    source: Source,
    before: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: dict[str, Any],
    free: Collection[str] = FREE_SETTINGS,
    folder: str = "output_dir",
    images: str = "data_path",
) -> None:
    """Refuse a checkpoint of a run with different settings or images.

    Args:
        source: the checkpoint.
        before: settings of the checkpoint's run; empty if unknown.
        settings: the run's settings by name.
        data: size and fingerprint of the run's data sets.
        free: settings that may differ.
        folder: name of the setting that gives the output folder.
        images: name of the setting that gives the data set.

    Raises:
        UserError: settings or images differ.
    """
    path, changed = setting(images, settings.get(images) or ""), differences(before, settings, free)
    for run, differing in (
        ("with different settings", changed),
        (f"on different images than {path} has", data_differences(source, data)),
    ):
        if differing:
            raise UserError(
                f"{source.what}: was saved by a run {run}: {', '.join(differing)}; restore them, choose another "
                f"{setting(folder)}, or pass {setting('resume', source.path)} to continue with the new ones"
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Settings that differ from those of an earlier run, each with the current and the earlier value.

    Args:
        before: the earlier run's settings.
        now: the current settings.
        free: settings that may differ.
    """
    then, here = (json.loads(json.dumps(dict(settings))) for settings in (before, now))  # tuples are lists in recipes
    return [
        f"{setting(name, now[name])} (was {before[name]})"
        for name in sorted(before.keys() & now)
        if name not in free and then[name] != here[name]
    ]


def data_differences(source: Source, data: dict[str, Any]) -> list[str]:
    """Describe the data sets that differ from those of a checkpoint's run.

    Args:
        source: the checkpoint.
        data: size and fingerprint of the current data sets.
    """
    found = []
    for split, now in data.items():
        before = source.checkpoint.get("data", data).get(split, now)
        images, was = f"{now['images']} {SPLITS[split]} images", before["images"]
        if was != now["images"]:
            found.append(f"{images} (were {was})")
        elif before != now:
            found.append(f"{images} as before, but with different names or labels")
    return found


def accumulation(source: Source, settings: Mapping[str, Any]) -> int:
    """Number of batches that each rank must accumulate, so that a step has as many images as before resuming.

    If `batch_size` or `accum_steps` has been changed, the new values apply, but only from the start of an epoch.

    Raises:
        UserError: the batches cannot be divided among the processes, or the size of a step changes within an epoch.
    """
    checkpoint, processes = source.checkpoint, get_world_size()
    batch_size, accum_steps = settings["batch_size"], settings["accum_steps"]
    before, batches = settings_in(checkpoint), checkpoint["batches_per_step"]
    if batches == accum_steps * processes and before["batch_size"] == batch_size:
        return int(accum_steps)
    is_same = (before["batch_size"], before["accum_steps"]) == (batch_size, accum_steps)
    if is_same and batches % processes == 0:
        accum_steps = batches // processes
        print_main(
            f"checkpoint {source.path}: {batches} batches of {batch_size} images per step, as before; "
            f"{processes} processes accumulate {accum_steps} each"
        )
    elif is_same or checkpoint["epoch_step"]:
        divisors = ", ".join(str(number) for number in range(1, batches + 1) if batches % number == 0)
        raise UserError(
            f"{source.what}: each step has {batches} batches of {before['batch_size']} images, which {processes} "
            "processes with these settings cannot divide evenly; use the same settings and "
            f"{' or '.join(divisors.rsplit(', ', 1))} processes"
        )
    return int(accum_steps)


def check_same_readers(source: Source, settings: Mapping[str, Any]) -> None:
    """Refuse to resume within an epoch of a streaming data set if the number of loader workers has changed.

    Each worker reads its own share of the data set.

    Raises:
        UserError: the number of processes, or of workers per process, differs.
    """
    processes = len(source.checkpoint["losses"])  # one entry per rank
    was = processes, max(1, settings_in(source.checkpoint)["num_workers"])
    now = get_world_size(), max(1, settings["num_workers"])
    if was != now:
        raise UserError(
            f"{source.what}: was saved within an epoch of {settings['data_set']}, which {was[0]} processes with "
            f"{was[1]} workers each were reading; this run has {now[0]} with {now[1]}; use the same numbers of "
            "processes and workers, or a checkpoint saved at the end of an epoch"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Restoring
# ----------------------------------------------------------------------------------------------------------------------


def restore(training: Training, source: Source, settings: Mapping[str, Any]) -> None:
    """Restore a run's state from a checkpoint. A bare state dict restores only the weights.

    Args:
        training: the run.
        source: the checkpoint.
        settings: the run's settings by name.

    Raises:
        UserError: the checkpoint does not match the settings.
    """
    what, checkpoint = source.what, source.checkpoint
    _restore_weights(training, source, settings)
    if "optimizer" not in checkpoint:
        print_main(f"checkpoint {source.path}: contains only weights; optimiser and schedule start fresh")
        return
    optimizer = str(settings_in(checkpoint).get("opt", settings["opt"])).lower()
    if optimizer != settings["opt"]:
        raise UserError(
            f"{what}: was trained with {optimizer}, not {setting('opt', settings['opt'])}; use {optimizer}, or "
            f"{setting('finetune')} to load only the weights"
        )
    is_plateau = settings["sched"] == "plateau"
    try:
        load_optimizer(training.optimizer, training.model, checkpoint["optimizer"], with_lr=is_plateau)
        if checkpoint.get("scaler") and training.scaler.is_enabled():
            training.scaler.load_state_dict(checkpoint["scaler"])
        if is_plateau:  # the only schedule with a state; the others follow from settings and epoch
            training.restore_schedule(checkpoint["lr_scheduler"])
        elif checkpoint["epoch"] >= 0:
            training.lr_scheduler.step(checkpoint["epoch"])
        training.restore_progress(checkpoint)
        if settings_in(checkpoint).get("watch", "top1") != settings["watch"]:
            # `best_value` belongs to a different metric.
            training.best_value, training.best_epoch = -math.inf, training.epoch - 1
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{what}: its training state does not match ({error}); use {setting('finetune')} to load only the weights"
        ) from None
    step = f", step {training.epoch_step}" if training.epoch_step else ""
    print_main(f"checkpoint {source.path}: resuming at epoch {training.epoch}{step}")


def _restore_weights(training: Training, source: Source, settings: Mapping[str, Any]) -> None:
    what, checkpoint = source.what, source.checkpoint
    hints = f"select the variant with {setting('model')}", f"use {setting('finetune')} to train a new head"

    def load(model: nn.Module, prefer_ema: bool = False) -> Any:
        weights = weights_of(checkpoint, what, prefer_ema)
        return load_weights(model, weights, what, *hints, img_size=img_size_of(checkpoint))

    if load(training.model).adaptation:
        raise UserError(
            f"{what}: was trained at a different image size than {setting('input_size', settings['input_size'])}; "
            f"use {setting('finetune')}"
        )
    if training.ema is not None:
        load(training.ema.module, prefer_ema=True)
