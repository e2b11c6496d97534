"""Signals that stop a run, and the watchdog that ends a process when it hangs or when another rank is lost."""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from sepvit_lib.common.errors import (
    INTERRUPT_STATUS,
    RESUME_STATUS,
    MachineError,
    Preempted,
    is_communication_error,
    is_transient,
    one_line,
    with_flags,
)
from sepvit_lib.common.processes import any_rank, get_rank, get_world_size, is_main_process

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
POLLS = 5  # number of times that the watchdog polls within a heartbeat timeout
STARTUP_TIMEOUT = 1800.0  # seconds; scanning the data sets before the first step may take long
# States of a rank: FAILED after a persistent error, LOST after a transient one.
RUNNING, ENDED, FAILED, LOST = "running", "ended", "failed", "was lost"


@dataclass
class Preemption:
    """Handle the signals that stop a run: SIGTERM, SIGUSR1 (SLURM's `--signal`) and SIGINT (Ctrl-C).

    The run finishes its step and saves. A second Ctrl-C ends the process at once.

    Args:
        command: the script's name, printed before messages.
        saves: whether the command saves its progress. If not, a signal ends the process at once.
        requested: whether this rank received a signal. The watchdog also sets it if another rank did.
        has_progress: whether there is anything to save. If not, a signal ends the process at once.
        status: exit status of the stopped run.
    """

    command: str
    saves: bool = True
    requested: bool = False
    has_progress: bool = False
    status: int = RESUME_STATUS

    def __enter__(self) -> "Preemption":
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = number == signal.SIGINT and self.status == INTERRUPT_STATUS
        if number == signal.SIGINT:
            self.status = INTERRUPT_STATUS
        self.requested = True
        if self.saves and self.has_progress and not is_second:
            if number == signal.SIGINT:
                self._print("interrupted: finishing the step and saving; press Ctrl-C again to end at once")
            return
        what = "interrupted" if number == signal.SIGINT else "stopped by a signal"
        is_early = self.saves and not is_second
        self._print(f"{what} before the first step; run the same command again" if is_early else what)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(self.status)

    def _print(self, line: str) -> None:
        """Print a line from a signal handler, which may have interrupted a `print`."""
        if is_main_process():
            with suppress(OSError):
                os.write(2, f"{self.command}: {line}\n".encode())


def ignore_preemption(*_: object) -> None:
    """Ignore the signals that stop a run. Loader workers call this function.

    The signals reach the whole process group, but the main process still needs images to finish its step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def heartbeat_timeout(timeout: float) -> float:
    """Seconds without a heartbeat after which a rank counts as lost, given a run's hang timeout."""
    return max(5.0, timeout / 10)


def startup_timeout(timeout: float) -> float:
    """Seconds without progress that are allowed before the first step, given a run's hang timeout."""
    return max(timeout, STARTUP_TIMEOUT)


class Heartbeat(NamedTuple):
    """Status that a rank reports to the others, as JSON.

    Attributes:
        state: RUNNING, ENDED, FAILED or LOST.
        cause: the error that ended the rank; "" if there was none.
        ticks: number of sync points, and number of ticks since the last sync point.
        position: the rank's position in the run, for messages.
        host: name of the rank's machine.
        preempted: whether the rank received a stop signal.
        time: when the heartbeat was sent, which makes each heartbeat unique.
    """

    state: str
    cause: str
    ticks: list[int]
    position: str
    host: str
    preempted: bool
    time: float

    def has_failed(self) -> bool:
        """Whether the rank ended with an error."""
        return self.state in (FAILED, LOST)


