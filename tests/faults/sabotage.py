"""Run small_main.py with faults in its training steps; see injected.py.

LAG=1 makes the ranks read the flags of a step one step later, as on GPUs. PAUSES=1,1 makes them retry twice, after one
second each, when the storage does not respond. SLOW_SAVING=2 makes writing a checkpoint take two seconds more.
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import injected
import small_model  # noqa: F401 registers the model

import engine
import main
from sepvit_lib.pipeline import samples
from sepvit_lib.run import checkpoints

forward = engine.DistillationLoss.forward


def forward_with_faults(self, images: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    injected.before_loss()
    return injected.spoiled(forward(self, images, outputs, targets))


write_file = checkpoints.write_file


def write_file_slowly(*arguments):
    time.sleep(float(os.environ["SLOW_SAVING"]))
    write_file(*arguments)


engine.DistillationLoss.forward = forward_with_faults  # type: ignore[method-assign]
if "LAG" in os.environ:
    main.flag_delay = lambda *_: int(os.environ["LAG"])
if "PAUSES" in os.environ:
    samples.PAUSES = tuple(map(int, os.environ["PAUSES"].split(",")))  # type: ignore[assignment]
if "SLOW_SAVING" in os.environ:
    checkpoints.write_file = write_file_slowly
sys.exit(main.run())
