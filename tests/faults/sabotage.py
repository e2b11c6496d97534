"""main.py, but with steps that go wrong.

BAD_LOSS, BAD_GRADIENTS, HANG, FAIL and CUT_OFF say where, by process:batch,batch,…, counted from 1 in each start.
LAG=1 makes the processes read what happened in a step one step later, as on GPUs; PAUSES=1,1 has them wait twice, for a
second each, for storage that does not answer.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import engine
import main
from training import samples
from utils import get_rank

calls = 0
forward = engine.DistillationLoss.forward


def is_meant(variable: str) -> bool:
    """Whether a variable names this process and batch."""
    process, _, batches = os.environ.get(variable, ":").partition(":")
    return process == str(get_rank()) and str(calls) in batches.split(",")


def sabotaged(self, images: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    while is_meant("HANG"):
        time.sleep(1)
    if is_meant("FAIL"):
        raise RuntimeError("out of memory")
    if is_meant("CUT_OFF"):
        raise dist.DistBackendError("NCCL error: unhandled system error, remote process or network")
    loss = forward(self, images, outputs, targets)
    if is_meant("BAD_GRADIENTS"):
        loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss * torch.inf if is_meant("BAD_LOSS") else loss


engine.DistillationLoss.forward = sabotaged
if "LAG" in os.environ:
    main.reading_lag = lambda *_: int(os.environ["LAG"])
if "PAUSES" in os.environ:
    samples.PAUSES = [int(seconds) for seconds in os.environ["PAUSES"].split(",")]
sys.exit(main.run())
