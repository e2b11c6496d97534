"""Evaluate a segmentor, keep its predictions, or draw them.

    python test.py CONFIG CHECKPOINT [--eval mIoU [mDice] [mFscore]] [--aug-test] [--out DIR] [--show-dir DIR]
                                     [--work-dir DIR] [--cfg-options KEY=VALUE …] [--launcher pytorch|slurm|mpi]

dist_test.sh and slurm_test.sh start it on several processes.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from dense.settings import CommandParser
from dense.test import build_test_parser, run_testing
from segmentation.drawing import DrawingHook
from utils import UserError

METRICS = ("mIoU", "mDice", "mFscore")


def build_segmentation_test_parser() -> CommandParser:
    """The parser of test.py."""
    parser = build_test_parser(__doc__, METRICS)
    parser.former["--format-only"] = "the predicted labels are written by --out DIR"
    add = parser.add_argument
    add("--out", metavar="DIR", help="write the predicted labels there, as PNG in the data set's numbering")
    add("--show-dir", metavar="DIR", help="draw the predictions there, beside the truth")
    return parser


def prepare(cfg: Config, args: argparse.Namespace) -> list[Hook]:
    """Set what is done with the predictions.

    Raises:
        UserError: nothing is, or something that cannot be.
    """
    if not (args.eval or args.out or args.show_dir):
        raise UserError("nothing to do: give --eval mIoU, --out DIR or --show-dir DIR")
    if args.out and Path(args.out).suffix in (".pkl", ".pickle"):
        raise UserError(f"--out {args.out}: takes a folder of PNGs, the predicted labels; name it without the ending")
    metrics = [next((known for known in METRICS if known.lower() == name.lower()), name) for name in args.eval]
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"--eval {name}: unknown; choose from {', '.join(METRICS)}")
    for flag, folder in (("--out", args.out), ("--show-dir", args.show_dir)):
        if folder:
            utils.on_main_process(lambda flag=flag, folder=folder: utils.make_folder(Path(folder), flag))
    evaluator = cfg.test_evaluator if cfg.test_evaluator.get("type") == "IoUMetric" else dict(type="IoUMetric")
    evaluator |= dict(iou_metrics=metrics, output_dir=args.out, format_only=not metrics)
    cfg.test_evaluator = evaluator if metrics or args.out else []  # to draw alone takes none
    return [DrawingHook(Path(args.show_dir))] if args.show_dir else []


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_testing(build_segmentation_test_parser(), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
