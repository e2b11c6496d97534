"""The loops: one epoch of training, evaluation, throughput; and the loss of knowledge distillation."""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import epoch_batches
from faults import Agreement, Facts, Watch, gathered, together
from training.samples import NAMES_END
from utils import (
    Preempted,
    Progress,
    Stream,
    UserError,
    get_rank,
    get_world_size,
    of_main_process,
    print_line,
    print_main,
    seed_everything,
    sum_over_processes,
    write_file,
)

UNREADABLE_SHARE = 0.001  # of the training images that may be skipped


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
        steps: optimiser steps so far.
        epoch: the running epoch.
        step: steps of it that are done.
        losses: of the running epoch in this process, the sum of the batches' losses and the batches in it.
        bad_steps: steps left out so far, because something in them was not finite.
        bad_in_row: the last steps, if they were left out.
        unreadable: training images that could not be read.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    steps: int = 0
    best_accuracy: float = 0.0
    losses: Tensor = field(default_factory=lambda: torch.zeros(2))
    bad_steps: int = 0
    bad_in_row: int = 0
    unreadable: list[str] = field(default_factory=list)

    def checkpoint(self) -> dict[str, Any]:
        """Everything it takes to go on as if nothing had happened; all processes have to ask for it together.

        Random numbers need no state: they follow from the seed and the place in the run (`utils.Stream`).
        """
        losses = [self.losses]
        if get_world_size() > 1:
            losses = [torch.zeros_like(self.losses) for _ in range(get_world_size())]
            dist.all_gather(losses, self.losses)
        checkpoint = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.schedule_state(),
            epoch=self.epoch - 1,  # the last whole one, as in the published checkpoints
            epoch_step=self.step,
            scaler=self.scaler.state_dict(),
            best_accuracy=self.best_accuracy,
            steps=self.steps,
            losses=losses,
            bad_steps=self.bad_steps,
            bad_in_row=self.bad_in_row,
            unreadable=list(self.unreadable),
        )
        if self.ema is not None:
            checkpoint["model_ema"] = self.ema.module.state_dict()
        return checkpoint

    def schedule_state(self) -> dict[str, Any]:
        """State of the schedule, with that of timm's plateau schedule, the one with a memory, which leaves it out."""
        state = self.lr_scheduler.state_dict()
        if isinstance(self.lr_scheduler, PlateauLRScheduler):
            state |= dict(plateau=self.lr_scheduler.lr_scheduler.state_dict(), restore_lr=self.lr_scheduler.restore_lr)
        return state

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Load what `schedule_state` gave."""
        self.lr_scheduler.load_state_dict(state)
        if "plateau" in state:
            self.lr_scheduler.lr_scheduler.load_state_dict(state["plateau"])
            self.lr_scheduler.restore_lr = state["restore_lr"]

    def restore_progress(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint how far the run is."""
        self.epoch = checkpoint["epoch"] + 1
        self.step = checkpoint.get("epoch_step", 0)
        self.best_accuracy = checkpoint.get("best_accuracy", 0.0)
        self.steps = checkpoint.get("steps", 0)
        self.bad_steps = checkpoint.get("bad_steps", 0)
        self.bad_in_row = checkpoint.get("bad_in_row", 0)
        self.unreadable = list(checkpoint.get("unreadable", []))
        if self.step:
            parts = checkpoint["losses"]
            if len(parts) == get_world_size():
                own = parts[get_rank()]
            else:  # other processes than before: the first one has what they had
                own = torch.stack(parts).sum(0) * (get_rank() == 0)
            self.losses = own.to(self.losses.device)

    def check_finite(self) -> None:
        """Refuse weights that are not finite: they are neither saved nor validated.

        Raises:
            UserError: the last step made them so.
        """
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()])
        if not finite.all():
            raise UserError(f"epoch {self.epoch}, step {self.step}: weights are not finite any more, and not saved; "
                            "resume from the last checkpoint with a lower --lr, or with --amp off")  # fmt: skip

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.step = 0
        self.losses = torch.zeros_like(self.losses)


