"""The testing command of segmentation and detection."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

import utils
from dense.runner import DenseRunner
from dense.settings import (
    FORMER_OF_TESTING,
    CommandParser,
    build_parser,
    check_data,
    join_processes,
    read_config,
    read_model_checkpoint,
)
from training.commands import Parser, run_command
from utils import UserError


def build_test_parser(description: str, metrics: Sequence[str]) -> CommandParser:
    """The parser of test.py, without what it is to do with the predictions besides evaluating them by `metrics`."""
    parser = build_parser(description, former=FORMER_OF_TESTING)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of the whole segmentor or detector")
    add("--eval", nargs="+", default=[], metavar="METRIC", help=f"one or more of {', '.join(metrics)}")
    add("--aug-test", action="store_true", help="test-time augmentation (scales, flips), by the config's tta_pipeline")
    return parser


def test(args: argparse.Namespace, prepare: Callable[[Config, argparse.Namespace], list[Hook]]) -> None:
    """Test what the command line says.

    Args:
        args: the command line.
        prepare: sets what is done with the predictions in the config; gives hooks of the runner for the rest.
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
    utils.on_main_process(lambda: utils.make_folder(Path(cfg.work_dir), "--work-dir"))
    runner = DenseRunner.from_config(cfg, {args.checkpoint: checkpoint})
    for hook in hooks:
        runner.register_hook(hook)
    runner.test()


def augment(cfg: Config, path: str) -> None:
    """Set a config's test-time augmentation to be used.

    Raises:
        UserError: it has none.
    """
    if not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        hint = "leave it out, or set them as segmentation/configs/_base_/ade20k.py does"
        raise UserError(f"--aug-test: CONFIG {path} has no tta_model and tta_pipeline; {hint}")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def run_testing(
    parser: Parser,
    prepare: Callable[[Config, argparse.Namespace], list[Hook]],
    arguments: list[str] | None = None,
) -> int:
    """Run test.py; returns its exit status."""
    return run_command("test.py", lambda: test(parser.parse_args(arguments), prepare))
