"""Monitor training steps: share their events among the ranks as flags, on which all ranks act at the same step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepvit_lib.common.errors import Preempted, UserError, setting
from sepvit_lib.common.processes import all_gather, all_reduce, get_rank, print_line
from sepvit_lib.common.storage import write_file
from sepvit_lib.pipeline.unreadable import SEPARATOR, unreadable_images, unreadable_limit
from sepvit_lib.run.checkpoints import copied
from sepvit_lib.run.state import RunState
from sepvit_lib.run.watchdog import Watchdog


class StepFlags(NamedTuple):
    """Events that occurred in a step on at least one rank.

    Attributes:
        position: epoch and step in epoch, with the field names of log.txt.
        bad_loss: the loss was not finite.
        bad_gradients: the gradients were not finite.
        preempted: a stop signal arrived.
        has_unreadable: there were unreadable images.
    """

    position: dict[str, int]
    bad_loss: bool
    bad_gradients: bool
    preempted: bool
    has_unreadable: bool


class DelayedFlags:
    """Share flags among ranks, so that all ranks act on them at the same step. The loop does not wait for the GPU.

    The flags of a step are all-reduced on the device. They are read `lag` steps later, when the device has long
    finished that step.

    Args:
        device: the process's device.
        lag: number of steps after which flags are read. With 0, the loop waits for the device at each step.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.device = device
        self.lag = lag
        self._pending: deque[tuple[dict[str, int], Tensor, torch.cuda.Event | None]] = deque()

    def post(self, position: dict[str, int], *flags: Tensor | bool) -> None:
        """Start the all-reduce of this rank's flags for a step.

        Args:
            position: epoch and step in epoch.
            flags: the other fields of `StepFlags`, in order.
        """
        values = [
            flag.float() if isinstance(flag, Tensor) else torch.full((), float(flag), device=self.device)
            for flag in flags
        ]
        counts = all_reduce(torch.stack(values))
        event = None
        if self.device.type == "cuda":
            host = torch.empty(counts.shape, pin_memory=True)
            counts = host.copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((position, counts, event))

    def read(self, drain: bool = False) -> Iterator[StepFlags]:
        """Yield the flags of steps that are at least `lag` steps old, in order.

        Args:
            drain: yield the flags of all steps, and wait for the device.
        """
        while len(self._pending) > (0 if drain else self.lag):
            position, counts, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield StepFlags(position, *(count > 0 for count in counts.tolist()))


@dataclass(frozen=True)
class MonitorSettings:
    """Limits of a run, and settings of saving.

    Attributes:
        max_bad_steps: number of consecutive bad steps (with a non-finite loss or gradients) that ends the run.
        dump_bad_batch: save the batches of bad steps.
        checkpoint_every: global steps between checkpoints within epochs; 0 for none.
        on_bad_image: policy for unreadable images, 'skip' or 'fail'.
        dataset_size: number of training images.
        advice: what may help against bad steps, for messages.
    """

    max_bad_steps: int
    dump_bad_batch: bool
    checkpoint_every: int
    on_bad_image: str
    dataset_size: int
    advice: str