class Supervision:
    """Looks after a run while its steps are taken: what is not finite, what cannot be read, and signals to end.

    Args:
        args: the settings.
        watch: told that this process moves on; tells whether the run is to end.
        agreement: makes the processes act together.
        dataset_size: number of training images.
        folder: for batches that are kept to look into.
        log: takes what happened, a dict.
        save: saves a checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        watch: Watch,
        agreement: Agreement,
        dataset_size: int,
        folder: Path,
        log: Callable[[dict[str, Any]], None],
        save: Callable[[], None],
    ) -> None:
        self.args = args
        self.watch = watch
        self.preemption = watch.preemption
        self.agreement = agreement
        self.dataset_size = dataset_size
        self.folder = folder
        self.log = log
        self.save = save
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=agreement.device)
        self.bad_batch: dict[str, Any] | None = None
        self.unreadable: list[str] = []
        self.skipped = 0  # steps that changed nothing, the search for float16's loss scale included

    def see(self, finite: Tensor, images: Tensor, targets: Tensor, unreadable: Iterable[str]) -> None:
        """Note a batch: whether its loss is finite, what it was, and which images could not be read for it."""
        self.bad_loss |= ~finite
        self.unreadable += [name for names in unreadable if names for name in names.split(NAMES_END)]
        if self.args.dump_bad_batch and (self.bad_batch is None or not finite):
            self.bad_batch = dict(images=images, targets=targets)

    def after_step(self, training: Training, bad_gradients: Tensor, is_last: bool) -> None:
        """Let the processes know of a step, act on what is known of the one before, and save when it is time.

        Args:
            training: the run.
            bad_gradients: whether the gradients were not finite, a truth value on the device.
            is_last: whether it was the epoch's last step.

        Raises:
            UserError: too many steps in a row were not finite, or too many images cannot be read.
            Preempted: the run is to end.
        """
        every = self.args.checkpoint_every
        is_due = is_last or (bool(every) and training.steps % every == 0)  # the last: validation may fail
        self.agreement.post(dict(epoch=training.epoch, step=training.step), self.bad_loss, bad_gradients,
                            self.preemption.requested, bool(self.unreadable))  # fmt: skip
        known = list(self.agreement.known(to_the_last=is_due))
        is_preempted = any(facts.preempted for facts in known)
        if is_preempted:  # a checkpoint follows: it must not be ahead of what is known
            known += self.agreement.known(to_the_last=True)
        for facts in known:
            self._act(training, facts)
        self.bad_loss = torch.zeros_like(self.bad_loss)
        self.bad_batch = None
        if is_preempted:
            raise Preempted
        if is_due and not training.bad_in_row:
            self.save()

    def _act(self, training: Training, facts: Facts) -> None:
        """Draw the consequences of what happened in a step, on all processes alike."""
        # with float16, gradients that are not finite are how the loss scale is found, down to 1
        is_search = training.scaler.is_enabled() and facts.bad_gradients and training.scaler.get_scale() >= 1
        is_bad = facts.bad_loss or (facts.bad_gradients and not is_search)
        self.skipped += facts.bad_loss or facts.bad_gradients
        training.bad_in_row = training.bad_in_row + 1 if is_bad else 0
        if is_bad:
            training.bad_steps += 1
            what = "loss" if facts.bad_loss else "gradients"
            self.log({**facts.place, "not_finite": what, "in_row": training.bad_in_row})
            if self.bad_batch is not None:
                name = f"bad_batch-{training.steps:08}-process{get_rank()}.pth"
                self._keep_batch({**facts.place, **self.bad_batch}, self.folder / name)
        if facts.unreadable:
            for name in dict.fromkeys(gathered(self.unreadable)):
                if name not in training.unreadable:
                    training.unreadable.append(name)
                    self.log({**facts.place, "unreadable_image": name})
            self.unreadable.clear()
            self._check_unreadable(training.unreadable)
        if training.bad_in_row >= self.args.max_bad_steps:
            raise UserError(
                f"--max-bad-steps {self.args.max_bad_steps}: so many steps in a row were not finite and left out; "
                f"the checkpoints in {self.folder} are from before them; try a lower --lr, or --amp off"
            )

    def _keep_batch(self, batch: dict[str, Any], path: Path) -> None:
        try:
            write_file(path, lambda file: torch.save(batch, file))
        except OSError as error:
            print_line(f"WARNING: {path} could not be written ({error.strerror}); training goes on")

    def _check_unreadable(self, names: list[str]) -> None:
        """Refuse to go on with more images that cannot be read than the setting allows."""
        policy = self.args.on_bad_image
        allowed = max(1, int(UNREADABLE_SHARE * self.dataset_size)) if policy == "skip" else 0
        if len(names) > allowed:
            raise UserError(
                f"--on-bad-image {policy}: {len(names)} of {self.dataset_size} training images cannot be read, "
                f"{allowed} may be ({names[-1]}, …); {self.folder / 'log.txt'} has those met so far as unreadable_image"
            )


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
    args: argparse.Namespace,
    mixup: Mixup | None,
    supervision: Supervision,
) -> dict[str, float]:
    """Train from the running epoch's step to its end.

    The loop never waits for a GPU but at every `--print-freq`-th batch, where the mean loss is read; with
    `--dump-bad-batch`, and optimisers without a fused form, at every step.

    Returns:
        mean loss and the epoch's learning rate.

    Raises:
        UserError: too many steps in a row were not finite, or too many images cannot be read.
        Preempted: the run is to end; the step that was begun is done.
    """
    supervision.watch.start_round()
    first_step, skipped, bad_steps = training.step, supervision.skipped, training.bad_steps
    training.wrapped.train()
    buffers = [(buffer, buffer.clone()) for buffer in training.model.buffers()]  # running statistics, of other networks
    lr = training.optimizer.param_groups[0]["lr"]
    batches = epoch_batches(loader, training.epoch, training.step, args.accum_steps, supervision.watch.tick)
    done = min(training.step * args.accum_steps, len(loader))
    progress = Progress(batches, f"epoch {training.epoch}", args.print_freq, total=len(loader), done=done,
                        later=args.epochs - training.epoch - 1)  # fmt: skip
    for (images, targets, unreadable), share, number, is_last in _accumulated(progress, args.accum_steps):
        supervision.preemption.has_progress = True
        supervision.watch.tick(f"epoch {training.epoch}, step {training.step}")
        seed_everything(Stream.STEP, args.seed, training.epoch, number)
        images, targets = precision.images(images), targets.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        with nullcontext() if is_last else _without_gradient_exchange(training.wrapped):
            with precision.autocast():
                loss = criterion(images, training.wrapped(images), targets)
            supervision.watch.tick(f"epoch {training.epoch}, step {training.step}, backward")  # may wait for the others
            finite = _backward(training, loss, share)
        supervision.see(finite, images, targets, unreadable)
        if progress.advance(len(images) * get_world_size()):
            progress.report(loss=f"{_mean_loss(training):.4f}", lr=f"{lr:.6f}")
        if is_last:
            bad_gradients = _step(training, args.clip_grad, buffers)
            supervision.after_step(training, bad_gradients, progress.done == progress.total)
    if progress.done == 0:
        raise UserError(f"--data-path {args.data_path}: no training image could be read")
    all_skipped = first_step == 0 and supervision.skipped - skipped == training.step
    # an epoch of a few steps may pass with nothing but the search for a loss scale, but not the last one
    if all_skipped and (training.bad_steps > bad_steps or training.epoch == args.epochs - 1):
        raise UserError(f"epoch {training.epoch}: loss or gradients were not finite in any step, and all were skipped; "
                        "try a lower --lr, or --amp bfloat16 or off")  # fmt: skip
    training.check_finite()
    return {"loss": _mean_loss(training), "lr": lr}


def _backward(training: Training, loss: Tensor, share: int) -> Tensor:
    """Add a batch's gradients to those of its step's `share` batches, and its loss to the epoch's.

    A loss that is not finite makes all gradients so, on all processes: the step is left out everywhere.

    Returns:
        whether the loss is finite, a truth value on the device.
    """
    finite = loss.detach().isfinite()
    training.scaler.scale(loss * torch.where(finite, 1.0, math.nan) / share).backward()
    training.losses += torch.stack([torch.where(finite, loss.detach(), 0.0), finite]).to(training.losses)
    return finite


def _mean_loss(training: Training) -> float:
    """Mean loss of all processes in the running epoch, of the batches where it was finite."""
    total, batches = sum_over_processes(training.losses.clone()).tolist()
    return total / batches if batches else math.nan


def _accumulated(batches: Progress, accum_steps: int) -> Iterator[tuple[Any, int, int, bool]]:
    """Each batch with the number of batches whose gradients its step adds up, its own number among those of all
    processes in the epoch, and whether it is its step's last."""
    for index, batch in enumerate(batches, start=batches.done):
        first = index // accum_steps * accum_steps
        share = min(accum_steps, batches.total - first)  # data sets read in turn: the last step has what is left
        yield batch, share, index * get_world_size() + get_rank(), index == first + share - 1


