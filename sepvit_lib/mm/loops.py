"""Training and validation loops of a run that can stop and resume at any iteration."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import BaseLoop, autocast
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepvit_lib.common.errors import Preempted, UserError
from sepvit_lib.common.processes import broadcast, get_rank, get_world_size
from sepvit_lib.common.progress import Progress
from sepvit_lib.common.randomness import Stream, seed_everything
from sepvit_lib.mm.seeded_samples import SeededBatches, seeded_loader
from sepvit_lib.run.monitor import StepMonitor
from sepvit_lib.run.state import RunState, buffers_of, poisoned, settle_buffers
from sepvit_lib.run.watchdog import Watchdog

# mmengine's values that log.txt omits: times and memory, which differ between equal runs, and the position, which each
# line states already.
TIMES = {"time", "data_time", "memory", "eta", "epoch", "iter", "step"}


@dataclass
class DenseState(RunState):
    """State of a run of segmentation or detection, in addition to mmengine's own state. A step is an iteration.

    Attributes:
        epoch: epochs done; 0 in iteration-based runs.
        epoch_step: iterations done in the current epoch; 0 in iteration-based runs.
        validated: whether the validation due at this position, if any, is done.
        best: best score of the validations so far, None before the first.
    """

    epoch: int = 0
    epoch_step: int = 0
    validated: bool = True
    best: float | None = None

    def position(self) -> dict[str, int]:
        """Position in the run, as named in log.txt."""
        position = dict(epoch=self.epoch, step=self.epoch_step) if self.epoch or self.epoch_step else {}
        return position | dict(iter=self.global_step)

    def covers(self, entry: dict[str, Any]) -> bool:
        """Whether a line of log.txt was written at or before this position. At the start of a run, always False."""
        is_validation = any(name.startswith("test_") for name in entry)
        before = "iter" not in entry or (entry["iter"], is_validation) <= (self.global_step, self.validated)
        return self.global_step > 0 and before

    def checkpoint(self) -> dict[str, Any]:
        """The state as saved in checkpoints."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "DenseState":
        """Read the state from a checkpoint of this code or of mmengine. Entries unknown to this version are ignored."""
        if "run" in checkpoint:
            return cls(**{name: value for name, value in checkpoint["run"].items() if name in cls.__dataclass_fields__})
        return cls(global_step=checkpoint["meta"]["iter"], epoch=checkpoint["meta"]["epoch"])


# ----------------------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------------------


