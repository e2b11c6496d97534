"""A training run of segmentation or detection: its runner, checkpoints and resuming."""

import inspect
import json
import re
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop
from mmengine.visualization import Visualizer

from sepvit_lib.common.command_line import first_line
from sepvit_lib.common.errors import UserError, setting, with_flags
from sepvit_lib.common.processes import all_gather, is_main_process, on_main_process, print_line, print_main
from sepvit_lib.common.saved_settings import settings_in
from sepvit_lib.mm.config_lookup import orientation_in
from sepvit_lib.mm.loops import (
    DenseState,
    Schedule,
    SkippingAmpOptimWrapper,
    SkippingOptimWrapper,
    TrainLoop,
    WatchedBatches,
    is_better,
)
from sepvit_lib.mm.runner import DenseRunner, unwrapped
from sepvit_lib.mm.seeded_samples import describe_samples, sampled_files, shield_workers
from sepvit_lib.pipeline.image_files import STORED, count_turned
from sepvit_lib.run.checkpoint_names import CheckpointNames
from sepvit_lib.run.monitor import DelayedFlags, MonitorSettings, StepMonitor
from sepvit_lib.run.output import Output
from sepvit_lib.run.resume import Source, check_same_run, data_differences, describe_run, differences
from sepvit_lib.run.state import check_finite
from sepvit_lib.run.watchdog import Watchdog

ADVICE = "a lower `optim_wrapper.optimizer.lr`, or training without half precision"
PACKAGES = ("torchvision", "timm", "numpy", "onedl-mmengine", "onedl-mmcv")  # versions recorded in log.txt
# Parts of a config that determine what a run computes.
MODEL = ("model", "sync_bn", "data_preprocessor", "model_wrapper_cfg", "find_unused_parameters")
TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr", "custom_hooks")
COMPUTED = (*MODEL, *TRAINING, "val_dataloader", "val_evaluator", "val_cfg", "randomness", "efficient_conv_bn_eval")
# Settings in these parts that do not affect the results: paths, and how data are loaded. The images' fingerprint is
# compared separately.
FREE = re.compile(
    r"(^|\.)(num_workers|persistent_workers|pin_memory|prefetch_factor|data_root|data_prefix|ann_file|init_cfg|pretrained|"
    r"with_cp|outfile_prefix|backend_args|label_map|stored_classes)(\.|$)"
)
# Supported settings of mmengine's checkpoint hook.
SAVING = ("type", "interval", "by_epoch", "max_keep_ckpts", "save_best", "rule", "priority")


class DenseNames(CheckpointNames):
    """Names of checkpoints as in mmengine: `iter_<iterations>.pth` or `epoch_<epochs>.pth`.

    A checkpoint within an epoch is `epoch_<epochs done>_iter_<iterations of the epoch>.pth`. The newest checkpoints
    and those at the config's interval are kept.

    Args:
        interval: the config's interval, in epochs or iterations.
        keep: number of newest checkpoints that are always kept.
        keep_regular: number of checkpoints at the config's interval to keep, -1 for all.
    """

    best = "best.pth"
    pointer = "last_checkpoint"  # mmengine's tools read it

    def __init__(self, interval: int, keep: int, keep_regular: int) -> None:
        self.interval = interval
        self.keep = keep
        self.keep_regular = keep_regular

    def position(self, name: str) -> tuple[int, ...] | None:
        """Epochs and iterations stated in a file name; None for other names."""
        match = re.fullmatch(r"(?:epoch_(\d+))?_?(?:iter_(\d+))?\.pth", name)
        return (int(match[1] or 0), int(match[2] or 0)) if match and (match[1] or match[2]) else None

    def name(self, checkpoint: dict[str, Any]) -> str:
        """File name of a checkpoint."""
        state = DenseState.from_checkpoint(checkpoint)
        if not (state.epoch or state.epoch_step):
            return f"iter_{state.global_step}.pth"
        return f"epoch_{state.epoch}" + (f"_iter_{state.epoch_step}" if state.epoch_step else "") + ".pth"

    def position_text(self, checkpoint: dict[str, Any]) -> str:
        """Position at which training resumes from a checkpoint, for messages."""
        state = DenseState.from_checkpoint(checkpoint)
        return f"iteration {state.global_step + 1}" + ("" if state.validated else " and its validation")

    def outdated(self, saved: list[Path]) -> list[Path]:
        """Select the checkpoints to delete: all except the newest ones and those at the config's interval."""
        regular = [path for path in saved if self._is_regular(path)]
        surplus = regular[self.keep_regular :] if self.keep_regular > 0 else []
        return [path for path in saved[self.keep :] if path in surplus or path not in regular]

    def _is_regular(self, path: Path) -> bool:
        match = re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem)  # not within an epoch
        return match is not None and self.interval > 0 and int(match[1]) % self.interval == 0