def _without_gradient_exchange(model: nn.Module) -> Any:
    """Context for all backward passes of a step but its last: gradients add up without the other processes'."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def _step(training: Training, clip_grad: float, buffers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One step of the optimiser, with the gradients' norm clipped at `clip_grad` (0: not).

    Args:
        training: the run.
        clip_grad: largest norm.
        buffers: of the network, each with its values before the step, which it gets back where the step is left out.

    Returns:
        whether the gradients were not finite, a truth value on the device. The step was left out then.
    """
    optimizer, scaler = training.optimizer, training.scaler
    scaler.unscale_(optimizer)
    if clip_grad > 0:
        norm = nn.utils.clip_grad_norm_(training.model.parameters(), clip_grad)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])
    bad = ~norm.isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # the fused step reads it on the device
        optimizer.step()
    elif not bad:
        optimizer.step()
    for buffer, before in buffers:
        before.copy_(buffer.copy_(torch.where(bad, before, buffer)))
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    training.steps += 1
    training.step += 1
    if training.ema is not None:
        training.ema.update(training.model, step=training.steps)
    return bad


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    precision: Precision,
    title: str,
    args: argparse.Namespace,
    watch: Watch,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy (%) on the validation images.

    With `--dist-eval` the processes' counts are added up: every image counts once, whatever their number.

    Raises:
        UserError: there are no images.
        Preempted: the run is to end.
    """
    model.eval()
    for buffer in model.buffers():
        of_main_process(buffer)  # the one a checkpoint holds
    kind = torch.float32 if precision.device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, dtype=kind, device=precision.device)  # loss, top-1, top-5
    count = 0
    progress = Progress(loader, title, args.print_freq, len(loader))
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
        watch.tick(f"batch {progress.done} of {title}")
        watch.preemption.has_progress = True
        if watch.preemption.requested:
            break
    watch.start_round()
    if together(precision.device, watch.preemption.requested):
        raise Preempted(f"in {title}")
    totals = torch.cat([sums, sums.new_tensor([count])])
    # all act on the same figures, also where devices differ in the last bits of theirs
    loss, acc1, acc5, count = (sum_over_processes(totals) if args.dist_eval else of_main_process(totals)).tolist()
    if count == 0:
        raise UserError(f"--data-path {args.data_path}: no validation image could be read")
    stats = {"loss": loss / count, "acc1": 100 * acc1 / count, "acc5": 100 * acc5 / count}
    print_main(f"{title}: top-1 {stats['acc1']:.3f} %, top-5 {stats['acc5']:.3f} %, loss {stats['loss']:.4f}, "
               f"{int(count)} images")  # fmt: skip
    return stats


@torch.no_grad()
def measure_throughput(
    model: nn.Module, loader: DataLoader, precision: Precision, args: argparse.Namespace, watch: Watch
) -> float:
    """Images a second of the forward pass on the first validation batch: 50 passes to warm up, 30 timed."""
    model.eval()
    images = precision.images(next(iter(loader))[0])

    def run(title: str, passes: int) -> float:
        start = time.perf_counter()
        progress = Progress(range(passes), title, args.print_freq, passes)
        for _ in progress:
            with precision.autocast():
                model(images)
            watch.tick(title)
            watch.preemption.has_progress = True
            if progress.advance(len(images)):
                progress.report()
        if precision.device.type != "cpu":
            getattr(torch, precision.device.type).synchronize()
        return time.perf_counter() - start

    run("throughput, warm-up", 50)
    throughput = 30 * len(images) / run("throughput", 30)
    number_format = "float32" if precision.dtype is None else str(precision.dtype).removeprefix("torch.")
    print_main(f"batch size {len(images)} (validation batches are 1.5 × --batch-size {args.batch_size}), "
               f"{number_format}: {throughput:.1f} images/s")  # fmt: skip
    return throughput
