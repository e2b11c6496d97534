"""From a command line to a checked config: what the commands of segmentation and detection share."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

import checkpoints
import utils
from dense.runner import VARIANT_HINT, read_checkpoint
from sepvit import variant_of
from training.commands import Parser
from utils import UserError

# Flags of mmsegmentation 0.10's and mmdetection 2.8's commands that there are not here, and what stands for them.
FORMER = {"--options": "the name here is --cfg-options KEY=VALUE, with test_evaluator.KEY=VALUE for the evaluation"}
FORMER_OF_TRAINING = {
    "--resume-from": "the name here is --resume PATH",
    "--gpus": "bash dist_train.sh CONFIG N trains on N GPUs",
    "--gpu-ids": "CUDA_VISIBLE_DEVICES chooses the GPUs, and bash dist_train.sh CONFIG N trains on N of them",
}
FORMER_OF_TESTING = {
    "--eval-options": "the name here is --cfg-options test_evaluator.KEY=VALUE",
    "--show": "pictures are written by --show-dir DIR",
    "--gpu-collect": "leave it out, the results of all processes are always collected",
    "--tmpdir": "leave it out, the results of all processes are always collected",
    "--fuse-conv-bn": "not available, leave it out",
}


class CommandParser(Parser):
    """Answers a flag that the libraries' commands once had with what stands for it here.

    Args:
        former: such flags and the answers.
        **kwargs: as for `argparse.ArgumentParser`.
    """

    def __init__(self, former: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.former = dict(former)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse a command line; see argparse.

        Raises:
            UserError: a setting is a former one, unknown, missing, or has a wrong value.
        """
        arguments = sys.argv[1:] if args is None else args
        # before argparse, which would take --show for short for --show-dir
        for flag in (argument.partition("=")[0].replace("_", "-") for argument in arguments):
            if flag in self.former:
                raise UserError(f"{flag}: {self.former[flag]}")
        return super().parse_args(arguments, namespace)


class KeyValueAction(DictAction):
    """`--cfg-options key=value …`: spaces in texts survive, and what is not of that form gets a clear word."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        options = dict(getattr(namespace, self.dest))
        for pair in values:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                parser.error(f"--cfg-options {pair}: takes key=value pairs, such as train_dataloader.batch_size=4")
            is_text = " " in value and not value.lstrip().startswith(("[", "("))
            options[key] = value if is_text else self._parse_iterable(value)
        setattr(namespace, self.dest, options)


def build_parser(description: str, launchers: bool = True, former: Mapping[str, str] | None = None) -> CommandParser:
    """A parser with the settings that all commands have.

    Args:
        description: what the command does.
        launchers: whether it runs on several processes.
        former: flags that the libraries' commands once had and the answers to them, besides those in `FORMER`.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser({**FORMER, **(former or {})}, description=description, formatter_class=formatter)
    parser.add_argument("config", metavar="CONFIG", help="a config of configs/, or your own")
    if launchers:
        parser.add_argument("--work-dir", metavar="DIR", help="default: work_dirs/ and the config's name")
        parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cfg-options", nargs="+", action=KeyValueAction, default={}, metavar="KEY=VALUE",
                        help="change the config; data_root=DIR moves the whole data set")  # fmt: skip
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config of the command line, with its `--cfg-options`.

    Raises:
        UserError: it is missing or is no config.
    """
    if not Path(args.config).is_file():
        raise UserError(f"CONFIG {args.config}: no such file; configs/ has those of the paper")
    try:
        cfg = Config.fromfile(args.config)
        root = cfg.get("data_root")
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is a program: anything can be wrong with it
        raise UserError(f"CONFIG {args.config}: cannot be read ({_one_line(error)})") from None
    if "model" not in cfg or "backbone" not in cfg.model:
        raise UserError(f"CONFIG {args.config}: not a config of a segmentor or detector, it has no model.backbone")
    if "data_root" in args.cfg_options and root:
        _move(cfg._cfg_dict, str(root).rstrip("/"), str(args.cfg_options["data_root"]).rstrip("/"))
    for node in _dicts(cfg._cfg_dict):
        if node.get("num_workers") == 0:
            node.pop("persistent_workers", None)  # torch refuses the two together
    cfg.work_dir = getattr(args, "work_dir", None) or cfg.get("work_dir") or f"./work_dirs/{Path(args.config).stem}"
    cfg.launcher = getattr(args, "launcher", "none")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    return cfg


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _dicts(node: Any) -> Iterator[dict[str, Any]]:
    """All dicts inside a config."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from _dicts(child)


