"""Turn a command line into a checked config. Shared by the commands of segmentation and detection."""

import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from sepvit import entries_under, variant_of
from sepvit_lib.common.command_line import Parser, path
from sepvit_lib.common.devices import best_device
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import init_distributed
from sepvit_lib.mm.cfg_options import KeyValueAction, merge_options, move_root
from sepvit_lib.mm.config_lookup import LOADS_IMAGES, dicts, resolve, step_name
from sepvit_lib.mm.console import import_quietly, without_noise
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.mm.runner import VARIANT_HINT
from sepvit_lib.run.checkpoints import weights_of, wrong_variant

# By library: the module that adapts its data sets.
OWN_DATA_SETS = dict(mmseg="sepvit_lib.mm.ade_data_sets", mmdet="sepvit_lib.mm.coco_data_sets")


def build_parser(description: str | None, launchers: bool = True) -> Parser:
    """Build the parser with the settings common to all commands.

    Args:
        description: what the command does.
        launchers: whether the command can run in several processes.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("config", type=path, metavar="CONFIG", help="a config of configs/, or your own")
    if launchers:
        parser.add_argument(
            "--work-dir", type=path, metavar="DIR", help="output folder, default work_dirs/<name of the config>"
        )
        parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=KeyValueAction,
        default={},
        metavar="KEY=VALUE",
        help="override config values; data_root=DIR applies to all paths of the data set",
    )
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """Read the config named on a command line, apply its `--cfg-options`, and check their names and values.

    Raises:
        UserError: the file is missing or is not a config, or an option is rejected.
    """
    where, options = where_of(args), args.cfg_options
    cfg = _read_file(args.config, where)
    _enter_scope(cfg)
    if isinstance(options.get("data_root"), str):
        move_root(cfg, options["data_root"])
    merge_options(cfg, options)
    if not isinstance(cfg.get("model"), dict) or not isinstance(cfg.model.get("backbone"), dict):
        raise UserError(f"{where}: not a segmentor or detector config (no model.backbone)")
    for node in dicts(cfg):
        if cfg.get("orientation") and step_name(node) in LOADS_IMAGES:
            node.setdefault("orientation", cfg.orientation)
        if node.get("num_workers") == 0:
            node.pop("persistent_workers", None)  # torch refuses persistent workers if there are none
    cfg.work_dir = getattr(args, "work_dir", None) or cfg.get("work_dir") or f"./work_dirs/{Path(args.config).stem}"
    cfg.launcher = getattr(args, "launcher", "none")
    return cfg


def where_of(args: argparse.Namespace) -> str:
    """Name the config of a command line, for messages."""
    return f"CONFIG {args.config}"


def _read_file(path: str, where: str) -> Config:
    if not Path(path).is_file():
        problem = "a folder; name a config in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{where}: {problem}; configs/ has the paper's configs")
    try:
        with without_noise():
            cfg = Config.fromfile(path, import_custom_modules=False)
            import_modules_from_strings(**cfg.get("custom_imports", {"imports": None}))
            return _unformatted(cfg)
    except Exception as error:  # a config is a program, which may raise anything
        raise UserError(f"{where}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from None


def _unformatted(cfg: Config) -> Config:
    """Return a config without mmengine's text formatting, which takes half a second for each of a run's five copies.

    `Config.fromfile` has an argument to disable formatting, but ignores it.
    """
    values, text = cfg.to_dict(), cfg.text
    return Config(values, text, cfg.filename, env_variables=cfg.env_variables, format_python_code=False)


def _enter_scope(cfg: Config) -> None:
    """Register the classes of the config's library, and make it mmengine's default scope."""
    scope = cfg.get("default_scope") or "mmengine"
    if scope in OWN_DATA_SETS:
        parts = ("datasets", "engine", "evaluation", "models", "visualization")
        import_quietly(*(f"{scope}.{part}" for part in parts), OWN_DATA_SETS[scope])
    init_default_scope(scope)


def drop_pretrained(cfg: Config) -> None:
    """Remove the settings for pretrained weights from a config."""
    for settings in (cfg.model, cfg.model.backbone):
        settings.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)


def join_processes(cfg: Config, args: argparse.Namespace, timeout: float = 1800.0) -> None:
    """Join the process group if `--launcher` started several processes: nccl for GPUs, gloo for CPUs.

    mmengine could join the group too, but it calls CUDA even for gloo.

    Args:
        cfg: the config. Its launcher becomes 'none' in a SLURM job step with a single task.
        args: the command line.
        timeout: seconds that a collective call waits for the other ranks.

    Raises:
        UserError: the launcher did not start this process.
    """
    if args.launcher == "none":
        return
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    device = "cuda" if best_device() == "cuda" else "cpu"
    init_distributed(device, 1, "env://", timeout)
    if "RANK" not in os.environ and args.launcher == "slurm" and "SLURM_PROCID" in os.environ:
        cfg.launcher = "none"
        return
    if "RANK" not in os.environ:
        starter = dict(pytorch="torchrun, as dist_train.sh does", slurm="srun")[args.launcher]
        raise UserError(
            f"--launcher {args.launcher}: RANK is not set; remove the flag, or start the processes with {starter}"
        )
    os.environ.setdefault("LOCAL_RANK", "0")


def read_model_checkpoint(cfg: Config, path: str, flag: str) -> dict[str, Any]:
    """Read the checkpoint of a whole segmentor or detector without running code, and check its variant of SepViT.

    Args:
        cfg: the config.
        path: path or https URL.
        flag: the flag or placeholder that names the checkpoint, for messages.

    Raises:
        UserError: the file is missing, not a checkpoint, would run code, or contains a different variant.
    """
    what = f"{flag} {path}"
    if Path(path).is_dir():
        raise UserError(f"{what}: a folder; name a checkpoint in it")
    checkpoint = read_checkpoint(path, what)
    weights = weights_of(checkpoint, what)
    backbone = cfg.model.get("module", cfg.model).backbone  # test-time augmentation wraps the model
    held = variant_of(entries_under(weights, "backbone"))
    wanted = getattr(resolve(MODELS, backbone), "variant", None)
    if held is None and (alone := variant_of(weights)) is not None:
        hint = f"to train from it, pass --cfg-options model.backbone.pretrained={path}"
        raise UserError(f"{what}: contains a backbone only, {alone}; {hint}")
    if wanted is not None and held != wanted:
        raise wrong_variant(what, held, wanted, VARIANT_HINT)
    return checkpoint
