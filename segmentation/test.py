"""Evaluate a segmentor, write its predictions, or draw them.

    python test.py CONFIG CHECKPOINT [--eval mIoU [mDice] [mFscore]] [--aug-test] [--out DIR] [--show-dir DIR]
                                     [--work-dir DIR] [--cfg-options KEY=VALUE …] [--launcher pytorch|slurm|mpi]

dist_test.sh and slurm_test.sh start it on several processes.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

if not __package__:
    import _repository  # noqa: F401
from dense.settings import CommandParser
from dense.test import build_test_parser, find_metric, run_testing
from segmentation.drawing import DrawingHook
from training.errors import UserError
from training.processes import on_main_process
from training.storage import make_folder

METRICS = ("mIoU", "mDice", "mFscore")


def build_segmentation_test_parser() -> CommandParser:
    """Make the parser of test.py."""
    parser = build_test_parser(__doc__, METRICS)
    parser.former["--format-only"] = "use --out DIR, which writes the predicted labels"
    add = parser.add_argument
    add("--out", metavar="DIR", help="write the predicted labels to DIR, as PNG in the data set's numbering")
    add("--show-dir", metavar="DIR", help="draw the predictions beside the truth, in DIR")
    return parser


def prepare(cfg: Config, args: argparse.Namespace) -> list[Hook]:
    """Set in the config what is done with the predictions. Returns hooks of the runner for the rest.

    Raises:
        UserError: nothing is to be done, a metric is unknown, or a folder is not writable.
    """
    if not (args.eval or args.out or args.show_dir):
        raise UserError("nothing to do: give --eval mIoU, --out DIR or --show-dir DIR")
    if args.out and Path(args.out).suffix in (".pkl", ".pickle"):
        raise UserError(f"--out {args.out}: takes a folder of PNGs (the predicted labels); remove the ending")
    metrics = [find_metric(name, METRICS) for name in args.eval]
    folders = {flag: folder for flag, folder in (("--out", args.out), ("--show-dir", args.show_dir)) if folder}

    def make_folders() -> None:
        for flag, folder in folders.items():
            make_folder(Path(folder), f"{flag} {folder}")

    on_main_process(make_folders)
    evaluator = cfg.test_evaluator if cfg.test_evaluator.get("type") == "IoUMetric" else dict(type="IoUMetric")
    evaluator |= dict(iou_metrics=metrics, output_dir=args.out, format_only=not metrics)
    cfg.test_evaluator = evaluator if metrics or args.out else []  # drawing needs none
    return [DrawingHook(Path(args.show_dir))] if args.show_dir else []


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_testing(build_segmentation_test_parser(), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