def settings_of(cfg: Config) -> dict[str, Any]:
    """The settings of a config that determine what a run computes, by dotted key."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if FREE.search(name):
            return
        if isinstance(value, Mapping):
            for key, child in value.items():
                add(f"{name}.{key}", child)
        else:
            found[name] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    for part in COMPUTED:
        if cfg.get(part) is not None:
            add(part, cfg[part])
    return found


def saving_of(cfg: Config) -> Mapping[str, Any]:
    """Return a config's settings of mmengine's checkpoint hook."""
    return (cfg.get("default_hooks") or {}).get("checkpoint") or {}


def read_schedule(cfg: Config) -> Schedule:
    """Read the length of a run, and when it validates and saves, from its config.

    Raises:
        UserError: the config's loop is neither iteration-based nor epoch-based, a length or interval is missing or
            below 1, or a setting of mmengine's checkpoint hook is not supported.
    """
    loop, saving, hooks = cfg.train_cfg, saving_of(cfg), cfg.get("default_hooks") or {}
    kinds = {"EpochBasedTrainLoop": True, "IterBasedTrainLoop": False}
    by_epoch = kinds.get(loop.type) if "type" in loop else loop.get("by_epoch")
    if by_epoch is None:
        raise UserError(f"train_cfg.type={loop.get('type')}: unknown; choose {' or '.join(kinds)}")
    if not isinstance(best := saving.get("save_best"), (str, type(None))):
        raise UserError(f"default_hooks.checkpoint.save_best={best}: takes a single metric, since best.pth is one file")
    usual = {name: parameter.default for name, parameter in inspect.signature(CheckpointHook).parameters.items()}
    others = [name for name in saving if name not in SAVING and not name.startswith("_")]
    if unknown := [name for name in others if saving[name] != usual.get(name)]:
        raise UserError(
            f"default_hooks.checkpoint.{unknown[0]}={saving[unknown[0]]}: not available; remove it. This hook's "
            f"supported settings are {', '.join(SAVING)}"
        )
    length = "max_epochs" if by_epoch else "max_iters"
    val_intervals = ((0, loop.get("val_interval", 1 if by_epoch else 1000)), *(loop.get("dynamic_intervals") or ()))
    log_interval = (hooks.get("logger") or {}).get("interval", 10)
    numbers = [(f"train_cfg.{length}", loop.get(length)), ("default_hooks.logger.interval", log_interval)]
    numbers += [("train_cfg.val_interval", interval) for _, interval in val_intervals]
    accumulated = (cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    numbers.append(("optim_wrapper.accumulative_counts", accumulated))
    for name, value in numbers:
        if not isinstance(value, (int, float)) or value < 1:
            raise UserError(f"{name}={value}: takes a number of at least 1; set it in the config")
    read = {"type", "_scope_", "by_epoch", length, "val_begin", "val_interval", "dynamic_intervals"}
    if unread := loop.keys() - read:
        raise UserError(f"train_cfg.{min(unread)}: has no effect beside {length}; remove it")
    return Schedule(
        by_epoch=by_epoch,
        length=loop[length],
        val_begin=loop.get("val_begin", 1),
        val_intervals=val_intervals,
        save_interval=saving.get("interval", -1) if saving.get("by_epoch", True) == by_epoch else -1,
        log_interval=log_interval,
    )


def is_finished(schedule: Schedule, checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint is from the end of a run."""
    state = DenseState.from_checkpoint(checkpoint)
    done = state.epoch if schedule.by_epoch else state.global_step
    return state.validated and done >= schedule.length


