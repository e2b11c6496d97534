"""Evaluate a segmentor, write its predictions, or draw them.

    python test.py CONFIG CHECKPOINT [--eval mIoU [mDice] [mFscore]] [--report] [--aug-test] [--out DIR]
                                     [--show-dir DIR] [--work-dir DIR] [--cfg-options KEY=VALUE …]
                                     [--launcher pytorch|slurm]

dist_test.sh and slurm_test.sh start this command in several processes.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config

from segmentation.drawing import DrawingHook, LabelsHook
from segmentation.report import SegmentationReportHook
from sepvit_lib.common.command_line import Parser, path
from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.commands.test import Result, as_configured, build_test_parser, run_testing
from sepvit_lib.mm.config_lookup import dicts

METRICS = ("mIoU", "mDice", "mFscore")


def build_segmentation_test_parser() -> Parser:
    """Make the parser of test.py."""
    parser = build_test_parser(__doc__, METRICS)
    labels = "write the predicted labels to DIR, as PNG in the data set's numbering"
    parser.add_argument("--out", type=path, metavar="DIR", help=labels)
    return parser


def prepare(cfg: Config, args: argparse.Namespace) -> list[Result]:
    """Set the metrics in the config. Returns the outputs other than metrics.

    Raises:
        UserError: no output is requested.
    """
    if not (args.eval or args.out or args.show_dir or args.report):
        return as_configured(cfg, "--eval mIoU, --report, --out DIR or --show-dir DIR")
    if args.out and Path(args.out).suffix in (".pkl", ".pickle"):
        raise UserError(f"--out {args.out}: takes a folder of PNGs (the predicted labels); remove the suffix")
    metrics = list(dict.fromkeys(args.eval + ["mIoU"] * args.report))
    usual: dict[str, Any] = next((one for one in dicts(cfg.test_evaluator) if one.get("type") == "IoUMetric"), {})
    settings = dict(usual, type="IoUMetric", iou_metrics=metrics)
    cfg.test_evaluator = settings if metrics else []  # drawing and writing need no evaluator
    return [
        (LabelsHook, args.out and Path(args.out), f"--out {args.out}"),
        (DrawingHook, args.show_dir and Path(args.show_dir), f"--show-dir {args.show_dir}"),
        (SegmentationReportHook, Path(cfg.work_dir) / "report" if args.report else None, "--report"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_testing(build_segmentation_test_parser(), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
