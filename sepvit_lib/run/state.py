"""State of a training run: the network, its optimiser, and the contents of a checkpoint."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.processes import all_reduce, get_rank, get_world_size

DIVERGENCE_ADVICE = f"a lower {setting('lr')}, or {setting('amp', 'off')}"  # advice if main.py's training diverges


@dataclass(frozen=True)
class Precision:
    """Device and number format of the network's computations.

    Attributes:
        device: the process's device.
        dtype: bfloat16 or float16 for autocast, None for float32.
        memory_format: memory format of the images.
    """

    device: torch.device
    dtype: torch.dtype | None
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def of(cls, device: torch.device, amp: str, **kwargs: Any) -> "Precision":
        """Choose the number format.

        Args:
            device: the device.
            amp: 'bfloat16', 'float16', 'off', or 'auto': on CUDA bfloat16, or float16 if the GPU lacks bfloat16;
                elsewhere float32.
            **kwargs: other attributes.
        """
        if amp == "auto":
            amp = "off"
            if device.type == "cuda":
                amp = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return cls(device, None if amp == "off" else getattr(torch, amp), **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for the network's forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def images(self, images: Tensor) -> Tensor:
        """Copy images, B × C × H × W, to the device, in the memory format."""
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler for float16. For other formats, it is disabled and does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


@dataclass(kw_only=True)
class RunState:
    """Progress and events of a run, common to all kinds of training.

    Attributes:
        global_step: optimiser steps done in the run.
        bad_steps: steps skipped so far because of a non-finite loss or gradients.
        bad_in_row: number of consecutive steps skipped up to now.
        unreadable_images: names of unreadable training images.
    """

    global_step: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0
    unreadable_images: list[str] = field(default_factory=list)

    def position(self) -> dict[str, int]:
        """Position in the run, with the field names of log.txt."""
        raise NotImplementedError

    def covers(self, entry: dict[str, Any]) -> bool:
        """Whether a line of log.txt comes before the current position. At the start of a run, no line does."""
        raise NotImplementedError

    def searches_scale(self) -> bool:
        """Whether float16 may be searching for its loss scale, so that steps with infinite gradients are normal."""
        return False


@dataclass
class Training(RunState):
    """A training run: everything that changes from step to step.

    Attributes:
        model: the network.
        wrapped: module that the training loop calls: `model`, its classifier (on precomputed features), or the
            trainable module of a distillation task; on several processes, in DistributedDataParallel.
        optimizer: the network's optimiser.
        lr_scheduler: learning-rate schedule, stepped once an epoch.
        scaler: gradient scaler.
        ema: averaged weights, or None.
        projection: layer that is trained with the network, but is not part of it; or None.
        epoch: the current epoch.
        epoch_step: steps done in the epoch.
        best_accuracy: highest top-1 so far (%).
        best_value: highest value of the watched metric so far (the lowest loss, negated).
        best_epoch: its epoch, -1 for none.
        losses: sum of this rank's finite losses in the epoch, and their number.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    projection: nn.Module | None = None
    epoch: int = 0
    epoch_step: int = 0
    best_accuracy: float = 0.0
    best_value: float = -math.inf
    best_epoch: int = -1
    losses: Tensor = field(default_factory=lambda: torch.zeros(2))

    def position(self) -> dict[str, int]:
        """Position in the run, with the field names of log.txt."""
        return dict(epoch=self.epoch, step=self.epoch_step)

    def covers(self, entry: dict[str, Any]) -> bool:
        """Whether a line of log.txt comes before the current position. At the start of a run, no line does."""
        now = (self.epoch, self.epoch_step)
        # An epoch's line comes after all its steps.
        return now != (0, 0) and ("epoch" not in entry or (entry["epoch"], entry.get("step", math.inf)) <= now)

    def searches_scale(self) -> bool:
        """Whether float16 may be searching for its loss scale, as long as the scale is at least 1."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    # ------------------------------------------------------------------------------------------------------------------
    # Steps
    # ------------------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, share: int) -> Tensor:
        """Accumulate a batch's gradients, and add its loss to the epoch's sum.

        A non-finite loss makes all gradients NaN on all ranks, so that all ranks skip the step.

        Args:
            loss: the batch's loss, a scalar.
            share: number of batches in the step, by which the loss is divided.

        Returns:
            whether the loss is finite, a boolean scalar on the device.
        """
        finite = loss.detach().isfinite()
        self.scaler.scale(poisoned(loss, finite) / share).backward()
        self.losses += torch.stack([torch.where(finite, loss.detach(), 0.0), finite]).to(self.losses)
        return finite

    def step(self, clip_grad: float, buffers: list[tuple[Tensor, Tensor]], clip_mode: str = "norm") -> Tensor:
        """Take one optimiser step, or skip it if the gradients are not finite.

        Args:
            clip_grad: bound of the gradients, 0 for none.
            buffers: the network's buffers, each with a copy of its values before the step. A skipped step restores
                them.
            clip_mode: 'norm', 'value' or 'agc', as for timm's `dispatch_clip_grad`.

        Returns:
            whether the gradients were not finite, a boolean scalar on the device.
        """
        self.scaler.unscale_(self.optimizer)
        if clip_grad > 0 and clip_mode == "norm":
            norm = nn.utils.clip_grad_norm_(self.wrapped.parameters(), clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.wrapped.parameters() if p.grad is not None])
            if clip_grad > 0:
                dispatch_clip_grad(self.wrapped.parameters(), clip_grad, clip_mode)
        bad = ~norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        elif reads_found_inf(self.optimizer):
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad:
            self.optimizer.step()
        settle_buffers(buffers, bad)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.global_step += 1
        self.epoch_step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step)
        return bad

    def mean_loss(self) -> float:
        """Mean loss of all ranks in the current epoch, over the batches with a finite loss. A collective call."""
        total, batches = all_reduce(self.losses.clone()).tolist()
        return total / batches if batches else math.nan

    def see_value(self, value: float) -> bool:
        """See the epoch's value of the watched metric. Returns whether it is the best so far."""
        if not value > self.best_value:
            return False
        self.best_value, self.best_epoch = value, self.epoch
        return True

    def has_stalled(self, patience: int) -> bool:
        """Whether the last `patience` epochs have not improved the watched metric; False if `patience` is 0."""
        return 0 < patience < self.epoch - self.best_epoch

    def end_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch += 1
        self.epoch_step = 0
        self.losses = torch.zeros_like(self.losses)

    def check_finite(self) -> None:
        """Refuse non-finite weights, which are neither saved nor validated.

        Raises:
            UserError: the weights are not finite.
        """
        check_finite(self.model, self, DIVERGENCE_ADVICE)

    # ------------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ------------------------------------------------------------------------------------------------------------------

    def checkpoint(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue as if it had never stopped. A collective call.

        Random numbers have no state: they follow from the seed and the position in the run (`randomness.Stream`).
        """
        losses = [self.losses]
        if get_world_size() > 1:
            losses = [torch.zeros_like(self.losses) for _ in range(get_world_size())]
            dist.all_gather(losses, self.losses)
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.schedule_state(),
            epoch=self.epoch - 1,  # the last complete epoch, as in the published checkpoints
            epoch_step=self.epoch_step,
            scaler=self.scaler.state_dict(),
            best_accuracy=self.best_accuracy,
            best_value=self.best_value,
            best_epoch=self.best_epoch,
            steps=self.global_step,
            losses=losses,
            bad_steps=self.bad_steps,
            bad_in_row=self.bad_in_row,
            unreadable=list(self.unreadable_images),
        )
        if self.ema is not None:
            checkpoint["model_ema"] = self.ema.module.state_dict()
        if self.projection is not None:
            checkpoint["projection"] = self.projection.state_dict()
        return checkpoint

    def schedule_state(self) -> dict[str, Any]:
        """State of the schedule. Adds the state of the plateau schedule, which timm's `state_dict` lacks."""
        state = dict(self.lr_scheduler.state_dict())
        if isinstance(self.lr_scheduler, PlateauLRScheduler):
            state |= dict(plateau=self.lr_scheduler.lr_scheduler.state_dict(), restore_lr=self.lr_scheduler.restore_lr)
        return state

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Load the state that `schedule_state` returned."""
        self.lr_scheduler.load_state_dict(state)
        if isinstance(self.lr_scheduler, PlateauLRScheduler) and "plateau" in state:
            self.lr_scheduler.lr_scheduler.load_state_dict(state["plateau"])
            self.lr_scheduler.restore_lr = state["restore_lr"]

    def restore_progress(self, checkpoint: dict[str, Any]) -> None:
        """Restore epoch, step, counters and the projection from a checkpoint."""
        if self.projection is not None:
            self.projection.load_state_dict(checkpoint["projection"])
        self.epoch = checkpoint["epoch"] + 1
        self.epoch_step = checkpoint.get("epoch_step", 0)
        self.best_accuracy = checkpoint.get("best_accuracy", 0.0)
        self.best_value = checkpoint.get("best_value", self.best_accuracy)
        self.best_epoch = checkpoint.get("best_epoch", self.epoch - 1)
        self.global_step = checkpoint.get("steps", 0)
        self.bad_steps = checkpoint.get("bad_steps", 0)
        self.bad_in_row = checkpoint.get("bad_in_row", 0)
        self.unreadable_images = list(checkpoint.get("unreadable", []))
        if self.epoch_step:
            parts = checkpoint["losses"]
            if len(parts) == get_world_size():
                own = parts[get_rank()]
            else:  # if the number of ranks has changed, rank 0 takes the sum
                own = torch.stack(parts).sum(0) * (get_rank() == 0)
            self.losses = own.to(self.losses.device)


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser reads `found_inf` on the device, and skips the step if it is set, as fused optimisers do.

    torch's own GradScaler (torch 2.x) checks the same attribute, `_step_supports_amp_scaling`.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def poisoned(loss: Tensor, finite: Tensor) -> Tensor:
    """Return the loss, or NaN if it is not finite. NaN gradients then make all ranks skip the step.

    Args:
        loss: the loss, a scalar.
        finite: whether the loss is finite, a boolean scalar.
    """
    return loss * torch.where(finite, 1.0, math.nan)


def buffers_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a network's buffers, such as running statistics, and copies of their values."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def settle_buffers(buffers: list[tuple[Tensor, Tensor]], bad: Tensor) -> None:
    """Restore a network's buffers if the step was skipped; otherwise, keep their new values.

    Args:
        buffers: each buffer with a copy of its values before the step. The copies are updated.
        bad: whether the step was skipped, a boolean scalar on the device.
    """
    for buffer, before in buffers:
        before.copy_(buffer.copy_(torch.where(bad, before, buffer)))


def check_finite(model: nn.Module, state: RunState, advice: str) -> None:
    """Refuse non-finite weights, which are neither saved nor validated.

    Args:
        model: the network.
        state: the run's state.
        advice: what may help, for the message.

    Raises:
        UserError: the weights are not finite.
    """
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()])
    if not finite.all():
        position = ", ".join(f"{name} {number}" for name, number in state.position().items())
        raise UserError(
            f"{position}: the weights are no longer finite and are not saved; resume from the last checkpoint "
            f"with {advice}"
        )
