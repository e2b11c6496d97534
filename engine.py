"""Train an epoch, validate, measure throughput, and compute the loss of knowledge distillation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.task import DistillationTeacher, TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets import epoch_batches
from sepvit_lib.common.devices import gpu_memory
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.label_metrics import class_metrics, label_metrics
from sepvit_lib.common.processes import all_gather, all_reduce, broadcast, get_rank, get_world_size, print_main
from sepvit_lib.count import timed
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.run.monitor import StepMonitor
from sepvit_lib.run.state import Precision, Training, buffers_of
from sepvit_lib.run.watchdog import Watchdog
from utils import Progress, Stream, seed_everything

WARMUP_PASSES, TIMED_PASSES = 50, 30  # of the throughput measurement
Rows = list[tuple[np.ndarray, Any]]  # logits and target of each image


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the training loop.

    Attributes:
        epochs: epochs of the run.
        seed: the run's seed.
        accum_steps: batches that each rank accumulates per step.
        clip_grad: bound of the gradients, 0 for no clipping.
        clip_mode: 'norm', 'value' or 'agc', as for timm's `dispatch_clip_grad`.
        mixup_off_epoch: epoch from which mixing is off; 0 for none.
        print_freq: batches between progress reports.
        data_path: path of the data set, for messages.
    """

    epochs: int
    seed: int
    accum_steps: int
    clip_grad: float
    clip_mode: str
    mixup_off_epoch: int
    print_freq: int
    data_path: str


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of validation.

    Attributes:
        dist_eval: split the images across ranks.
        print_freq: batches between progress reports.
        data_path: path of the data set, for messages.
    """

    dist_eval: bool
    print_freq: int
    data_path: str


class WeightedLoss(nn.Module):
    """Mean of each image's loss times its weight and the weight of its class.

    With soft targets, the weights of the classes are averaged by them.

    Args:
        loss: losses of the images, B, from outputs and targets.
        weights: weight of each class; empty for none.
        smoothing: label smoothing that soft targets contain. It does not change the weights.
        has_image_weights: whether the last column of the targets has the weights of the images.
    """

    weights: Tensor

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        weights: Sequence[float] = (),
        smoothing: float = 0.0,
        has_image_weights: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.smoothing = min(smoothing, 1 - 1e-6)
        self.has_image_weights = has_image_weights
        self.register_buffer("weights", torch.tensor(weights))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss from logits, B × classes, and labels, B, or soft targets, B × classes (+ 1)."""
        if self.has_image_weights:
            targets, image_weights = targets[:, :-1], targets[:, -1]
            return (image_weights * self._losses(outputs, targets)).mean()
        return self._losses(outputs, targets).mean()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image times the weight of its class, B."""
        if len(self.weights) == 0:
            return self.loss(outputs, targets)
        if targets.ndim == 1:
            weights = self.weights[targets]
        else:  # not a matrix product, which autocast would round
            smoothed = self.smoothing * self.weights.mean()
            weights = ((targets * self.weights).sum(dim=1) - smoothed) / (1 - self.smoothing)
        return weights * self.loss(outputs, targets)


class DistillationLoss(nn.Module):
    """Loss on the labels and on a teacher's outputs (Touvron et al., https://arxiv.org/abs/2012.12877).

    Both terms apply to the same outputs of the student, because SepViT has no distillation token.

    Args:
        base: loss on the labels.
        teacher: the teacher; not used without distillation.
        kind: 'none', 'soft' (KL divergence from the teacher's distribution) or 'hard' (cross entropy with the teacher's
            predicted classes).
        alpha: weight of the teacher's term; the labels' term has weight 1 - alpha.
        tau: temperature of soft distillation.
    """

    def __init__(
        self, base: nn.Module, teacher: Any = None, kind: str = "none", alpha: float = 0.5, tau: float = 1.0
    ) -> None:
        super().__init__()
        self.base = base
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            images: B × C × H × W.
            outputs: the student's logits, B × classes.
            targets: labels, B, or soft targets, B × classes.
        """
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


