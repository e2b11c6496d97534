"""Functions that find devices and processor cores, configure memory allocation, and synchronise devices."""

import ctypes
import os
import re

import torch

from sepvit_lib.common.errors import UserError, setting


def best_device() -> str:
    """The best available device type: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Refuse a device that is not available.

    Args:
        device: PyTorch's name for the device.

    Raises:
        UserError: the name is unknown, or the machine has no such device.
    """
    if not re.fullmatch(r"(cuda|mps|cpu)(:(0|[1-9][0-9]*))?", device):
        raise UserError(f"{setting('device', device)}: unknown; choose cuda, mps or cpu")
    kind, _, index = device.partition(":")
    counts = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    if int(index or 0) >= counts[kind]:
        raise UserError(f"{setting('device', device)}: not available; choose {best_device()}")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt (malloc.h)
MAX_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process reuse the memory of freed tensors, as PyTorch does on GPUs.

    By default, glibc returns blocks of 32 MiB and more to the system, which then clears new pages for each large
    activation. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, MAX_THRESHOLD)


def gpu_memory(device: torch.device) -> dict[str, str]:
    """Peak memory of the tensors on a GPU so far, for a progress line; an empty dict for other devices."""
    if device.type != "cuda":
        return {}
    return {"memory": f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"}


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work, so that a time measurement includes this work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
