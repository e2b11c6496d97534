"""Run train.py of segmentation or detection with faults in its training steps; see injected.py and sabotage.py.

KIND=segmentation or KIND=detection chooses the command.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import injected
from mmengine.model import BaseModel

from sepvit_lib.common.storage import with_retries
from sepvit_lib.mm import image_loading, training_run
from sepvit_lib.mm.commands.train import build_train_parser, run_training

parse_losses = BaseModel.parse_losses


def parse_losses_with_faults(self, losses):
    injected.before_loss()
    loss, logged = parse_losses(self, losses)
    return injected.spoiled(loss), logged


BaseModel.parse_losses = parse_losses_with_faults
if "LAG" in os.environ:
    training_run.flag_delay = lambda: int(os.environ["LAG"])
if "PAUSES" in os.environ:
    image_loading.with_retries = partial(with_retries, pauses=tuple(map(int, os.environ["PAUSES"].split(","))))
importlib.import_module(f"{os.environ['KIND']}.train")
sys.exit(run_training(build_train_parser(None)))