def _move(node: dict[str, Any], old: str, new: str) -> None:
    """Replace the data root at the beginning of all paths: bases have it in data sets and evaluators."""
    for child in _dicts(node):
        for key, value in child.items():
            if isinstance(value, str) and (value.rstrip("/") == old or value.startswith(f"{old}/")):
                child[key] = new + value.removeprefix(old)


def drop_pretrained(cfg: Config) -> None:
    """Leave a config's pretrained weights out."""
    for settings in (cfg.model, cfg.model.backbone):
        settings.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)


def join_processes(args: argparse.Namespace) -> None:
    """Join the process group of `--launcher`: nccl for GPUs, gloo for CPUs.

    mmengine would start one, but calls CUDA even for gloo.
    """
    if args.launcher == "none":
        return
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    device = "cuda" if utils.best_device() == "cuda" else "cpu"
    utils.init_distributed(device, 1, "env://")
    if "RANK" not in os.environ:
        starter = dict(pytorch="torchrun, as dist_train.sh does,", slurm="srun", mpi="mpirun")[args.launcher]
        raise UserError(
            f"--launcher {args.launcher}: RANK is not set; start the processes by {starter} or leave it out"
        )
    os.environ.setdefault("LOCAL_RANK", "0")


def check_data(cfg: Config, *loaders: str) -> None:
    """Refuse data that is not there before anything is built.

    Args:
        cfg: the config.
        loaders: its data loaders that will be used: 'train_dataloader', ….

    Raises:
        UserError: a folder or an annotation file is missing, or has no images in it.
    """
    for loader in loaders:
        for dataset in _dicts(cfg[loader].get("dataset", {})):
            if "data_prefix" not in dataset:
                continue
            root = dataset.get("data_root") or ""
            places = [value for value in dataset["data_prefix"].values() if value]
            for place in [root, *(os.path.join(root, place) for place in places)]:
                if place and not os.path.isdir(place):
                    raise UserError(_no_data(loader, place, "no such folder"))
            if dataset.get("ann_file") and not os.path.isfile(os.path.join(root, dataset["ann_file"])):
                raise UserError(_no_data(loader, os.path.join(root, dataset["ann_file"]), "no such file"))
            if places and not any(os.scandir(os.path.join(root, places[0]))):
                raise UserError(_no_data(loader, os.path.join(root, places[0]), "an empty folder"))


def _no_data(loader: str, place: str, what: str) -> str:
    hint = "put the data set there, or name its folder by --cfg-options data_root=DIR"
    return f"{loader.removesuffix('_dataloader')} data {place}: {what}; {hint}"


def read_model_checkpoint(cfg: Config, path: str, flag: str) -> dict[str, Any]:
    """Read the checkpoint of a whole segmentor or detector, safely, and check that its variant is the config's.

    Raises:
        UserError: it is missing, no checkpoint, would run code, or holds another variant.
    """
    what = f"{flag} {path}"
    checkpoint = read_checkpoint(path, flag)
    weights = checkpoints.weights_of(checkpoint, what)
    inner = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    backbone = cfg.model.get("module", cfg.model).backbone  # inside test-time augmentation's
    held, wanted = variant_of(inner), getattr(MODELS.get(backbone.type), "variant", None)
    if held is None and variant_of(weights) is not None:
        hint = "to train from it, name it as the config's model.backbone.init_cfg.checkpoint"
        raise UserError(f"{what}: holds a backbone alone, {variant_of(weights)}; {hint}")
    if wanted is not None and held != wanted:
        raise UserError(f"{what}: holds {held or 'no SepViT'}, not {wanted}; {VARIANT_HINT}")
    return checkpoint
