"""Run main.py with faults in its training steps.

BAD_LOSS, BAD_GRADIENTS, HANG, FAIL and CUT_OFF select a rank and batches as rank:batch,batch,…, counted from 1 after
each start. LAG=1 makes the ranks read the flags of a step one step later, as on GPUs. PAUSES=1,1 makes them retry
twice, after one second each, when the storage does not respond.
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
from training.processes import get_rank

calls = 0
forward = engine.DistillationLoss.forward


def is_selected(variable: str) -> bool:
    """Whether an environment variable selects this rank and batch."""
    process, _, batches = os.environ.get(variable, ":").partition(":")
    return process == str(get_rank()) and str(calls) in batches.split(",")


def forward_with_faults(self, images: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    while is_selected("HANG"):
        time.sleep(1)
    if is_selected("FAIL"):
        raise RuntimeError("out of memory")
    if is_selected("CUT_OFF"):
        raise dist.DistBackendError("NCCL error: unhandled system error, remote process or network")
    loss = forward(self, images, outputs, targets)
    if is_selected("BAD_GRADIENTS"):
        loss.register_hook(lambda gradient: gradient * torch.inf)
    return loss * torch.inf if is_selected("BAD_LOSS") else loss


engine.DistillationLoss.forward = forward_with_faults  # type: ignore[method-assign]
if "LAG" in os.environ:
    main.flag_delay = lambda *_: int(os.environ["LAG"])
if "PAUSES" in os.environ:
    samples.PAUSES = tuple(map(int, os.environ["PAUSES"].split(",")))  # type: ignore[assignment]
sys.exit(main.run())