class TaskLoss(nn.Module):
    """Loss of one of timm's distillation tasks (`timm.task`).

    Args:
        task: the task. `task.trainable_module` computes the outputs that `forward` takes.
    """

    def __init__(self, task: TrainingTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor, outputs: Any, targets: Tensor) -> Any:
        """Compute the loss. `outputs` are those of `task.trainable_module`; the rest is as in `DistillationLoss`."""
        computed: Any = nn.Identity()
        computed.forward = lambda _: outputs
        self.task.trainable_module = computed  # otherwise, the task would run the student again
        return self.task(images, targets)["loss"]


class Renormalised(DistillationTeacher):
    """A teacher for images whose normalisation differs from the one that it expects.

    Args:
        network: the teacher.
        given: normalisation of the images.
        own: normalisation that the teacher expects.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Preprocessing, own: Preprocessing) -> None:
        super().__init__(network)
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (given.mean, given.std, own.mean, own.std)
        )
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        """Compute the teacher's logits or pooled features for images, B × C × H × W."""
        return super().forward(images * self.scale + self.shift, return_features)


def train_one_epoch(
    training: Training,
    loader: DataLoader,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    precision: Precision,
    settings: LoopSettings,
    mixup: Mixup | None,
    monitor: StepMonitor,
    prepare: Callable[[Any], Tensor] | None = None,
) -> dict[str, float]:
    """Train from the run's current step to the end of its epoch.

    The loop synchronises with a GPU only to report the mean loss, and after float16 steps with non-finite gradients.
    But it synchronises at every step if the batches of bad steps (those with a non-finite loss or gradients) must be
    saved, or if the optimiser has no fused form.

    Args:
        training: the run's state.
        loader: training batches of this rank.
        criterion: loss from images, outputs and targets.
        precision: device and number format.
        settings: settings of the loop.
        mixup: mixup and CutMix, or None.
        monitor: called after each batch and step.
        prepare: turns a loaded batch into normalised images on the device; by default `precision.images`, which only
            copies them.

    Returns:
        mean loss, and the epoch's learning rate.

    Raises:
        UserError: too many bad steps in a row, or too many unreadable images.
        Preempted: the run was asked to stop; its current step is complete.
    """
    watchdog = monitor.watchdog
    prepare = prepare or precision.images
    watchdog.sync_point()
    first_step, skipped, bad_steps = training.epoch_step, monitor.skipped, training.bad_steps
    wrapped: Any = training.wrapped.train()
    buffers = buffers_of(training.model)  # SepViT has none
    group = training.optimizer.param_groups[0]
    lr = group["lr"] / group.get("lr_scale", 1.0)  # without layer decay
    progress = _progress(training, loader, settings, watchdog)
    for (images, targets, unreadable), share, number, is_last in _accumulated(progress, settings.accum_steps):
        monitor.preemption.has_progress = True
        watchdog.tick(f"epoch {training.epoch}, step {training.epoch_step}")
        seed_everything(Stream.STEP, settings.seed, training.epoch, number)
        images, targets = prepare(images), targets.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        # Ranks accumulate gradients locally, and all-reduce them only on the step's last batch.
        with wrapped.no_sync() if hasattr(wrapped, "no_sync") and not is_last else nullcontext():
            with precision.autocast():
                loss = criterion(images, wrapped(images), targets)
            watchdog.tick(f"epoch {training.epoch}, step {training.epoch_step}, backward")  # may wait for other ranks
            finite = training.backward(loss, share)
        monitor.see_batch(finite, dict(images=images, targets=targets), unreadable)
        if progress.advance(len(images) * get_world_size()):
            progress.report(loss=f"{training.mean_loss():.4f}", lr=f"{lr:.6f}", **gpu_memory(precision.device))
        if is_last:
            bad_gradients = training.step(settings.clip_grad, buffers, settings.clip_mode)
            monitor.after_step(training, bad_gradients, progress.done == progress.total)
    if progress.done == 0:
        raise UserError(f"{setting('data_path', settings.data_path)}: no training image could be read")
    if first_step == 0 and monitor.skipped - skipped == training.epoch_step:
        _refuse_skipped_epoch(training, is_search=training.bad_steps == bad_steps, epochs=settings.epochs)
    training.check_finite()
    return {"loss": training.mean_loss(), "lr": lr}


