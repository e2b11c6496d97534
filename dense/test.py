"""The testing command of segmentation and detection."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

import utils
from dense.runner import DenseRunner
from dense.settings import build_parser, check_data, join_processes, read_config, read_model_checkpoint
from utils import Parser


def build_test_parser(description: str) -> Parser:
    """The parser of test.py, without what it is to do with the predictions."""
    parser = build_parser(description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of the whole segmentor or detector")
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


def run_testing(
    parser: Parser,
    prepare: Callable[[Config, argparse.Namespace], list[Hook]],
    arguments: list[str] | None = None,
) -> int:
    """Run test.py; returns its exit status."""
    return utils.run_command("test.py", lambda: test(parser.parse_args(arguments), prepare))
