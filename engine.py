"""The loops: one epoch of training, evaluation, throughput; and the loss of knowledge distillation."""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils import Progress, UserError, get_world_size, print_main, sum_over_processes


@dataclass
class Precision:
    """Where and in what number format the network computes.

    Attributes:
        device: the process's device.
        dtype: bfloat16 or float16 for autocast, None for float32.
        memory_format: of the images.
    """

    device: torch.device
    dtype: torch.dtype | None
    memory_format: torch.memory_format = torch.contiguous_format

    def autocast(self) -> Any:
        """Context in which the network runs."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def images(self, images: Tensor) -> Tensor:
        """Images on the device, in the memory format."""
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def scaler(self) -> torch.amp.GradScaler:
        """Gradient scaling, which float16 alone needs; it passes everything through otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


@dataclass
class Training:
    """A training run: what changes with its steps, and what a checkpoint holds.

    Attributes:
        model: the network itself.
        wrapped: the network as the loop calls it (data parallel on several processes).
        optimizer: its optimiser.
        lr_scheduler: learning-rate schedule, stepped once an epoch.
        scaler: of the gradients.
        ema: averaged weights, or None.
        best_accuracy: highest top-1 so far (%).
        steps: optimiser steps taken.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    best_accuracy: float = 0.0
    steps: int = 0

    def checkpoint(self, epoch: int, args: argparse.Namespace) -> dict[str, Any]:
        """Everything it takes to go on behind `epoch`."""
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler.state_dict(),
            epoch=epoch,
            scaler=self.scaler.state_dict(),
            args=vars(args),
            best_accuracy=self.best_accuracy,
            steps=self.steps,
        )
        if self.ema is not None:
            checkpoint["model_ema"] = self.ema.module.state_dict()
        return checkpoint


class DistillationLoss(nn.Module):
    """Loss on the labels and, for the same outputs, on a teacher's (Touvron et al., https://arxiv.org/abs/2012.12877).

    Args:
        base: loss on the labels.
        teacher: the teacher, or None without distillation.
        kind: 'none', 'soft' (divergence from the teacher's distribution) or 'hard' (cross entropy with its decisions).
        alpha: share of the teacher's part.
        tau: temperature of the soft distributions.
    """

    def __init__(
        self,
        base: nn.Module,
        teacher: nn.Module | None = None,
        kind: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """Images, B × C × H × W, the student's logits, B × classes, and targets, to the loss."""
        loss = self.base(outputs, targets)
        if self.kind == "none":
            return loss
        with torch.no_grad():
            teacher_outputs = self.teacher(images)
        if self.kind == "hard":
            distillation = F.cross_entropy(outputs, teacher_outputs.argmax(dim=1))
        else:
            student, teacher = (F.log_softmax(logits / self.tau, dim=1) for logits in (outputs, teacher_outputs))
            distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / outputs.numel()
        return loss * (1 - self.alpha) + distillation * self.alpha


def train_one_epoch(
    training: Training,
    loader: DataLoader,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    precision: Precision,
    epoch: int,
    args: argparse.Namespace,
    mixup: Mixup | None = None,
) -> dict[str, float]:
    """Train for one epoch.

    The loop never waits for the device but at every `--print-freq`-th batch, where the mean loss is read.

    Returns:
        mean loss and the epoch's learning rate.

    Raises:
        UserError: the loss is not finite.
    """
    training.wrapped.train()
    loss_sum = torch.zeros((), device=precision.device)
    lr = training.optimizer.param_groups[0]["lr"]
    progress = Progress(loader, f"epoch {epoch}", args.print_freq, later=args.epochs - epoch - 1)
    for (images, targets), share, is_last in _accumulated(progress, args.accum_steps, len(loader)):
        images, targets = precision.images(images), targets.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        with nullcontext() if is_last else _without_gradient_exchange(training.wrapped):
            with precision.autocast():
                loss = criterion(images, training.wrapped(images), targets)
            training.scaler.scale(loss / share).backward()
        loss_sum += loss.detach()
        if is_last:
            _step(training, args.clip_grad)
        if progress.advance(len(images) * get_world_size()):
            progress.report(loss=f"{_mean_loss(loss_sum, progress.done, epoch):.4f}", lr=f"{lr:.6f}")
    if progress.done == 0:
        raise UserError(f"--data-path {args.data_path}: no training image could be read")
    return {"loss": _mean_loss(loss_sum, progress.done, epoch), "lr": lr}


def _mean_loss(loss_sum: Tensor, batches: int, epoch: int) -> float:
    """Mean loss of all processes: they all see the same number, and end together where it is none."""
    mean = sum_over_processes(loss_sum.clone()).item() / (batches * get_world_size())
    if not math.isfinite(mean):
        raise UserError(f"epoch {epoch}: the loss is {mean}; try a lower --lr, or --amp off")
    return mean


def _accumulated(batches: Iterable[Any], accum_steps: int, total: int) -> Iterator[tuple[Any, int, bool]]:
    """Each batch with the number of batches whose gradients its step adds up, and whether it is their last."""
    for index, batch in enumerate(batches):
        first = index // accum_steps * accum_steps
        share = min(accum_steps, total - first)  # the epoch's last step has what is left
        yield batch, share, index == first + share - 1


def _without_gradient_exchange(model: nn.Module) -> Any:
    """Context for all backward passes of a step but its last: gradients add up without the other processes'."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def _step(training: Training, clip_grad: float) -> None:
    """One step of the optimiser, with the gradients' norm clipped at `clip_grad` (0: not)."""
    if clip_grad > 0:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), clip_grad)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    training.steps += 1
    if training.ema is not None:
        training.ema.update(training.model, step=training.steps)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, precision: Precision, title: str, args: argparse.Namespace
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy (%) on the validation images.

    With `--dist-eval` the processes' counts are added up: every image counts once, whatever their number.
    """
    model.eval()
    kind = torch.float32 if precision.device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, dtype=kind, device=precision.device)  # loss, top-1, top-5
    count = 0
    progress = Progress(loader, title, args.print_freq)
    for images, targets in progress:
        images, targets = precision.images(images), targets.to(precision.device, non_blocking=True)
        with precision.autocast():
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), targets, reduction="sum")
        ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        sums += torch.stack([loss.to(kind), ranked[:, 0].sum(), ranked.sum()])
        count += len(images)
        if progress.advance(len(images) * (get_world_size() if args.dist_eval else 1)):
            progress.report()
    totals = torch.cat([sums, sums.new_tensor([count])])
    loss, acc1, acc5, count = (sum_over_processes(totals) if args.dist_eval else totals).tolist()
    if count == 0:
        raise UserError(f"--data-path {args.data_path}: no validation image could be read")
    stats = {"loss": loss / count, "acc1": 100 * acc1 / count, "acc5": 100 * acc5 / count}
    print_main(f"{title}: top-1 {stats['acc1']:.3f} %, top-5 {stats['acc5']:.3f} %, loss {stats['loss']:.4f}, "
               f"{int(count)} images")  # fmt: skip
    return stats


@torch.no_grad()
def measure_throughput(model: nn.Module, loader: DataLoader, precision: Precision) -> float:
    """Images a second of the forward pass on the first validation batch: 50 passes to warm up, 30 timed."""
    model.eval()
    images = precision.images(next(iter(loader))[0])

    def run(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            with precision.autocast():
                model(images)
        if precision.device.type != "cpu":
            getattr(torch, precision.device.type).synchronize()
        return time.perf_counter() - start

    run(50)
    throughput = 30 * len(images) / run(30)
    print_main(f"batch size {len(images)}: {throughput:.1f} images/s")
    return throughput
