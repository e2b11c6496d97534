"""Devices and processor cores: what is available, and synchronisation."""

import ctypes
import os
import re

import torch

from sepvit_lib.training.errors import UserError, setting


def best_device() -> str:
    """The best kind of device available: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Refuse a device that is not available.

    Args:
        device: PyTorch's name of the device.

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
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, as PyTorch does on GPUs.

    By default, glibc returns blocks of 32 MiB and more to the system, which then has to clear their pages for each
    large activation anew. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work, so that a measured time includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
