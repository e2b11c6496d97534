"""Start a script in several processes with torchrun, and silence torchrun's own messages.

    python launch.py SCRIPT PROCESSES ARGUMENT…

Environment variables: PORT (29500), NNODES (1), NODE_RANK (0) and MASTER_ADDR (127.0.0.1) set the rendezvous.
MAX_RESTARTS (0) limits restarts after failures. After a signal, processes have GRACE (600) seconds to end. The exit
status is 75, "run the same command again", if the run was stopped or the first process to fail was killed; 130 after
Ctrl-C; 2 for a user's mistake; and 1 after other failures.
"""

import errno
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from sepvit_lib.common.errors import INTERRUPT_STATUS, RESUME_STATUS, USER_ERROR_STATUS, UserError
from sepvit_lib.common.processes import environment_number

NAME = "launch.sh"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")  # torchrun forwards them to the processes
REPORTED = (USER_ERROR_STATUS, RESUME_STATUS, INTERRUPT_STATUS)  # processes have printed the reason for these


def launch(script: str, processes: str, arguments: list[str]) -> int:
    """Start a script in several processes, and wait for them.

    Args:
        script: path of the script.
        processes: number of processes on this node, checked by launch.sh.
        arguments: arguments of the script.

    Returns:
        the exit status.

    Raises:
        UserError: an environment variable is invalid, or the port is in use.
    """
    nodes, port = (
        environment_number("NNODES", 1, minimum=1),
        environment_number("PORT", 29500, minimum=1, maximum=65535),
    )
    rank = environment_number("NODE_RANK", 0, maximum=nodes - 1)
    restarts = environment_number("MAX_RESTARTS", 0)
    if rank == 0:
        check_port(port)
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun's log repeats what is reported below
    if int(processes) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would set it too, but with a warning
    wait_after_signals(environment_number("GRACE", 600))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        nodes_and_rank = f"--nnodes={nodes} --node_rank={rank} --master_addr={address} --master_port={port}"
        settings = f"--nproc_per_node={processes} --max_restarts={restarts} --signals_to_handle={','.join(SIGNALS)}"
        run.main([*f"{nodes_and_rank} {settings}".split(), script, *arguments])
    except ChildFailedError as error:
        return status_of(error)
    except SignalException as error:
        return INTERRUPT_STATUS if error.sigval == signal.SIGINT else RESUME_STATUS
    return 0


def wait_after_signals(grace: int) -> None:
    """Make torchrun wait longer than its default of 30 s after a signal, so that processes can finish a step and save.

    Args:
        grace: the time to wait, in seconds.
    """
    close = PContext.close

    def patient_close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        is_stopping = isinstance(sys.exc_info()[1], SignalException)  # not after a failure of a process
        close(self, death_sig, grace if is_stopping else timeout)

    PContext.close = patient_close  # type: ignore[method-assign]


def check_port(port: int) -> None:
    """Refuse a port that is not free.

    Raises:
        UserError: the port is in use, or needs privileges.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        problem = "taken by another run or program" if error.errno == errno.EADDRINUSE else f"not usable ({error})"
        raise UserError(f"PORT={port}: {problem}; choose another, such as PORT={port % 65535 + 1}") from None


def status_of(error: ChildFailedError) -> int:
    """Return the exit status after a failure. Prints the cause, unless the process has printed it itself."""
    rank, first = error.get_first_failure()
    status = first.exitcode
    if status in REPORTED:
        return status
    cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    print(f"{NAME}: process {rank} {cause}; the others were stopped", file=sys.stderr, flush=True)
    return RESUME_STATUS if status < 0 else 1


def main() -> int:
    """Run the command. Returns its exit status."""
    try:
        return launch(sys.argv[1], sys.argv[2], sys.argv[3:])
    except UserError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return USER_ERROR_STATUS


if __name__ == "__main__":
    sys.exit(main())