@dataclass
class Watchdog:
    """End this process, with a message, when it hangs or when another rank is lost.

    Each rank sends heartbeats to a store on rank 0. A rank whose heartbeats stop for longer than the heartbeat timeout
    (a tenth of `timeout`, at least 5 seconds) is dead or suspended, and this process then ends.

    This process also ends if it makes no progress for `timeout` (at least half an hour before the first step and while
    `is_evaluating`). The message names the ranks with the fewest ticks: they hang, and the others wait for them.

    If torchrun is gone, the run stops as it does on a signal. This process ends if stopping takes longer than the
    heartbeat timeout.

    Args:
        timeout: hang timeout in seconds.
        dist_url: rendezvous address.
        preemption: notified when another rank received a signal.
        advice: how to start the command again, for messages.
        flags: the command's flags by setting, for other ranks' errors.
    """

    timeout: float
    dist_url: str
    preemption: Preemption
    advice: str
    flags: Mapping[str, str]

    def __post_init__(self) -> None:
        self.heartbeat_timeout = heartbeat_timeout(self.timeout)
        self.sync_points = self.ticks = 0
        self.position, self.is_evaluating = "the start", False
        self._ended = threading.Event()

    def tick(self, position: str) -> None:
        """Record progress. `position` is the position in the run, for messages."""
        self.ticks += 1
        self.position = position

    def sync_point(self) -> None:
        """Mark a point that all ranks reach together, and restart the tick counter."""
        self.sync_points += 1
        self.ticks = 0

    def validation_batches(self, batches: Iterable[Any], title: str, device: torch.device) -> Iterator[Any]:
        """Yield batches, and record progress. If the run is asked to stop, they end early. A collective call.

        Args:
            batches: this rank's batches.
            title: what they are for, for messages.
            device: the process's device.

        Raises:
            Preempted: after the last batch, if any rank was asked to stop.
        """
        for number, batch in enumerate(batches, start=1):
            yield batch
            self.tick(f"batch {number} of {title}")
            self.preemption.has_progress = True
            if self.preemption.requested:
                break
        self.sync_point()
        if any_rank(device, self.preemption.requested):
            raise Preempted(f"in {title}")

    def __enter__(self) -> "Watchdog":
        if get_world_size() > 1:
            self._join()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if get_world_size() == 1:
            self._ended.set()
            self._thread.join()
            return
        lost_connection = is_communication_error(error)
        if lost_connection:
            self._thread.join(3 * self.heartbeat_timeout)  # another rank failed: the watchdog's thread finds out which
        self._ended.set()
        self._thread.join()
        if error is None or isinstance(error, Preempted):
            self._send(ENDED)
            dist.barrier()  # rank 0 hosts the store
            return
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        with suppress(RuntimeError):  # rank 0 may have ended for the same reason
            self._send(LOST if lost_connection or is_transient(error) else FAILED, cause)
            self._wait_for_failures()
        if lost_connection:  # no rank has failed, so the network has
            raise MachineError(cause) from error

    def _join(self) -> None:
        """Open the store for heartbeats, and wait until every rank has sent one."""
        host = os.environ.get("MASTER_ADDR") or urlparse(self.dist_url).hostname or "127.0.0.1"
        timeout = timedelta(seconds=self.heartbeat_timeout)
        port, store = [0], None
        if get_rank() == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = [store.port]
        dist.broadcast_object_list(port)
        self._store = store or dist.TCPStore(host, port[0], is_master=False, timeout=timeout)
        self._send(RUNNING)
        dist.barrier()

    def _wait_for_failures(self) -> None:
        """Give the other ranks time to learn of a failure of rank 0, which hosts the store. Other ranks do not wait."""
        end = time.monotonic() + 4 * self.heartbeat_timeout / POLLS
        others = [str(rank) for rank in range(1, get_world_size())]
        while get_rank() == 0 and time.monotonic() < end:
            if all(Heartbeat(*json.loads(text)).has_failed() for text in self._store.multi_get(others)):
                return
            time.sleep(0.1)

    def _beat(self, state: str, cause: str = "") -> str:
        ticks, host = (self.sync_points, self.ticks), socket.gethostname()
        return json.dumps((state, cause, ticks, self.position, host, self.preemption.requested, time.monotonic()))

    def _send(self, state: str, cause: str = "") -> None:
        self._store.set(str(get_rank()), self._beat(state, cause))

    def _hang_timeout(self) -> float:
        """Seconds without progress after which the run counts as hanging."""
        is_short = self.preemption.has_progress and not self.is_evaluating
        return self.timeout if is_short else startup_timeout(self.timeout)

    def _watch(self) -> None:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        since = last_poll = time.monotonic()
        seen = [("", since)] * get_world_size()  # each rank's last heartbeat, and when it was first seen
        progress = (self.sync_points, self.ticks)
        orphaned = math.inf  # when torchrun was first found gone
        while not self._ended.wait(self.heartbeat_timeout / POLLS):
            now = time.monotonic()
            was_stopped = now - last_poll > self.heartbeat_timeout  # suspended, e.g. by Ctrl-Z: not a hang
            last_poll = now
            if launcher is not None and os.getppid() != launcher:
                self.preemption.requested = True
                orphaned = min(orphaned, now)
                if now - orphaned > self.heartbeat_timeout:
                    self._end("its launcher, torchrun, is gone")
            beats = self._exchange()
            if beats is None:
                return
            seen = [last if beat == last[0] else (beat, now) for beat, last in zip(beats, seen)]
            current = (self.sync_points, self.ticks)
            if was_stopped or current != progress:
                progress, since = current, now
            parsed = [Heartbeat(*json.loads(beat)) for beat in beats]
            self._judge(parsed, [now - first for _, first in seen], now - since)

    def _exchange(self) -> list[str] | None:
        """Send a heartbeat, and return those of all ranks; None if the run has ended and rank 0 is gone."""
        if get_world_size() == 1:
            return [self._beat(RUNNING)]
        ranks = [str(rank) for rank in range(get_world_size())]
        # The store's own timeout has no effect if rank 0 is suspended.
        timer = threading.Timer(2 * self.heartbeat_timeout, self._end_unless_done, ["process 0 does not respond"])
        timer.daemon = True
        timer.start()
        try:
            self._send(RUNNING)
            return [beat.decode() for beat in self._store.multi_get(ranks)]
        except RuntimeError as error:
            self._end_unless_done(f"process 0 does not respond ({' '.join(str(error).split())[:120]})")
            return None
        finally:
            timer.cancel()

    def _judge(self, beats: list[Heartbeat], ages: list[float], stalled: float) -> None:
        """End this process if it hangs or another rank is lost.

        Args:
            beats: the ranks' last heartbeats.
            ages: seconds since each heartbeat was first seen.
            stalled: seconds since this process made progress.
        """
        self.preemption.requested |= any(beat.preempted for beat in beats)
        for rank, (beat, age) in enumerate(zip(beats, ages)):
            who = f"process {rank} ({beat.host}), last seen at {beat.position},"
            if beat.has_failed() and age > self.heartbeat_timeout / POLLS:  # leaves time for this rank's own error
                status = 1 if beat.state == FAILED else RESUME_STATUS
                self._end(f"{who} {beat.state} ({beat.cause})", status)
            if beat.state == RUNNING and age > self.heartbeat_timeout:
                self._end(f"{who} has sent no heartbeat for {age:.0f} s")
        if stalled > self._hang_timeout():
            fewest = min(beat.ticks for beat in beats)
            hanging = [
                f"process {rank} ({beat.host}) hangs at {beat.position}"
                for rank, beat in enumerate(beats)
                if beat.ticks == fewest
            ]
            self._end(f"{', '.join(hanging)}: no progress for {stalled:.0f} s")

    def _end_unless_done(self, what: str) -> None:
        """End this process, unless the run has ended."""
        if not self._ended.is_set():
            self._end(what)

    def _end(self, what: str, status: int = RESUME_STATUS) -> NoReturn:
        """End this process. The status is 1 if another rank failed with an error that would recur."""
        cause = "" if status == RESUME_STATUS else "fix the error that it printed, then "
        who = f"process {get_rank()}: " if get_world_size() > 1 else ""
        line = one_line(f"{who}{with_flags(what, self.flags)}; {cause}{self.advice}")
        print(f"{self.preemption.command}: {line}", file=sys.stderr, flush=True)
        os._exit(status)  # the main thread may be waiting for the lost rank in native code
