"""Evaluate a detector, write its detections, or draw them.

    python test.py CONFIG CHECKPOINT [--eval bbox [segm]] [--report] [--aug-test] [--out FILE.pkl]
                                     [--format-only] [--show-dir DIR] [--show-score-thr SCORE] [--work-dir DIR]
                                     [--cfg-options KEY=VALUE …] [--launcher pytorch|slurm]

`--eval mAP` evaluates boxes, and masks if the model predicts them. dist_test.sh and slurm_test.sh start this command
in several processes.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import METRICS as METRICS_OF

from detection.drawing import DrawingHook
from detection.report import DetectionReportHook
from sepvit_lib.common.command_line import Parser, fraction, path
from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.commands.test import Result, as_configured, build_test_parser, run_testing
from sepvit_lib.mm.config_lookup import as_list, dicts, is_kind, resolve

METRICS = ("bbox", "segm", "mAP")


def build_detection_test_parser() -> Parser:
    """Make the parser of test.py."""
    parser = build_test_parser(__doc__, METRICS)
    add = parser.add_argument
    add("--out", type=path, metavar="FILE.pkl", help="write the detections to a file")
    add("--format-only", action="store_true", help="write the detections in COCO's format to the work dir")
    add("--show-score-thr", type=fraction, default=0.3, metavar="SCORE", help="lowest score to draw, default 0.3")
    return parser


def prepare(cfg: Config, args: argparse.Namespace) -> list[Result]:
    """Set the config's evaluators, which compute metrics or write files. Returns the outputs other than metrics.

    Raises:
        UserError: no output is requested, or settings exclude each other.
    """
    if not (args.eval or args.out or args.format_only or args.show_dir or args.report):
        return as_configured(cfg, "--eval bbox, --report, --out FILE.pkl, --format-only or --show-dir DIR")
    if (args.eval or args.report) and args.format_only:
        raise UserError(f"{'--eval' if args.eval else '--report'} and --format-only: choose one")
    if args.out and Path(args.out).suffix not in (".pkl", ".pickle"):
        raise UserError(f"--out {args.out}: takes the name of a .pkl file")
    metrics = requested_metrics(cfg, args.eval or ["mAP"] * args.report)
    evaluators: list[dict[str, Any]] = []
    if metrics or args.format_only:
        settings = dict(metric=metrics or possible_metrics(cfg), format_only=args.format_only)
        if args.format_only:
            settings["outfile_prefix"] = str(Path(cfg.work_dir) / "results")
        if args.report:  # its names of figures state COCO's thresholds
            settings |= dict(iou_thrs=None, use_mp_eval=False)
        evaluators = [{**one, **settings} for one in as_list(cfg.test_evaluator) if is_coco(one)]
        if not evaluators:
            flag = "--format-only" if args.format_only else f"--eval {' '.join(args.eval)}" if args.eval else "--report"
            problem = "needs a CocoMetric as test_evaluator in the config"
            raise UserError(f"{flag}: {problem}; without the flag, the config's own evaluators are used")
    if args.out:
        evaluators.append(dict(type="DumpDetResults", out_file_path=args.out))
    cfg.test_evaluator = evaluators  # drawing needs no evaluator
    draw = partial(DrawingHook, lowest=args.show_score_thr)
    return [
        (None, args.out and Path(args.out).parent, f"--out {args.out}"),
        (draw, args.show_dir and Path(args.show_dir), f"--show-dir {args.show_dir}"),
        (DetectionReportHook, Path(cfg.work_dir) / "report" if args.report else None, "--report"),
    ]


def is_coco(evaluator: dict[str, Any]) -> bool:
    """Whether an evaluator's class is CocoMetric or derived from it."""
    kind = resolve(METRICS_OF, evaluator)
    return kind is not None and is_kind(kind, "mmdet.evaluation.metrics.coco_metric.CocoMetric")


def possible_metrics(cfg: Config) -> list[str]:
    """Return the metrics that apply to a config's model: those of its evaluators, and 'segm' if it has a mask head."""
    stated = [metric for one in dicts(cfg.test_evaluator) for metric in as_list(one.get("metric"))]
    masks = ["segm"] if "mask_head" in cfg.model.get("roi_head", {}) else []
    return [metric for metric in ("bbox", "segm") if metric in stated + masks] or ["bbox"]


def requested_metrics(cfg: Config, names: list[str]) -> list[str]:
    """Return the metrics that `--eval` requests. 'mAP' selects all metrics that apply to the model.

    Raises:
        UserError: a metric needs masks that the detector does not predict.
    """
    possible, metrics = possible_metrics(cfg), []
    for metric in names:
        metrics += possible if metric == "mAP" else [metric]
    if "segm" in metrics and "segm" not in possible:
        raise UserError(f"--eval segm: {cfg.model.type} predicts no masks; choose bbox")
    return list(dict.fromkeys(metrics))


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_testing(build_detection_test_parser(), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