def _progress(training: Training, loader: DataLoader, settings: LoopSettings, watchdog: Watchdog) -> Progress:
    """Progress over the epoch's remaining batches."""
    batches = epoch_batches(loader, training.epoch, training.epoch_step, settings.accum_steps, watchdog.tick)
    done, later = min(training.epoch_step * settings.accum_steps, len(loader)), settings.epochs - training.epoch - 1
    return Progress(batches, f"epoch {training.epoch}", settings.print_freq, len(loader), done, later)


def _refuse_skipped_epoch(training: Training, is_search: bool, epochs: int) -> None:
    """Refuse an epoch in which every step was skipped.

    Such an epoch is accepted while float16 searches for its loss scale (`is_search`), unless it is the run's last.
    """
    if not is_search or training.epoch == epochs - 1:
        raise UserError(
            f"epoch {training.epoch}: loss or gradients were non-finite in every step, so all steps were "
            f"skipped; try a lower {setting('lr')}, or {setting('amp', 'bfloat16')} or off"
        )


def _accumulated(batches: Progress, accum_steps: int) -> Iterator[tuple[Any, int, int, bool]]:
    """Yield each batch with its position in the optimiser step.

    Args:
        batches: the epoch's remaining batches.
        accum_steps: batches that each rank accumulates per step.

    Yields:
        the batch; the number of batches in the step; the batch's index among all ranks' batches of the epoch; and
        whether it ends the step.
    """
    for index, batch in enumerate(batches, start=batches.done):
        first = index // accum_steps * accum_steps
        share = min(accum_steps, batches.total - first)  # a streaming data set's last step may be smaller
        yield batch, share, index * get_world_size() + get_rank(), index == first + share - 1


class ClassScores:
    """Sums over images with one label each, from which their metrics are computed.

    Args:
        num_classes: number of classes.
        device: device of the sums.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(4, dtype=kind, device=device)  # images, loss, top-1, top-5
        self.classes = self.sums.new_zeros(3, num_classes)  # images, predictions and hits of each class

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: logits, B × classes, and labels, B."""
        loss = F.cross_entropy(outputs.float(), targets, reduction="sum")
        predicted = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
        ranked, ones = predicted == targets[:, None], torch.ones_like(targets, dtype=self.sums.dtype)
        self.sums += torch.stack([ones.sum(), loss.to(ones), ranked[:, 0].sum(), ranked.sum()])
        seen = ((targets, ones), (predicted[:, 0], ones), (targets, ranked[:, 0].to(ones)))
        for row, (index, values) in zip(self.classes, seen):
            row.index_add_(0, index, values)

    def metrics(self, is_split: bool) -> dict[str, float]:
        """Compute the number of images and their metrics. A collective call.

        All ranks get the same results, even if their devices' results differ in the last bits.

        Args:
            is_split: whether each rank has added a part of the images. If not, those of rank 0 count.
        """
        totals = torch.cat([self.sums, self.classes.flatten()])
        totals = all_reduce(totals) if is_split else broadcast(totals)
        images, loss, acc1, acc5 = totals[:4].tolist()
        if images == 0:
            return dict(images=0)
        stats = dict(images=images, loss=loss / images, acc1=100 * acc1 / images, acc5=100 * acc5 / images)
        _, recall, f1 = class_metrics(*totals[4:].view(3, -1).cpu().numpy())
        return stats | dict(balanced_accuracy=100 * float(np.nanmean(recall)), f1=100 * float(np.nanmean(f1)))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    precision: Precision,
    title: str,
    settings: EvaluationSettings,
    watchdog: Watchdog,
    rows: Rows | None = None,
    quietly: bool = False,
) -> dict[str, float]:
    """Validate a network. A collective call.

    Returns loss, top-1 and top-5 accuracy, balanced accuracy (the mean of the classes' recalls), and macro F1 (the mean
    of the classes' F1), all but the loss in %. Classes that do not occur are not counted. For images with several
    labels, see `multi_label_metrics`.

    If the images are split across ranks, the ranks' sums are all-reduced, so that every image counts exactly once.

    Args:
        model: the network.
        loader: validation batches of this rank.
        precision: device and number format.
        title: prefix of each reported line.
        settings: settings of validation.
        watchdog: notified of progress.
        rows: list to which logits and target of each image are added, in the order of the data set (arbitrary for
            streams); None for none.
        quietly: print only the result, and no progress.

    Raises:
        UserError: there is no readable image.
        Preempted: the run was asked to stop.
    """
    model.eval()
    for buffer in model.buffers():
        broadcast(buffer)  # validate with rank 0's buffers, which the checkpoint saves
    multi_label = getattr(loader.dataset, "multi_label", False)
    rows = [] if rows is None and multi_label else rows
    scores = ClassScores(0 if multi_label else getattr(model, "num_classes", 0), precision.device)
    batches = watchdog.validation_batches(loader, title, precision.device)
    progress = Progress(batches, title, settings.print_freq, len(loader), quietly=quietly)
    for images, targets in progress:
        images, targets = precision.images(images), targets.to(precision.device, non_blocking=True)
        with precision.autocast():
            outputs = model(images)
        if not multi_label:
            scores.add(outputs, targets)
        if rows is not None:
            rows += zip(outputs.float().cpu().numpy(), targets.tolist())
        if progress.advance(len(images) * (get_world_size() if settings.dist_eval else 1)):
            progress.report()
    if rows is not None and settings.dist_eval:  # images were distributed round-robin
        rows[:] = [row for turn in zip_longest(*all_gather([rows])) for row in turn if row is not None]
    stats = multi_label_metrics(rows or []) if multi_label else scores.metrics(settings.dist_eval)
    if not (images_seen := int(stats.pop("images"))):
        raise UserError(f"{setting('data_path', settings.data_path)}: no validation image could be read")
    names = dict(map="mAP", f1="F1") if multi_label else dict(acc1="top-1", acc5="top-5")
    shown = ", ".join(f"{label} {stats[name]:.3f} %" for name, label in names.items())
    print_main(f"{title}: {shown}, loss {stats['loss']:.4f}, {images_seen} images")
    return stats


