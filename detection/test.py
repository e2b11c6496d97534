"""Evaluate a detector, keep its detections, or draw them.

    python test.py CONFIG CHECKPOINT [--eval bbox [segm]] [--aug-test] [--out FILE.pkl] [--format-only]
                                     [--show-dir DIR] [--show-score-thr SCORE] [--work-dir DIR]
                                     [--cfg-options KEY=VALUE …] [--launcher pytorch|slurm|mpi]

`--eval mAP` evaluates all the model gives: boxes, and masks where it has them. dist_test.sh and slurm_test.sh start it
on several processes.
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
from training.commands import fraction
from utils import UserError

METRICS = ("bbox", "segm", "mAP")


def build_detection_test_parser() -> CommandParser:
    """The parser of test.py."""
    parser = build_test_parser(__doc__, METRICS)
    add = parser.add_argument
    add("--out", metavar="FILE.pkl", help="write the detections there")
    add("--format-only", action="store_true", help="write the detections in COCO's format to the work dir")
    add("--show-dir", metavar="DIR", help="draw the detections there, beside the truth")
    add("--show-score-thr", type=fraction, default=0.3, metavar="SCORE", help="least score that is drawn, default 0.3")
    return parser


def prepare(cfg: Config, args: argparse.Namespace) -> list[Hook]:
    """Set what is done with the detections.

    Raises:
        UserError: nothing is, or something that cannot be.
    """
    if not (args.eval or args.out or args.format_only or args.show_dir):
        raise UserError("nothing to do: give --eval bbox, --out FILE.pkl, --format-only or --show-dir DIR")
    if args.eval and args.format_only:
        raise UserError("--eval and --format-only: choose one")
    if args.out and Path(args.out).suffix not in (".pkl", ".pickle"):
        raise UserError(f"--out {args.out}: takes the name of a .pkl file")
    metrics = metrics_of(cfg, args.eval)
    evaluators = []
    if metrics or args.format_only:
        prefix = str(Path(cfg.work_dir) / "results") if args.format_only else None
        settings = dict(metric=metrics or given(cfg), format_only=args.format_only, outfile_prefix=prefix)
        evaluators.append({**cfg.test_evaluator, **settings})
    if args.out:
        utils.on_main_process(lambda: utils.make_folder(Path(args.out).parent, "--out"))
        evaluators.append(dict(type="DumpDetResults", out_file_path=args.out))
    cfg.test_evaluator = evaluators  # to draw alone takes none
    if args.show_dir:
        folder = Path(args.show_dir).resolve()
        utils.on_main_process(lambda: utils.make_folder(folder, "--show-dir"))
        hook = dict(draw=True, test_out_dir=str(folder), score_thr=args.show_score_thr)
        cfg.default_hooks.visualization = dict(type="DetVisualizationHook", **hook)
    return []


def given(cfg: Config) -> list[str]:
    """What the model of a config gives: boxes, and masks where it has a head for them."""
    return ["bbox", "segm"] if "mask_head" in cfg.model.get("roi_head", {}) else ["bbox"]


def metrics_of(cfg: Config, names: list[str]) -> list[str]:
    """The metrics that `--eval` asks for; 'mAP' stands for all the model gives.

    Raises:
        UserError: an unknown one, or masks of a detector that has none.
    """
    metrics = []
    for name in names:
        known = next((metric for metric in METRICS if metric.lower() == name.lower()), None)
        if known is None:
            raise UserError(f"--eval {name}: unknown; choose from {', '.join(METRICS)}")
        metrics += given(cfg) if known == "mAP" else [known]
    if "segm" in metrics and "segm" not in given(cfg):
        raise UserError(f"--eval segm: {cfg.model.type} gives no masks; choose bbox")
    return list(dict.fromkeys(metrics))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_testing(build_detection_test_parser(), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
