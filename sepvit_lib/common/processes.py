"""The processes of a run: joining the process group, printing, and collective calls.

Every rank must make each collective call. If the run has a single process, such a call returns immediately.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from sepvit_lib.common.errors import LocalError, MachineError, UserError, one_line, setting

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------------------
# Joining
# ----------------------------------------------------------------------------------------------------------------------


def environment_number(name: str, default: int, minimum: int = 0, maximum: int | None = None) -> int:
    """Read an integer from an environment variable, such as one set by a launcher.

    Args:
        name: the variable.
        default: the number if the variable is not set.
        minimum: lowest valid number.
        maximum: highest valid number, None for no limit.

    Raises:
        LocalError: the value is not an integer in this range.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < minimum or (maximum is not None and int(text) > maximum):
        bounds = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"
        raise LocalError(f"environment variable {name}={text}: must be an integer {bounds}; correct or unset it")
    return int(text)


def _launcher_variables() -> dict[str, str]:
    """Derive torchrun's environment variables from SLURM's. Returns {} outside a SLURM job step with several tasks."""
    if "RANK" in os.environ:
        return {}
    if "SLURM_PROCID" not in os.environ or environment_number("SLURM_NTASKS", 1, minimum=1) < 2:
        return {}
    variables = dict(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
    )
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "localhost")
        variables["MASTER_ADDR"] = _first_node(nodes)
    if "MASTER_PORT" not in os.environ:
        # The same port for all tasks of a job, and different ports for different jobs on a node.
        variables["MASTER_PORT"] = str(20000 + environment_number("SLURM_JOB_ID", 0) % 20000)
    return variables


def _first_node(nodes: str) -> str:
    """The first host of a SLURM node list such as 'gpu[03-05,9],cpu1'."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"SLURM node list {nodes}: `{' '.join(command)}` failed ({error}); set MASTER_ADDR") from None


def init_distributed(device: str, world_size: int, dist_url: str, timeout: float = 1800.0) -> torch.device:
    """Join the process group if torchrun, torch.distributed.launch or SLURM started several processes.

    Args:
        device: 'cuda', 'mps' or 'cpu', optionally with an index ('cuda:1'). CUDA processes communicate via nccl, others
            via gloo.
        world_size: number of processes if the environment does not set it.
        dist_url: rendezvous address; `env://` uses MASTER_ADDR and MASTER_PORT.
        timeout: seconds that a collective call waits for the other ranks.

    Returns:
        this process's device. A GPU becomes CUDA's current device.

    Raises:
        UserError: the environment does not set the rank or the address, or the address has an unknown scheme.
        MachineError: the processes cannot connect to each other.
    """
    os.environ.update(_launcher_variables())
    if device == "cuda":
        device = f"cuda:{environment_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if world_size > 1:
            raise UserError(
                f"{setting('world_size', world_size)}: RANK is not set; start the processes with torchrun or srun"
            )
        return torch.device(device)
    world_size = environment_number("WORLD_SIZE", world_size, minimum=1)
    rank = environment_number("RANK", 0, maximum=world_size - 1)
    if not re.match("(env|tcp|file)://", dist_url):
        raise UserError(f"{setting('dist_url', dist_url)}: unknown; choose env://, tcp://HOST:PORT or file://PATH")
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=limit,
            **_rendezvous(dist_url, limit),
        )
    except ValueError as error:
        raise UserError(f"{setting('dist_url', dist_url)}: not a rendezvous address ({error})") from None
    except dist.DistNetworkError as error:
        raise MachineError(
            f"the processes cannot connect to each other ({str(error).splitlines()[0]}); if this persists, "
            "check MASTER_ADDR and choose a different MASTER_PORT"
        ) from None
    return torch.device(device)


def _rendezvous(dist_url: str, timeout: timedelta) -> dict[str, Any]:
    """Rendezvous arguments for `init_process_group`."""
    is_one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"  # several nodes may differ in their restart counts
    if dist_url == "env://" and is_one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store survives restarts, and still contains addresses of dead processes. A prefix hides these.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
        return dict(store=dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store))
    return dict(init_method=dist_url)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes. Also works before the process group is joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not rank.isdigit() or int(rank) == 0  # with an invalid rank, every process reports the mistake


# ----------------------------------------------------------------------------------------------------------------------
# Printing
# ----------------------------------------------------------------------------------------------------------------------


def print_line(line: str) -> None:
    """Print a line, above a progress bar if there is one."""
    tqdm.write(one_line(line), file=sys.stdout)
    sys.stdout.flush()


def print_main(line: str) -> None:
    """Print a line on rank 0."""
    if is_main_process():
        print_line(line)


# ----------------------------------------------------------------------------------------------------------------------
# Collective calls
# ----------------------------------------------------------------------------------------------------------------------


def on_processes(function: Callable[[], None], here: bool) -> None:
    """Run a function on some ranks. If it fails on one, the call fails on all, so that no rank waits for a failed one.

    Args:
        function: the function.
        here: whether this rank runs it.

    Raises:
        UserError: raised by the function, on all ranks.
        Exception: any other error that the function raised on this rank.
        RuntimeError: the function raised such an error on a different rank. The text describes that error.
    """
    failure: Exception | None = None
    if here:
        try:
            function()
        except Exception as error:  # of any type: the other ranks are waiting
            failure = error
    if get_world_size() > 1:
        sent = failure if failure is None or isinstance(failure, UserError) else RuntimeError(repr(failure))
        failures: list[Exception | None] = [None] * get_world_size()
        dist.all_gather_object(failures, sent)
        failure = failure or next((other for other in failures if other is not None), None)
    if failure is not None:
        raise failure


def on_main_process(function: Callable[[], None]) -> None:
    """Run a function on rank 0. If it fails, the call fails on all ranks.

    Raises:
        UserError: raised by the function.
    """
    on_processes(function, is_main_process())


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(values: Tensor) -> Tensor:
    """Copy rank 0's tensor to all ranks, in place."""
    if get_world_size() > 1:
        dist.broadcast(values, 0)
    return values


def any_rank(device: torch.device, value: bool) -> bool:
    """Logical OR over all ranks.

    Args:
        device: the process's device.
        value: this rank's value.
    """
    return bool(all_reduce(torch.tensor(float(value), device=device)))


def all_gather(values: Sequence[T]) -> list[T]:
    """Concatenate the values of all ranks, in the order of the ranks."""
    if get_world_size() == 1:
        return list(values)
    parts: list[Sequence[T]] = [()] * get_world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]
