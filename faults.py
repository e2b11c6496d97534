"""What a run takes to survive: signals of preemption, facts all processes act on together, and a watch over them."""

import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor

from training.commands import is_of_machine
from utils import (
    INTERRUPT_STATUS,
    RESUME_STATUS,
    MachineError,
    Preempted,
    get_rank,
    get_world_size,
    is_main_process,
    sum_over_processes,
)

RESUME_ADVICE = "run the same command with --auto-resume to resume from the last checkpoint"
POLLS = 5  # times the watch looks within the time in which a process has to show that it lives
ENDS = ("failed", "was lost")  # how a process shows that it ends by an error: of its own, or of its machine
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SETUP = 1800.0  # seconds a process may rest before the first step, while it looks through its images


class Preemption:
    """Minds the signals that ask a run to end: SIGTERM and SIGUSR1 (of SLURM's `--signal`) of schedulers, and Ctrl-C's
    SIGINT. The run finishes its step and saves; a second Ctrl-C ends the process at once.

    Args:
        saves: whether the command saves what it has done; one that does not is ended at once.

    Attributes:
        requested: whether one came, here or (as the watch tells) at another process.
        has_progress: whether there is something to save; before that, a signal ends the process at once.
        status: the exit status of a run that is ended so.
    """

    def __init__(self, saves: bool = True) -> None:
        self.saves = saves
        self.requested = False
        self.has_progress = False
        self.status = RESUME_STATUS

    def __enter__(self) -> "Preemption":
        self._previous = {number: signal.signal(number, self._note) for number in PREEMPTIONS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        is_second = number == signal.SIGINT and self.status == INTERRUPT_STATUS
        if number == signal.SIGINT:
            self.status = INTERRUPT_STATUS
        self.requested = True
        if self.saves and self.has_progress and not is_second:
            if number == signal.SIGINT:
                self._say("interrupted: finishing the step and saving; Ctrl-C again ends it at once")
        else:
            what = "interrupted" if number == signal.SIGINT else "ended by a signal"
            is_early = self.saves and not is_second
            self._say(f"{what} before the first step; run the same command again" if is_early else what)
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(self.status)

    def _say(self, line: str) -> None:
        """Print a line from within a signal's handler, where `print` may be in the middle of another one."""
        if is_main_process():
            with suppress(OSError):
                os.write(2, f"main.py: {line}\n".encode())


def ignore_preemption(*_: Any) -> None:
    """For a loader's worker: signals go to whole groups of processes, and a step in the making needs its images."""
    for number in PREEMPTIONS:
        signal.signal(number, signal.SIG_IGN)


class Facts(NamedTuple):
    """What happened in a step, on one process or another.

    Attributes:
        place: epoch and steps done in it, as log.txt names them.
        bad_loss: the loss was not finite.
        bad_gradients: the gradients were not.
        preempted: a signal came.
        unreadable: there were images that could not be read.
    """

    place: dict[str, int]
    bad_loss: bool
    bad_gradients: bool
    preempted: bool
    unreadable: bool


class Agreement:
    """Lets all processes act on facts of any of them at the same step, without waiting for a GPU.

    The facts of a step are added up over the processes on the device and read `lag` steps later, when the device has
    long done that step.

    Args:
        device: the process's device.
        lag: steps between a fact and its being known; 0 waits for the device.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.device = device
        self.lag = lag
        self._pending: deque[tuple[dict[str, int], Tensor, Any]] = deque()

    def post(self, place: dict[str, int], *facts: Tensor | bool) -> None:
        """Give a step's facts, as in `Facts`, here on this process."""
        values = [fact.float() if isinstance(fact, Tensor) else torch.full((), float(fact), device=self.device)
                  for fact in facts]  # fmt: skip
        counts = sum_over_processes(torch.stack(values))
        event = None
        if self.device.type == "cuda":
            host = torch.empty(counts.shape, pin_memory=True)
            counts = host.copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((place, counts, event))

    def known(self, to_the_last: bool = False) -> Iterator[Facts]:
        """The facts of the steps that are `lag` behind, in their order; or of all, for which it waits."""
        while len(self._pending) > (0 if to_the_last else self.lag):
            place, counts, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            yield Facts(place, *(count > 0 for count in counts.tolist()))


def together(device: torch.device, fact: bool) -> bool:
    """Whether something is so on any process; all have to ask."""
    return bool(sum_over_processes(torch.tensor(float(fact), device=device)))


def gathered(values: Sequence[str]) -> list[str]:
    """All processes' values, in the processes' order."""
    if get_world_size() == 1:
        return list(values)
    parts: list[Sequence[str]] = [()] * get_world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def patience_of(timeout: float) -> float:
    """Seconds without a sign of life after which a process is dead or stopped, for a run's `--timeout`."""
    return max(5.0, timeout / 10)


def longest_rest(timeout: float) -> float:
    """Seconds in which a process may not move before the first step, for a run's `--timeout`."""
    return max(timeout, SETUP)


class Watch:
    """Ends this process, with a line that names the lost one, when another process dies or hangs.

    Each process shows the others that it lives and how far it is. One that shows nothing for a tenth of `timeout`
    (5 seconds at least) is dead or stopped. When this process has not moved for `timeout` (before the first step, for
    half an hour at least), the one that is furthest behind hangs. Torchrun's end is noticed, too: it is taken for a
    signal to end, and for a loss when that takes longer. A process that is alone is only watched for hanging.

    Args:
        timeout: seconds.
        dist_url: where the processes meet.
        preemption: told when another process is to end.
        advice: how to start again.
    """

    def __init__(self, timeout: float, dist_url: str, preemption: Preemption, advice: str = RESUME_ADVICE) -> None:
        self.timeout = timeout
        self.patience = patience_of(timeout)
        self.dist_url = dist_url
        self.preemption = preemption
        self.advice = advice
        self.rounds = 0
        self.ticks = 0
        self.place = "the start"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self, place: str) -> None:
        """Show that this process moves on; `place` says where it is, for messages."""
        self.ticks += 1
        self.place = place

    def start_round(self) -> None:
        """Show that this process has come to where all of them meet, by however many ticks: their counts begin anew."""
        self.rounds += 1
        self.ticks = 0

    def __enter__(self) -> "Watch":
        is_alone = get_world_size() == 1
        if not is_alone:
            self._store = self._join()
        self._thread = threading.Thread(target=self._run_alone if is_alone else self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if get_world_size() == 1:
            self._ended.set()
            self._thread.join()
            return
        is_exchange = isinstance(error, RuntimeError) and bool(
            isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
        )
        if is_exchange:
            self._thread.join(3 * self.patience)  # it is another process that failed: the thread finds out which
        self._ended.set()
        self._thread.join()
        orderly = error is None or isinstance(error, Preempted)
        if orderly:
            self._show("ended")
            dist.barrier()  # the first process keeps the store
        else:
            what = f"{kind.__name__}: {' '.join(str(error).split())[:200]}"
            with suppress(RuntimeError):  # the first process may have ended, for the same reason
                state = "was lost" if is_exchange or is_of_machine(error) else "failed"
                self._show(f"{state} ({what})")
                self._await_others()
            if is_exchange:  # and no process ended by an error of its own: it was the network
                raise MachineError(what) from error

    def _join(self) -> dist.Store:
        """The store in which the processes show where they are."""
        host = os.environ.get("MASTER_ADDR") or urlparse(self.dist_url).hostname or "127.0.0.1"
        patience = timedelta(seconds=self.patience)
        port, store = [0], None
        if get_rank() == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = [store.port]
        dist.broadcast_object_list(port)
        store = store or dist.TCPStore(host, port[0], is_master=False, timeout=patience)
        self._store = store
        self._show("lives")
        dist.barrier()  # so that all have shown something
        return store

    def _await_others(self) -> None:
        """On the first process, which keeps the store: give the others the time to see there that it failed."""
        end = time.monotonic() + 4 * self.patience / POLLS
        others = [str(rank) for rank in range(1, get_world_size())]
        while get_rank() == 0 and time.monotonic() < end:
            if all(json.loads(beat)["state"].startswith(ENDS) for beat in self._store.multi_get(others)):
                return
            time.sleep(0.1)

    def _show(self, state: str) -> None:
        beat = dict(state=state, time=time.monotonic(), ticks=[self.rounds, self.ticks], place=self.place,
                    host=socket.gethostname(), preempted=self.preemption.requested)  # fmt: skip
        self._store.set(str(get_rank()), json.dumps(beat))

    def _run_alone(self) -> None:
        moved = ((self.rounds, self.ticks), time.monotonic())
        looked = time.monotonic()
        while not self._ended.wait(self.patience / POLLS):
            place, now = (self.rounds, self.ticks), time.monotonic()
            was_stopped = now - looked > self.patience  # all of this process, as by Ctrl-Z, and not only the run
            looked = now
            moved = (place, now) if was_stopped or place != moved[0] else moved
            rest = now - moved[1]
            if rest > self._limit():
                self._end(f"hangs at {self.place}: nothing has moved for {rest:.0f} s")

    def _limit(self) -> float:
        """Seconds that a process may rest."""
        return self.timeout if self.preemption.has_progress else longest_rest(self.timeout)

    def _run(self) -> None:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        ranks = [str(rank) for rank in range(get_world_size())]
        seen = [("", time.monotonic())] * len(ranks)  # each process's last beat, and when it came
        moved = ((self.rounds, self.ticks), time.monotonic())
        orphaned = math.inf  # since when
        while not self._ended.wait(self.patience / POLLS):
            now = time.monotonic()
            if launcher is not None and os.getppid() != launcher:
                self.preemption.requested = True
                orphaned = min(orphaned, now)
                if now - orphaned > self.patience:
                    self._end("torchrun, which started it, is gone")
            guard = threading.Timer(2 * self.patience, self._end_unless_done, ["process 0 does not answer"])
            guard.daemon = True
            guard.start()  # the store has no limit of its own for a process 0 that is stopped
            try:
                self._show("lives")
                beats = [beat.decode() for beat in self._store.multi_get(ranks)]
            except RuntimeError as error:
                self._end_unless_done(f"process 0 does not answer ({' '.join(str(error).split())[:120]})")
                return
            finally:
                guard.cancel()
            seen = [last if beat == last[0] else (beat, now) for beat, last in zip(beats, seen)]
            place = (self.rounds, self.ticks)
            moved = moved if place == moved[0] else (place, now)
            self._judge([json.loads(beat) for beat in beats], [now - since for _, since in seen], now - moved[1])

    def _judge(self, beats: list[dict[str, Any]], silences: list[float], rest: float) -> None:
        """End this process where another is lost.

        Args:
            beats: what each process showed last.
            silences: seconds since then.
            rest: seconds since this process moved.
        """
        self.preemption.requested |= any(beat["preempted"] for beat in beats)
        for rank, (beat, silence) in enumerate(zip(beats, silences)):
            who = f"process {rank} ({beat['host']}), last seen at {beat['place']},"
            if beat["state"].startswith(ENDS) and silence > self.patience / POLLS:  # or this one is about to, too
                self._end(f"{who} {beat['state']}", 1 if beat["state"].startswith("failed") else RESUME_STATUS)
            if beat["state"] == "lives" and silence > self.patience:
                self._end(f"{who} has given no sign of life for {silence:.0f} s")
        if rest > self._limit():
            least = min(beat["ticks"] for beat in beats)
            behind = [f"process {rank} ({beat['host']}) hangs at {beat['place']}" for rank, beat in enumerate(beats)
                      if beat["ticks"] == least]  # fmt: skip
            self._end(f"{', '.join(behind)}: nothing has moved for {rest:.0f} s")

    def _end_unless_done(self, what: str) -> None:
        """End this process, but for one that is at its end."""
        if not self._ended.is_set():
            self._end(what)

    def _end(self, what: str, status: int = RESUME_STATUS) -> NoReturn:
        """End this process; a status other than "resume me" where the lost one would fail again."""
        cause = "" if status == RESUME_STATUS else "mend the cause that it printed, then "
        print(f"main.py: process {get_rank()}: {what}; {cause}{self.advice}", file=sys.stderr, flush=True)
        os._exit(status)  # the main thread may be waiting for the lost process in native code