@dataclass
class StepMonitor:
    """Monitor training steps: bad losses, unreadable images, saving, preemption.

    Args:
        settings: limits of the run, and settings of saving.
        watchdog: notified of progress.
        flags: shares events among the ranks.
        folder: output folder, for the batches of bad steps.
        log: logs an event.
        save: saves a checkpoint. A collective call.

    Attributes:
        skipped: number of steps that changed no weights, including steps in which float16 searched for its loss scale.
    """

    settings: MonitorSettings
    watchdog: Watchdog
    flags: DelayedFlags
    folder: Path
    log: Callable[[dict[str, Any]], None]
    save: Callable[[], None]

    def __post_init__(self) -> None:
        self.preemption, self.skipped = self.watchdog.preemption, 0
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=self.flags.device)
        self._batch: dict[str, Any] | None = None
        self._unreadable: list[str] = []

    def see_batch(self, finite: Tensor, batch: dict[str, Any], unreadable: Iterable[str]) -> None:
        """Record a batch of the current step.

        Args:
            finite: whether the batch's loss is finite, a boolean scalar on the device.
            batch: images and targets, to be saved if the step is bad.
            unreadable: for each image, the unreadable images that it replaces, as text (`Replacements.take`).
        """
        self._bad_loss |= ~finite
        self._unreadable += [SEPARATOR.join(image) for text in unreadable for image in unreadable_images(text)]
        if self.settings.dump_bad_batch and (self._batch is None or not finite):
            self._batch = batch

    def after_step(self, state: RunState, bad_gradients: Tensor, is_last: bool) -> None:
        """Share this step's flags, act on those of earlier steps, and save if a checkpoint is due.

        Args:
            state: the run's state.
            bad_gradients: whether the gradients were not finite, a boolean scalar on the device.
            is_last: whether a checkpoint is due in any case, such as at the end of an epoch.

        Raises:
            UserError: too many bad steps in a row, or too many unreadable images.
            Preempted: the run was asked to stop.
        """
        every = self.settings.checkpoint_every
        # Save before validation, which may follow and fail.
        is_due = is_last or (every > 0 and state.global_step % every == 0)
        self.flags.post(
            state.position(), self._bad_loss, bad_gradients, self.preemption.requested, bool(self._unreadable)
        )
        known = list(self.flags.read(drain=is_due))
        is_preempted = any(flags.preempted for flags in known)
        if is_preempted:  # the checkpoint that follows needs the flags of all its steps
            known += self.flags.read(drain=True)
        for flags in known:
            self._act(state, flags)
        self._bad_loss = torch.zeros_like(self._bad_loss)
        self._batch = None
        if is_preempted:
            raise Preempted
        if is_due and not state.bad_in_row:
            self.save()

    def _act(self, state: RunState, flags: StepFlags) -> None:
        """Act on a step's flags, identically on all ranks."""
        # While float16 searches for its loss scale, infinite gradients are normal until the scale falls below 1.
        is_search = flags.bad_gradients and state.searches_scale()
        is_bad = flags.bad_loss or (flags.bad_gradients and not is_search)
        self.skipped += flags.bad_loss or flags.bad_gradients
        state.bad_in_row = state.bad_in_row + 1 if is_bad else 0
        if is_bad:
            state.bad_steps += 1
            what = "loss" if flags.bad_loss else "gradients"
            self.log({**flags.position, "not_finite": what, "in_row": state.bad_in_row})
            self._dump_batch(state, flags)
        if flags.has_unreadable:
            self._note_unreadable(state, flags)
        if state.bad_in_row >= self.settings.max_bad_steps:
            raise UserError(
                f"{setting('max_bad_steps', self.settings.max_bad_steps)}: this many consecutive steps were not finite "
                f"and were skipped; the checkpoints in {self.folder} are from before these steps; try "
                f"{self.settings.advice}"
            )

    def _dump_batch(self, state: RunState, flags: StepFlags) -> None:
        """Save the batch of a bad step, if enabled."""
        if self._batch is None:
            return
        batch = copied({**flags.position, **self._batch})
        path = self.folder / f"bad_batch-{state.global_step:08}-process{get_rank()}.pth"
        try:
            write_file(path, lambda file: torch.save(batch, file))
        except OSError as error:
            print_line(f"WARNING: {path} could not be written ({error.strerror}); training continues")

    def _note_unreadable(self, state: RunState, flags: StepFlags) -> None:
        """Log new unreadable images, and end the run if there are too many."""
        names, policy, size = state.unreadable_images, self.settings.on_bad_image, self.settings.dataset_size
        example = ""
        for name, reason in unreadable_images(SEPARATOR.join(all_gather(self._unreadable))):
            if name not in names:
                names.append(name)
                self.log({**flags.position, "unreadable_image": name, "reason": reason})
                example = f"{name} ({reason})"
        self._unreadable.clear()
        limit = unreadable_limit(policy, size)
        if len(names) > limit:
            raise UserError(
                f"{setting('on_bad_image', policy)}: {len(names)} of {size} training images are unreadable "
                f"(limit {limit}), e.g. {example or names[-1]}; see `unreadable_image` in log.txt"
            )
