"""Faults in training steps, chosen by environment variables.

BAD_LOSS, BAD_GRADIENTS, HANG, FAIL and CUT_OFF select a rank and batches as rank:batch,batch,…, counted from 1 after
each start.
"""

import os
import time

import torch
import torch.distributed as dist

from sepvit_lib.common.processes import get_rank

calls = 0


def is_selected(variable: str) -> bool:
    """Whether an environment variable selects this rank and batch."""
    process, _, batches = os.environ.get(variable, ":").partition(":")
    return process == str(get_rank()) and str(calls) in batches.split(",")


def before_loss() -> None:
    """Count a batch, and hang or fail if it is selected."""
    global calls
    calls += 1
    while is_selected("HANG"):
        time.sleep(1)
    if is_selected("FAIL"):
        raise RuntimeError("out of memory")
    if is_selected("CUT_OFF"):
        raise dist.DistBackendError("NCCL error: unhandled system error, remote process or network")


def spoiled(loss: torch.Tensor) -> torch.Tensor:
    """The loss, or one that is not finite or has gradients that are not, if the batch is selected."""
    if is_selected("BAD_GRADIENTS"):
        loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss * torch.inf if is_selected("BAD_LOSS") else loss
