"""The devices that a command can be asked to run on."""

import re

import torch

from utils import UserError, best_device


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Args:
        device: what `--device` names.

    Raises:
        UserError: PyTorch's name of a device is another one, or this machine has no such device.
    """
    if not re.fullmatch(r"(cuda|mps|cpu)(:(0|[1-9][0-9]*))?", device):
        raise UserError(f"--device {device}: unknown; choose cuda, mps or cpu")
    kind, _, index = device.partition(":")
    counts = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    if int(index or 0) >= counts[kind]:
        raise UserError(f"--device {device}: not available here; choose {best_device()}")