@dataclass(frozen=True)
class Run:
    """Config, schedule, files and settings of a training run.

    Attributes:
        config: its config, as written to the work dir and to checkpoints.
        schedule: its length, and when it validates and saves.
        output: its files.
        watchdog: watches its processes.
        source: checkpoint that it resumes from, None for a fresh run.
        auto_resume: whether the checkpoint must come from a run with the same settings and images.
        resumes: whether the command asks to resume from the newest checkpoint in the work dir.
        settings: settings that determine what the run computes.
        limits: settings of the monitor, without the size of the data set, which is set later.
    """

    config: Config
    schedule: Schedule
    output: Output
    watchdog: Watchdog
    source: Source | None
    auto_resume: bool
    resumes: bool
    settings: dict[str, Any]
    limits: MonitorSettings


def flag_delay() -> int:
    """Number of steps by which reading a step's flags is delayed: 1 on CUDA, to not wait for the GPU; otherwise 0."""
    return 1 if get_device() == "cuda" else 0


class TrainingRunner(DenseRunner):
    """Train a segmentor or detector in a run that can be killed, preempted and resumed at any iteration.

    Attributes:
        run: the run. Set before `train`.
        is_open: whether the run's files are open.
    """

    run: Run
    is_open = False

    @property
    def output(self) -> Output:
        """Files of the run."""
        return self.run.output

    @property
    def state(self) -> DenseState:
        """State of the run."""
        return self.train_loop.state

    def dump_config(self) -> None:
        """Write nothing yet: `load_or_resume` writes the config, so that a rejected run does not overwrite it."""

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        """Register the default hooks except the checkpoint hook: the loop saves checkpoints."""
        super().register_default_hooks({**(hooks or {}), "checkpoint": None})

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """Build the visualizer, which writes mmengine's scalars. A full disk does not end the run."""
        built = super().build_visualizer(visualizer)
        add = built.add_scalars

        def add_scalars(*args: Any, **kwargs: Any) -> None:
            try:
                add(*args, **kwargs)
            except OSError as error:
                print_line(f"WARNING: mmengine's scalars could not be written ({error.strerror}); training continues")

        built.add_scalars = add_scalars
        return built

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        """Build a loader whose workers ignore the signals that stop a run."""
        return shield_workers(DenseRunner.build_dataloader(*args, **kwargs))

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """Build the training loop."""
        del loop  # the schedule was read from it
        return TrainLoop(self, self.cfg.train_dataloader)

    def make_monitor(self, dataset_size: int) -> StepMonitor:
        """Build the step monitor for a number of training images."""
        flags = DelayedFlags(self.device, flag_delay())
        limits = replace(self.run.limits, dataset_size=dataset_size)
        return StepMonitor(limits, self.run.watchdog, flags, self.output.folder, self.output.log_event, self.save)

    @property
    def device(self) -> torch.device:
        """The process's device."""
        return torch.device(get_device())

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """Build the validation loop, which ends early if the run is asked to stop."""
        built = super().build_val_loop(loop)
        built.dataloader = WatchedBatches(built.dataloader, self.run.watchdog, self.device)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimiser wrapper, which skips non-finite steps."""
        kinds = {"OptimWrapper": SkippingOptimWrapper, "AmpOptimWrapper": SkippingAmpOptimWrapper}
        name = optim_wrapper.get("type", "OptimWrapper")
        if name not in kinds:
            raise UserError(f"optim_wrapper.type={name}: unknown; choose {' or '.join(kinds)}")
        self._scale_is_static = isinstance(optim_wrapper.get("loss_scale", "dynamic"), float)
        return super().build_optim_wrapper({**optim_wrapper, "type": kinds[name]})

    def searches_scale(self) -> bool:
        """Whether the gradient scaler may still be searching for a loss scale: its scale is dynamic, and at least 1."""
        scaler = getattr(self.optim_wrapper, "loss_scaler", None)
        return scaler is not None and not self._scale_is_static and scaler.get_scale() >= 1

    # ------------------------------------------------------------------------------------------------------------------
    # Resuming
    # ------------------------------------------------------------------------------------------------------------------

    def load_or_resume(self) -> None:
        """Resume the run, or load its starting weights. Then open the run's files.

        Raises:
            UserError: the checkpoint does not fit, or the folder contains another run.
        """
        run, source = self.run, self.run.source
        self.data, self.reading = self._describe_data()
        if self.reading["orientation"] == STORED and self.reading["turned"]:
            counts = f"{self.reading['turned']} of {self.reading['sampled']} sampled training images"
            hint = "orientation='exif' at the top of the config turns them upright"
            print_main(f"WARNING: {counts} have an EXIF orientation, which is ignored; {hint}")
        if source is None:
            super().load_or_resume()
        else:
            self._compare(source)
            self.restore(source)
        described = describe_run(run.settings, self.data, self.device, PACKAGES)
        on_main_process(lambda: self.output.open(described, self.state.covers, source, run.resumes, scalars=False))
        self.is_open = True
        on_main_process(lambda: run.config.dump(self.output.folder / Path(self.cfg.filename).name))

    def _compare(self, source: Source) -> None:
        """Compare this run with a checkpoint's run. `--auto-resume` refuses differences; `--resume` reports them.

        Raises:
            UserError: settings or images differ.
        """
        before = settings_in(source.checkpoint)
        if not before:  # a checkpoint of mmengine itself
            return
        names = before.keys() | self.run.settings.keys()  # a config may have gained or lost settings
        before, now = ({name: settings.get(name) for name in names} for settings in (before, self.run.settings))
        if self.run.auto_resume:
            root = "train_dataloader.dataset.data_root"
            now[root] = self.cfg.train_dataloader.dataset.get("data_root")  # not compared, only for the message
            check_same_run(source, before, now, self.data, (), "work_dir", root)
            return
        what = f"checkpoint {source.path}: its run had different"
        if changed := differences(before, now, ()):
            print_main(with_flags(f"{what} settings: {', '.join(changed)}", {}))
        if changed := data_differences(source, self.data):
            print_main(f"{what} images: {', '.join(changed)}")

    def _describe_data(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describe the data sets and how training images are read. Rank 0 describes them for all ranks."""
        described = []
        if is_main_process():
            loops = dict(train=self.train_loop) | (dict(val=self.val_loop) if self.val_loop is not None else {})
            data = {name: describe_samples(loop.dataloader.dataset) for name, loop in loops.items()}
            turned = count_turned(sampled_files(self.train_loop.dataloader.dataset))
            described = [json.dumps([data, dict(orientation=orientation_in(self.cfg.train_dataloader), **turned)])]
        data, reading = json.loads(all_gather(described)[0])
        return data, reading

    def restore(self, source: Source) -> None:
        """Restore weights, optimiser, schedules, loss scale, log and position in the run.

        Raises:
            UserError: the checkpoint does not fit the config.
        """
        checkpoint, what = source.checkpoint, source.what
        self.checkpoints[source.path] = checkpoint
        self.load_checkpoint(source.path)
        self.message_hub.load_state_dict(checkpoint["message_hub"])
        check_optimizer(self.optim_wrapper.optimizer, checkpoint["optimizer"], what)
        try:
            self.optim_wrapper.load_state_dict(dict(checkpoint["optimizer"]))
            for scheduler, state in zip(self.param_schedulers or (), checkpoint["param_schedulers"], strict=True):
                scheduler.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{what}: its training state does not fit the config ({first_line(error)}); "
                f"use {setting('load_from')} for its weights only"
            ) from None
        self.train_loop.state = DenseState.from_checkpoint(checkpoint)
        print_main(f"checkpoint {source.path}: resuming at {self.output.names.position_text(checkpoint)}")

    # ------------------------------------------------------------------------------------------------------------------
    # Saving
    # ------------------------------------------------------------------------------------------------------------------

    def after_validation(self, metrics: dict[str, Any]) -> None:
        """Log a validation and save a checkpoint, also as best.pth if the score is the best yet. A collective call."""
        figures = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float, np.number))}
        if figures:  # COCO's metric reports none if nothing was detected
            self.output.log({**self.state.position(), **{f"test_{name}": value for name, value in figures.items()}})
        name, is_loss = self._score_name(figures)
        is_best = name is not None and is_better(figures[name], self.state.best, is_loss)
        if name is not None and is_best:
            self.state.best = figures[name]
        self.save(is_best)

    def _score_name(self, figures: dict[str, float]) -> tuple[str | None, bool]:
        """Name of the metric that selects the best checkpoint, and whether lower is better."""
        hook = saving_of(self.cfg)
        wanted = hook.get("save_best")
        name = next((name for name in (wanted, "mIoU", "coco/bbox_mAP", *figures) if name in figures), None)
        if wanted not in (None, "auto", name):
            what = f"WARNING: default_hooks.checkpoint.save_best={wanted}: no such metric, best.pth is chosen by {name}"
            print_main(f"{what}; choose from {', '.join(figures)}")
        return name, hook.get("rule") == "less" or "loss" in (name or "")

    def save(self, is_best: bool = False) -> None:
        """Save a checkpoint. A collective call.

        Raises:
            UserError: the weights are not finite.
        """
        check_finite(unwrapped(self.model), self.state, ADVICE)
        self.output.save(self.checkpoint(), is_best)

    def checkpoint(self) -> dict[str, Any]:
        """A checkpoint in mmengine's format, with everything else that a resumed run needs."""
        state = self.state
        meta = dict(
            epoch=state.epoch,
            iter=state.global_step,
            cfg=self._config_text,
            seed=self.seed,
            experiment_name=self.experiment_name,
            time=time.strftime("%Y%m%d_%H%M%S"),
            mmengine_version=version("onedl-mmengine"),
            dataset_meta=self.train_dataloader.dataset.metainfo,
        )
        checkpoint = dict(
            meta=meta,
            state_dict=unwrapped(self.model).state_dict(),
            message_hub=deepcopy(self.message_hub.state_dict()),
            optimizer=self.optim_wrapper.state_dict(),
            param_schedulers=[plain_state(scheduler) for scheduler in self.param_schedulers or ()],
            run=state.checkpoint(),
            args=self.run.settings,
            data=self.data,
            reading=self.reading,
        )
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        return checkpoint

    @cached_property
    def _config_text(self) -> str:
        """The config as text. Formatting it takes a second."""
        return self.run.config.pretty_text


def plain_state(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's state without its functions, and with NumPy scalars converted to Python numbers."""
    state = {name: value for name, value in scheduler.state_dict().items() if not callable(value)}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in state.items()}


def check_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], what: str) -> None:
    """Refuse a checkpoint with a different optimiser, learning rate or weight decay.

    Args:
        optimizer: the config's optimiser, as built.
        state: the state in the checkpoint.
        what: the checkpoint, for messages.

    Raises:
        UserError: the optimiser or a setting differs. The message names it.
    """
    hint = f"use that run's setting, or {setting('load_from')} for its weights only"
    for now, before in zip(optimizer.param_groups, state["param_groups"]):
        distinctive = ("betas", "momentum", "alpha", "rho")  # present in some optimisers only
        if any((name in now) != (name in before) for name in distinctive):
            kind = type(optimizer).__name__
            raise UserError(f"{what}: optim_wrapper.optimizer.type={kind}: its run used a different optimiser; {hint}")
        for name, key in (("lr", "initial_lr"), ("weight_decay", "weight_decay")):
            if key in now and key in before and now[key] != before[key]:
                raise UserError(
                    f"{what}: its run has optim_wrapper.optimizer.{name}={before[key]:g}, not {now[key]:g}; {hint}"
                )
