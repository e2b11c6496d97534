"""The test command of segmentation and detection."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop

from sepvit_lib.common.command_line import Parser, path, run_command
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import is_main_process, on_main_process
from sepvit_lib.common.storage import make_folder, missing_folders, remove_empty
from sepvit_lib.mm.build import build_errors, build_model, check_test_parts, check_weights
from sepvit_lib.mm.check_classes import match_classes
from sepvit_lib.mm.check_data import check_data, check_reading
from sepvit_lib.mm.config import (
    build_parser,
    drop_pretrained,
    join_processes,
    read_config,
    read_model_checkpoint,
    where_of,
)
from sepvit_lib.mm.config_lookup import LOADERS, data_sets, folders_of, heads_of, is_elsewhere
from sepvit_lib.mm.console import TestProgressHook
from sepvit_lib.mm.runner import DenseRunner

# An output other than metrics: makes the hook that writes it, from its folder (None if an evaluator writes it); the
# folder, None if the output is not requested; and the folder's name in messages.
Result = tuple[Callable[[Path], Hook] | None, Path | None, str]
# Function that sets the metrics in the config, and returns the other outputs.
Prepare = Callable[[Config, argparse.Namespace], list[Result]]


def build_test_parser(description: str | None, metrics: Sequence[str]) -> Parser:
    """Make the parser of test.py, with the settings common to segmentation and detection.

    Args:
        description: what the command does.
        metrics: names of the metrics.
    """
    parser = build_parser(description)
    add = parser.add_argument
    add("checkpoint", type=path, metavar="CHECKPOINT", help="checkpoint of the whole segmentor or detector")
    named = {metric.lower(): metric for metric in metrics}
    kind: dict[str, Any] = dict(type=lambda text: named.get(text.lower(), text), choices=metrics)
    add("--eval", nargs="+", default=[], metavar="METRIC", help=f"one or more of {', '.join(metrics)}", **kind)
    add("--show-dir", type=path, metavar="DIR", help="write pictures of the predictions and the ground truth to DIR")
    add("--aug-test", action="store_true", help="test-time augmentation (scales, flips) by the config's tta_pipeline")
    add("--report", action="store_true", help="write a page with the results to report/ in the work dir")
    return parser


def as_configured(cfg: Config, flags: str) -> list[Result]:
    """Evaluate with the metrics of the config.

    Args:
        cfg: the config.
        flags: flags that request an output, for messages.

    Raises:
        UserError: the config has no metrics.
    """
    if not cfg.test_evaluator:
        raise UserError(f"nothing to do: the config has no test_evaluator; pass {flags}")
    return []


def test(args: argparse.Namespace, prepare: Prepare) -> None:
    """Test a segmentor or detector.

    Args:
        args: the command line.
        prepare: see `Prepare`.
    """
    cfg, where = read_config(args), where_of(args)
    join_processes(cfg, args)
    check_test_parts(cfg, where)
    results = prepare(cfg, args)
    folders = [(folder, what) for _, folder, what in results if folder]
    check_folders(cfg, folders)
    drop_pretrained(cfg)
    if args.aug_test:
        augment(cfg, args.config)
    check_data(cfg, "test_dataloader")
    what = f"CHECKPOINT {args.checkpoint}"
    checkpoint = read_model_checkpoint(cfg, args.checkpoint, "CHECKPOINT")
    match_classes(cfg, checkpoint, what, ["test_dataloader"])
    check_reading(cfg, checkpoint, what)
    with build_errors(where):
        check_weights(build_model(cfg), checkpoint, what)
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.load_from, cfg.resume = args.checkpoint, False
    folders.append((Path(cfg.work_dir), f"--work-dir {cfg.work_dir}"))
    on_main_process(lambda: make_folders(folders))
    with build_errors(where):
        runner = TestRunner.from_config(cfg, {args.checkpoint: checkpoint})
    for hook in (TestProgressHook(), *(make(folder) for make, folder, _ in results if make and folder)):
        runner.register_hook(hook)
    runner.test()


class TestRunner(DenseRunner):
    """Test a segmentor or detector."""

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """Build the test loop, its data set and its evaluator."""
        with build_errors(f"CONFIG {self.cfg.filename}"):
            return super().build_test_loop(loop)

    def dump_config(self) -> None:
        """Write the config beside the log: in the work dir, it would overwrite the training run's config."""
        if is_main_process():
            self.cfg.dump(Path(self.log_dir) / Path(self.cfg.filename or "config.py").name)


def check_folders(cfg: Config, folders: Sequence[tuple[Path, str]]) -> None:
    """Refuse folders in which results would overwrite images or labels: results have their images' names.

    Args:
        cfg: the config.
        folders: the folders, and their names in messages.

    Raises:
        UserError: a folder is a data set's root, or contains its images or labels, or is inside a folder that does.
    """
    nodes = [node for loader in LOADERS for node, _ in data_sets(cfg, loader) if not is_elsewhere(node)]
    roots = {Path(node["data_root"]).resolve() for node in nodes if node.get("data_root")}
    data = {Path(folder).resolve() for node in nodes for folder in folders_of(node)}
    for folder, what in folders:
        if folder.resolve() in roots or data & {folder.resolve(), *folder.resolve().parents}:
            problem = "contains images or labels that results would overwrite"
            raise UserError(f"{what}: {problem}; choose another folder")


def make_folders(folders: Sequence[tuple[Path, str]]) -> None:
    """Make folders and check that they are writable. If one is not, newly made folders are removed again.

    Args:
        folders: the folders, and their names in messages.

    Raises:
        UserError: a folder is not writable.
    """
    missing = missing_folders(*(folder for folder, _ in folders))
    try:
        for folder, what in folders:
            make_folder(folder, what)
    except UserError:
        remove_empty(missing)
        raise


def augment(cfg: Config, path: str) -> None:
    """Enable a config's test-time augmentation.

    Args:
        cfg: the config.
        path: its file, for messages.

    Raises:
        UserError: the config has no test-time augmentation, or a head with a single output channel.
    """
    if not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        hint = "remove the flag, or set both as segmentation/configs/_base_/ade20k.py does"
        raise UserError(f"--aug-test: CONFIG {path} has no tta_model and tta_pipeline; {hint}")
    if single := [key for key, head in heads_of(cfg) if head.get("out_channels") == 1]:
        problem = "mmseg applies the sigmoid to a single channel twice, which lifts all pixels above its threshold"
        raise UserError(f"--aug-test: {single[0]}.out_channels=1: {problem}; remove the flag")
    for dataset, _ in data_sets(cfg, "test_dataloader"):
        dataset["pipeline"] = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def run_testing(parser: Parser, prepare: Prepare, arguments: list[str] | None = None) -> int:
    """Run test.py. Returns its exit status."""
    return run_command("test.py", lambda: test(parser.parse_args(arguments), prepare), parser)