class SkippingOptimWrapper(OptimWrapper):
    """mmengine's optimiser wrapper, extended to skip a step if the loss or the gradients are not finite.

    A non-finite loss makes all gradients NaN on all ranks, so that all ranks skip the step.

    Attributes:
        finite: whether the last loss is finite, a boolean scalar on the device.
        bad_gradients: whether the gradients of the last step were not finite, also a boolean scalar.
        steps: optimiser steps taken or skipped.
        before_backward: function to call before each backward pass. During the pass, ranks may wait for each other.
        scales_loss: whether a gradient scaler steps the optimiser. It skips non-finite gradients itself.
    """

    finite: Tensor
    bad_gradients: Tensor
    steps = 0
    before_backward: Callable[[], None] = staticmethod(lambda: None)
    scales_loss = False

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Accumulate the gradients of a loss."""
        self.before_backward()
        self.finite = loss.detach().isfinite()
        super().backward(poisoned(loss, self.finite), **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Take a step, or skip it."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.bad_gradients = ~nn.utils.get_total_norm(gradients).isfinite()
        self.steps += 1
        if self.scales_loss or not self.bad_gradients:
            super().step(**kwargs)


class SkippingAmpOptimWrapper(SkippingOptimWrapper, AmpOptimWrapper):
    """`SkippingOptimWrapper` in mixed precision."""

    scales_loss = True


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Length of a run, and when it validates and saves.

    Attributes:
        by_epoch: whether the length and the intervals are in epochs; otherwise, in iterations.
        length: epochs or iterations of the run.
        val_begin: first epoch or iteration after which to validate.
        val_intervals: pairs (start, interval): from epoch or iteration `start` on, validate every `interval`.
        save_interval: interval between checkpoints, -1 for none.
        log_interval: iterations between two lines of the log.
    """

    by_epoch: bool
    length: int
    val_begin: int
    val_intervals: tuple[tuple[int, int], ...]
    save_interval: int
    log_interval: int

    def validates(self, done: int) -> bool:
        """Whether validation is due after `done` epochs or iterations."""
        interval = [interval for begin, interval in self.val_intervals if begin <= done + 1][-1]
        return done >= self.val_begin and (done % interval == 0 or done == self.length)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` epochs or iterations."""
        return done == self.length or (self.save_interval > 0 and done % self.save_interval == 0)


class TrainLoop(BaseLoop):
    """Train by epochs or by iterations, as mmengine's loops do, starting at any iteration.

    Random numbers are derived from the seed and the iteration.

    Args:
        runner: the `TrainingRunner`.
        dataloader: config of the training loader.

    Attributes:
        state: state of the run. Resuming replaces it.
        monitor: reacts to non-finite losses, unreadable images and stop requests, and saves checkpoints.
        stop_training: set by mmengine's EarlyStoppingHook.
    """

    def __init__(self, runner: Any, dataloader: dict[str, Any]) -> None:
        super().__init__(runner, dataloader)
        self.schedule: Schedule = runner.run.schedule
        self.dataloader: Any  # mmengine's loader, until it is replaced below
        self.batches = SeededBatches(self.dataloader, is_endless=not self.schedule.by_epoch)
        self.dataloader = seeded_loader(self.dataloader, self.batches, runner.seed)
        accumulated = runner.cfg.optim_wrapper.get("accumulative_counts", 1)
        if self.schedule.by_epoch and len(self.dataloader) % accumulated:
            problem = f"does not divide the {len(self.dataloader)} batches of an epoch"
            way_out = "choose a divisor of that number, or a different train_dataloader.batch_size"
            raise UserError(f"optim_wrapper.accumulative_counts={accumulated}: {problem}; {way_out}")
        self.monitor: StepMonitor = runner.make_monitor(len(self.dataloader.dataset))
        self.state = DenseState()
        self.stop_training = False
        runner.visualizer.dataset_meta = getattr(self.dataloader.dataset, "metainfo", None)

    # Properties that mmengine's hooks and log read.

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.state.epoch

    @property
    def iter(self) -> int:
        """Iterations done."""
        return self.state.global_step

    @property
    def max_epochs(self) -> int:
        """Epochs of the run; 1 in iteration-based runs."""
        return self.schedule.length if self.schedule.by_epoch else 1

    @property
    def max_iters(self) -> int:
        """Iterations of the run."""
        return self.schedule.length * (len(self.dataloader) if self.schedule.by_epoch else 1)

    @property
    def done(self) -> int:
        """Epochs or iterations done, whichever the schedule counts."""
        return self.state.epoch if self.schedule.by_epoch else self.state.global_step

    def run(self) -> nn.Module:
        """Train to the end.

        Raises:
            UserError: too many bad steps in a row, or too many unreadable images.
            Preempted: the run was asked to stop, and its step is complete.
        """
        self.runner.call_hook("before_train")
        self.state.searches_scale = self.runner.searches_scale  # type: ignore[method-assign]
        self.buffers = buffers_of(self.runner.model)
        self._is_settled = get_world_size() == 1
        self.validate()
        batches: Iterator[Any] | None = None
        while self.done < self.schedule.length and not self.stop_training:
            if batches is None:
                self.runner.call_hook("before_train_epoch")
                batches = self._batches()
            self.train_until_validation(batches)
            if self.schedule.by_epoch:
                batches = None
            self.validate()
        if batches is not None:  # an iteration-based run is one epoch for mmengine's hooks
            self.runner.call_hook("after_train_epoch")
        is_validated = self.runner.val_loop is not None and self.schedule.validates(self.done)
        if not is_validated and 0 < self.state.bad_in_row < self.state.global_step:
            self.monitor.save()  # the last checkpoint: skipped steps had postponed it
        self.runner.call_hook("after_train")
        return self.runner.model

    def _batches(self) -> Iterator[Any]:
        """Batches from the current step on: to the end of the epoch, or without end in iteration-based runs."""
        first = self.state.epoch_step if self.schedule.by_epoch else self.state.global_step
        self.batches.start_at(self.state.epoch, first)
        total = len(self.dataloader) if self.schedule.by_epoch else self.schedule.length
        title = f"epoch {self.state.epoch + 1}" if self.schedule.by_epoch else "iterations"
        self.progress = Progress(self.dataloader, title, self.schedule.log_interval, total, first)
        return iter(self.progress)

    def train_until_validation(self, batches: Iterator[Any]) -> None:
        """Train on the rest of an epoch, or on the iterations up to the next validation."""
        self.monitor.watchdog.sync_point()
        self.runner.model.train()
        for batch in batches:  # read to the end of the epoch, where mmdet's batch sampler empties its buckets
            self.step(*batch)
            is_over = not self.schedule.by_epoch and (not self.state.validated or self.done >= self.schedule.length)
            if is_over or self.stop_training:
                break

    def step(self, data: Any, unreadable: list[str]) -> None:
        """Do one iteration.

        Args:
            data: a batch of mmengine's data loader.
            unreadable: names of the unreadable images that were replaced in the batch.
        """
        state, watchdog, optim_wrapper = self.state, self.monitor.watchdog, self.runner.optim_wrapper
        self.monitor.preemption.has_progress = True
        position = ", ".join(f"{name} {number}" for name, number in state.position().items())
        watchdog.tick(position)
        if not self._is_settled:
            self._settle(data)
        index = state.epoch_step if self.schedule.by_epoch else state.global_step
        seed_everything(Stream.STEP, self.runner.seed, state.global_step, get_rank())
        self.runner.call_hook("before_train_iter", batch_idx=index, data_batch=data)
        steps = optim_wrapper.steps
        optim_wrapper.before_backward = partial(watchdog.tick, f"{position}, backward")
        outputs = self.runner.model.train_step(data, optim_wrapper=optim_wrapper)
        has_stepped = optim_wrapper.steps > steps
        if has_stepped:
            settle_buffers(self.buffers, optim_wrapper.bad_gradients)
        self.runner.call_hook("after_train_iter", batch_idx=index, data_batch=data, outputs=outputs)
        self.monitor.see_batch(optim_wrapper.finite, {}, unreadable)
        self._advance()
        if (index + 1) % self.schedule.log_interval == 0 or self.done >= self.schedule.length:
            self._log(index)
        if has_stepped:  # otherwise, gradients are accumulating, and checkpoints do not contain them
            is_due = (state.epoch_step == 0 and self.schedule.saves(self.done)) or not state.validated
            self.monitor.after_step(state, optim_wrapper.bad_gradients, is_due)

    def _advance(self) -> None:
        """Count an iteration. After an epoch's last iteration, end the epoch."""
        state = self.state
        state.global_step += 1
        state.epoch_step += self.schedule.by_epoch
        if self.schedule.by_epoch and state.epoch_step == len(self.dataloader):
            self.runner.call_hook("after_train_epoch")
            state.epoch, state.epoch_step = state.epoch + 1, 0
        has_validation = self.runner.val_loop is not None
        state.validated = not (has_validation and state.epoch_step == 0 and self.schedule.validates(self.done))

    def _log(self, index: int) -> None:
        """Write the latest metrics to log.txt and the progress bar."""
        figures, _ = self.runner.log_processor.get_log_after_iter(self.runner, index, "train")
        figures = {name: value for name, value in figures.items() if name not in TIMES}
        self.runner.output.log({**self.state.position(), **{f"train_{name}": value for name, value in figures.items()}})
        self.progress.done = index + 1
        if self.progress.bar is not None:
            self.progress.bar.set_postfix_str(f"loss {figures['loss']:.4f}, lr {figures['lr']:.2e}")

    def _settle(self, data: Any) -> None:
        """Run a backward pass and discard its gradients.

        After its first backward pass, DistributedDataParallel rebuilds its gradient buckets. This changes the order of
        additions in the all-reduce, and so the last bits of the gradients. Thanks to the extra pass, a resumed run adds
        in the same order as an uninterrupted one.
        """
        model, optim_wrapper = self.runner.model, self.runner.optim_wrapper
        if is_model_wrapper(model):
            is_mixed = isinstance(optim_wrapper, AmpOptimWrapper)
            with autocast(dtype=optim_wrapper.cast_dtype) if is_mixed else nullcontext():
                inputs = model.module.data_preprocessor(deepcopy(data), True)
                losses = model(**inputs, mode="loss")
            model.module.parse_losses(losses)[0].backward()
            optim_wrapper.zero_grad()
            settle_buffers(self.buffers, torch.ones((), dtype=torch.bool, device=self.monitor.flags.device))
        self._is_settled = True

    def validate(self) -> None:
        """Validate if a validation is due at this position and not done yet."""
        if self.state.validated:
            return
        if self.runner.val_loop is None:  # resumed with --no-validate
            self.state.validated = True
            self.monitor.save()
            return
        self.monitor.watchdog.sync_point()
        broadcast_buffers(self.runner.model)
        try:
            metrics = self.runner.val_loop.run()
        except Preempted:
            for hook in (hook for hook in self.runner.hooks if isinstance(hook, EMAHook)):
                hook.after_val_epoch(self.runner)  # restores the model's own weights, which the checkpoint needs
            raise
        finally:
            self.monitor.watchdog.is_evaluating = False
        self.state.validated = True
        self.runner.after_validation(metrics)


# ----------------------------------------------------------------------------------------------------------------------
# Validation
# ----------------------------------------------------------------------------------------------------------------------


class WatchedBatches:
    """Validation batches. If the run is asked to stop, they end early on all ranks.

    Args:
        loader: the batches.
        watchdog: notified of progress.
        device: the process's device.
    """

    def __init__(self, loader: DataLoader, watchdog: Watchdog, device: torch.device) -> None:
        self.loader = loader
        self.watchdog = watchdog
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from self.watchdog.validation_batches(self.loader, "validation", self.device)
        self.watchdog.is_evaluating = True


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's running statistics: checkpoints contain those of rank 0. A collective call."""
    for buffer in model.buffers():
        broadcast(buffer)


def is_better(score: float, best: float | None, is_loss: bool) -> bool:
    """Whether a validation's score is the best so far.

    Args:
        score: the score.
        best: best score so far, None before the first.
        is_loss: whether lower is better.
    """
    return math.isfinite(score) and (best is None or (score < best if is_loss else score > best))