def multi_label_metrics(rows: Rows) -> dict[str, float]:
    """Compute binary cross entropy, mean average precision, macro and micro F1 at a probability of 0.5 (%).

    The means are over the classes that occur. A collective call: all ranks get the results of rank 0.

    Args:
        rows: logits of each image, and a target for each class: 1 for its labels and 0 for the others.
    """
    if not rows:
        return dict(images=0)
    logits, targets = (np.array(column, dtype=np.float64) for column in zip(*rows))
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets)).item()
    metrics = label_metrics(targets.astype(bool), logits)(np.ones(len(rows)))
    names = {"map": "mAP", "f1": "macro F1", "micro_f1": "micro F1"}
    values = {name: 100 * metrics[label] for name, label in names.items()}
    return all_gather([dict(images=len(rows), loss=loss, **values)])[0]


@torch.no_grad()
def measure_throughput(
    model: nn.Module, loader: DataLoader, precision: Precision, print_freq: int, watchdog: Watchdog
) -> tuple[int, float]:
    """Measure the forward pass on the first validation batch: 50 passes to warm up, then 30 timed passes.

    Args:
        model: the network.
        loader: validation batches.
        precision: device and number format.
        print_freq: passes between progress reports.
        watchdog: notified of progress.

    Returns:
        images per batch, and images per second.
    """
    model.eval()
    images = precision.images(next(iter(loader))[0])

    def run(title: str, passes: int) -> None:
        progress = Progress(range(passes), title, print_freq, passes)
        for _ in progress:
            with precision.autocast():
                model(images)
            watchdog.tick(title)
            watchdog.preemption.has_progress = True
            if progress.advance(len(images)):
                progress.report()

    timed(lambda: run("throughput, warm-up", WARMUP_PASSES), precision.device)
    seconds = timed(lambda: run("throughput", TIMED_PASSES), precision.device)
    return len(images), TIMED_PASSES * len(images) / seconds
