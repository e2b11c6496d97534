"""Train a detector.

    python train.py CONFIG [--work-dir DIR] [--resume [PATH]] [--load-from PATH] [--from-scratch] [--amp]
                           [--no-validate] [--auto-scale-lr] [--seed N] [--deterministic]
                           [--class-weights balanced|FILE] [--cfg-options KEY=VALUE …] [--launcher pytorch|slurm]

dist_train.sh and slurm_train.sh start this command in several processes.
"""

if not __package__:
    import _repository  # noqa: F401
import sys

from sepvit_lib.mm.commands.train import build_train_parser, run_training

if __name__ == "__main__":
    sys.exit(run_training(build_train_parser(__doc__)))
