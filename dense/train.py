"""The training command of segmentation and detection."""

import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from dense.runner import DenseRunner
from dense.settings import (
    FORMER_OF_TRAINING,
    CommandParser,
    build_parser,
    check_data,
    drop_pretrained,
    join_processes,
    read_config,
    read_model_checkpoint,
)
from training.commands import run_command
from training.errors import UserError
from training.processes import on_main_process, print_main
from training.storage import make_folder


def build_train_parser(description: str | None) -> CommandParser:
    """Make the parser of train.py."""
    parser = build_parser(description, former=FORMER_OF_TRAINING)
    add = parser.add_argument
    add("--resume", nargs="?", const="", metavar="PATH",
        help="resume from a checkpoint; without PATH, from the newest in the work dir, if there is one")  # fmt: skip
    add("--load-from", metavar="PATH", help="start from the weights of a whole segmentor or detector")
    add("--from-scratch", action="store_true", help="start from random weights, without a pretrained backbone")
    add("--amp", action="store_true", help="mixed precision (float16 with loss scaling)")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate to the number of images per step")
    add("--no-validate", action="store_true", help="do not validate during training")
    add("--seed", type=int, default=None)
    add("--deterministic", action="store_true")
    return parser


def train(args: argparse.Namespace) -> None:
    """Train a segmentor or detector.

    Args:
        args: the command line.
    """
    cfg = read_config(args)
    join_processes(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    cfg.randomness = dict(seed=args.seed, deterministic=args.deterministic)
    if args.amp and cfg.optim_wrapper.type != "AmpOptimWrapper":
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: CONFIG {args.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    check_data(cfg, *(["train_dataloader"] if args.no_validate else ["train_dataloader", "val_dataloader"]))
    checkpoints = set_starting_point(cfg, args)
    on_main_process(lambda: make_folder(Path(cfg.work_dir), f"--work-dir {cfg.work_dir}"))
    runner = DenseRunner.from_config(cfg, checkpoints)
    runner.train()
    print_main(f"trained: checkpoints and logs are in {cfg.work_dir}")


def set_starting_point(cfg: Config, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Set what training starts from: a checkpoint, a pretrained backbone, or (only on request) random weights.

    Returns:
        the checkpoint that was read, by its path; empty if none was.

    Raises:
        UserError: the checkpoint is missing or of another variant, or several starting points are requested.
    """
    chosen = [flag for flag, value in (("--resume", args.resume is not None), ("--load-from", args.load_from),
                                       ("--from-scratch", args.from_scratch)) if value]  # fmt: skip
    if len(chosen) > 1 and chosen != ["--resume", "--from-scratch"]:
        raise UserError(f"{' and '.join(chosen)}: choose one")
    path, flag = args.load_from or cfg.get("load_from"), "--load-from"
    cfg.resume = False
    if args.resume is not None:
        path, flag = args.resume or find_latest_checkpoint(cfg.work_dir), "--resume"
        cfg.resume = path is not None
        if path is None:
            print_main(f"--resume: no checkpoint in {cfg.work_dir}, starting a fresh run")
    cfg.load_from = path
    backbone = cfg.model.backbone
    if path or args.from_scratch:
        drop_pretrained(cfg)
    if path:
        checkpoint = read_model_checkpoint(cfg, path, flag)
        if cfg.resume and not {"meta", "optimizer", "message_hub"} <= checkpoint.keys():
            raise UserError(f"{flag} {path}: holds weights only, so it cannot be resumed; use --load-from to start "
                            "from them")  # fmt: skip
        return {path: checkpoint}
    key = "pretrained" if backbone.get("pretrained") else "init_cfg.checkpoint"
    pretrained = backbone.get("pretrained") or (backbone.get("init_cfg") or {}).get("checkpoint")
    if pretrained and "://" not in pretrained and not Path(pretrained).is_file():
        raise UserError(
            f"pretrained {pretrained}: no such file; put a checkpoint of main.py there, name one with --cfg-options "
            f"model.backbone.{key}=PATH, or train without one: --from-scratch"
        )
    return {}


def run_training(parser: CommandParser, arguments: list[str] | None = None) -> int:
    """Run train.py. Returns its exit status."""
    return run_command("train.py", lambda: train(parser.parse_args(arguments)), parser)
