"""Monitoring of training steps: flags that all ranks act on at the same step, and the actions they call for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepvit_lib.training.checkpoints import copied
from sepvit_lib.training.errors import Preempted, UserError, setting
from sepvit_lib.training.processes import all_gather, all_reduce, get_rank, print_line
from sepvit_lib.training.state import RunState
from sepvit_lib.training.storage import write_file
from sepvit_lib.training.unreadable import SEPARATOR, check_unreadable, unreadable_images, unreadable_limit
from sepvit_lib.training.watchdog import Watchdog


class StepFlags(NamedTuple):
    """What happened in a step on any rank.

    Attributes:
        place: epoch and step in epoch, as log.txt names them.
        bad_loss: the loss was not finite.
        bad_gradients: the gradients were not finite.
        preempted: a signal to stop came.
        has_unreadable: there were unreadable images.
    """

    place: dict[str, int]
    bad_loss: bool
    bad_gradients: bool
    preempted: bool
    has_unreadable: bool


class DelayedFlags:
    """Share flags among ranks, so that all act on them at the same step, without waiting for a GPU.

    The flags of a step are summed over the ranks on the device. They are read `lag` steps later, when the device has
    long finished that step.

    Args:
        device: the process's device.
        lag: steps until the flags are read. 0 waits for the device at each step.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.device = device
        self.lag = lag
        self._pending: deque[tuple[dict[str, int], Tensor, torch.cuda.Event | None]] = deque()

    def post(self, place: dict[str, int], *flags: Tensor | bool) -> None:
        """Start the all-reduce of this rank's flags for a step.

        Args:
            place: epoch and step in epoch.
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
        self._pending.append((place, counts, event))

    def read(self, to_the_last: bool = False) -> Iterator[StepFlags]:
        """Yield the flags of steps that are at least `lag` steps old, in order.

        Args:
            to_the_last: yield the flags of all steps, and wait for the device.
        """
        while len(self._pending) > (0 if to_the_last else self.lag):
            place, counts, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield StepFlags(place, *(count > 0 for count in counts.tolist()))


@dataclass(frozen=True)
class MonitorSettings:
    """Limits of a run, and when to save.

    Attributes:
        max_bad_steps: steps skipped in a row that end the run.
        dump_bad_batch: save the batches of such steps.
        checkpoint_every: global steps between checkpoints within epochs; 0 for none.
        on_bad_image: policy for unreadable images, 'skip' or 'fail'.
        dataset_size: number of training images.
        advice: what may help against steps that are not finite, for messages.
    """

    max_bad_steps: int
    dump_bad_batch: bool
    checkpoint_every: int
    on_bad_image: str
    dataset_size: int
    advice: str


class StepMonitor:
    """Monitor training steps: bad losses, unreadable images, saving, preemption.

    Args:
        settings: limits.
        watchdog: told about progress.
        flags: shares what happened among the ranks.
        folder: output folder, for the batches of bad steps.
        log: logs an event.
        save: saves a checkpoint. A collective call.

    Attributes:
        skipped: steps that changed no weights, including those in which float16 searches for its loss scale.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        watchdog: Watchdog,
        flags: DelayedFlags,
        folder: Path,
        log: Callable[[dict[str, Any]], None],
        save: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.watchdog = watchdog
        self.preemption = watchdog.preemption
        self.flags = flags
        self.folder = folder
        self.log = log
        self.save = save
        self.skipped = 0
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=flags.device)
        self._batch: dict[str, Any] | None = None
        self._unreadable: list[str] = []

    def see_batch(self, finite: Tensor, batch: dict[str, Any], unreadable: Iterable[str]) -> None:
        """Note a batch of the current step.

        Args:
            finite: whether its loss is finite, a boolean scalar on the device.
            batch: what is saved of it if it is bad: images and targets.
            unreadable: for each image, the names of unreadable images that it replaces, and the reasons, as a text.
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
            Preempted: the run is to stop.
        """
        every = self.settings.checkpoint_every
        # Validation, which may fail, may follow.
        is_due = is_last or (every > 0 and state.global_step % every == 0)
        self.flags.post(state.place(), self._bad_loss, bad_gradients, self.preemption.requested, bool(self._unreadable))
        known = list(self.flags.read(to_the_last=is_due))
        is_preempted = any(flags.preempted for flags in known)
        if is_preempted:  # a checkpoint follows, which needs the flags of all its steps
            known += self.flags.read(to_the_last=True)
        for flags in known:
            self._act(state, flags)
        self._bad_loss = torch.zeros_like(self._bad_loss)
        self._batch = None
        if is_preempted:
            raise Preempted
        if is_due and not state.bad_in_row:
            self.save()

    def _act(self, state: RunState, flags: StepFlags) -> None:
        """Act on a step's flags, on all ranks alike."""
        # float16 finds its loss scale by steps with infinite gradients, down to a scale of 1.
        is_search = flags.bad_gradients and state.searches_scale()
        is_bad = flags.bad_loss or (flags.bad_gradients and not is_search)
        self.skipped += flags.bad_loss or flags.bad_gradients
        state.bad_in_row = state.bad_in_row + 1 if is_bad else 0
        if is_bad:
            state.bad_steps += 1
            what = "loss" if flags.bad_loss else "gradients"
            self.log({**flags.place, "not_finite": what, "in_row": state.bad_in_row})
            self._dump_batch(state, flags)
        if flags.has_unreadable:
            self._note_unreadable(state, flags)
        if state.bad_in_row >= self.settings.max_bad_steps:
            raise UserError(
                f"{setting('max_bad_steps', self.settings.max_bad_steps)}: that many steps in a row were not finite "
                f"and were skipped; the checkpoints in {self.folder} are older than these steps; try "
                f"{self.settings.advice}"
            )

    def _dump_batch(self, state: RunState, flags: StepFlags) -> None:
        """Save the batch of a bad step, if the settings ask for it."""
        if self._batch is None:
            return
        batch = copied({**flags.place, **self._batch})
        path = self.folder / f"bad_batch-{state.global_step:08}-process{get_rank()}.pth"
        try:
            write_file(path, lambda file: torch.save(batch, file))
        except OSError as error:
            print_line(f"WARNING: {path} could not be written ({error.strerror}); training continues")

    def _note_unreadable(self, state: RunState, flags: StepFlags) -> None:
        """Log new unreadable images, and refuse too many."""
        names, policy, size = state.unreadable_images, self.settings.on_bad_image, self.settings.dataset_size
        example = ""
        for name, reason in unreadable_images(SEPARATOR.join(all_gather(self._unreadable))):
            if name not in names:
                names.append(name)
                self.log({**flags.place, "unreadable_image": name, "reason": reason})
                example = f"{name} ({reason})"
        self._unreadable.clear()
        check_unreadable(
            len(names),
            unreadable_limit(policy, size),
            example or names[-1],
            setting("on_bad_image", policy),
            size,
            "see `unreadable_image` in log.txt",
        )
