"""The test command of segmentation and detection."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

from dense.data import check_data
from dense.runner import DenseRunner
from dense.settings import (
    FORMER_OF_TESTING,
    CommandParser,
    build_parser,
    join_processes,
    read_config,
    read_model_checkpoint,
)
from training.commands import run_command
from training.errors import UserError
from training.processes import on_main_process
from training.storage import make_folder

# Sets in the config what is done with the predictions, and returns hooks of the runner for the rest.
Prepare = Callable[[Config, argparse.Namespace], list[Hook]]


def build_test_parser(description: str | None, metrics: Sequence[str]) -> CommandParser:
    """Make the parser of test.py, with the settings common to segmentation and detection.

    Args:
        description: what the command does.
        metrics: names of the metrics.
    """
    parser = build_parser(description, former=FORMER_OF_TESTING)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of the whole segmentor or detector")
    add("--eval", nargs="+", default=[], metavar="METRIC", help=f"one or more of {', '.join(metrics)}")
    add("--aug-test", action="store_true", help="test-time augmentation (scales, flips) of the config's tta_pipeline")
    return parser


def find_metric(name: str, metrics: Sequence[str]) -> str:
    """Find a metric of `--eval` by its name, in upper or lower case.

    Raises:
        UserError: the metric is unknown.
    """
    for metric in metrics:
        if metric.lower() == name.lower():
            return metric
    raise UserError(f"--eval {name}: unknown; choose from {', '.join(metrics)}")


def test(args: argparse.Namespace, prepare: Prepare) -> None:
    """Test a segmentor or detector.

    Args:
        args: the command line.
        prepare: see `Prepare`.
    """
    cfg = read_config(args)
    join_processes(args)
    hooks = prepare(cfg, args)
    if args.aug_test:
        augment(cfg, args.config)
    check_data(cfg, "test_dataloader")
    checkpoint = read_model_checkpoint(cfg, args.checkpoint, "CHECKPOINT")
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.load_from, cfg.resume = args.checkpoint, False
    on_main_process(lambda: make_folder(Path(cfg.work_dir), f"--work-dir {cfg.work_dir}"))
    runner = DenseRunner.from_config(cfg, {args.checkpoint: checkpoint})
    for hook in hooks:
        runner.register_hook(hook)
    runner.test()


def augment(cfg: Config, path: str) -> None:
    """Switch a config's test-time augmentation on.

    Args:
        cfg: the config.
        path: its file, for messages.

    Raises:
        UserError: the config has none.
    """
    if not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        hint = "remove the flag, or set both as segmentation/configs/_base_/ade20k.py does"
        raise UserError(f"--aug-test: CONFIG {path} has no tta_model and tta_pipeline; {hint}")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def run_testing(parser: CommandParser, prepare: Prepare, arguments: list[str] | None = None) -> int:
    """Run test.py. Returns its exit status."""
    return run_command("test.py", lambda: test(parser.parse_args(arguments), prepare), parser)
