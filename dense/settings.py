"""From a command line to a checked config: shared by the commands of segmentation and detection."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

from dense.mmengine_adapter import read_checkpoint
from dense.runner import VARIANT_HINT
from sepvit import entries_under, variant_of
from training.checkpoints import weights_of
from training.commands import Parser
from training.devices import best_device
from training.errors import UserError
from training.processes import init_distributed

# Old flags of mmsegmentation 0.10 and mmdetection 2.8, and what to use now.
FORMER = {"--options": "use --cfg-options KEY=VALUE, with test_evaluator.KEY=VALUE for the evaluation"}
FORMER_OF_TRAINING = {
    "--resume-from": "use --resume PATH",
    "--gpus": "use bash dist_train.sh CONFIG N, which trains on N GPUs",
    "--gpu-ids": "use CUDA_VISIBLE_DEVICES to choose GPUs, and bash dist_train.sh CONFIG N to train on N of them",
}
FORMER_OF_TESTING = {
    "--eval-options": "use --cfg-options test_evaluator.KEY=VALUE",
    "--show": "use --show-dir DIR, which writes the pictures to a folder",
    "--gpu-collect": "not needed, results of all processes are always collected; remove it",
    "--tmpdir": "not needed, results of all processes are always collected; remove it",
    "--fuse-conv-bn": "not available; remove it",
}


class CommandParser(Parser):
    """A parser that answers old flags of mmsegmentation and mmdetection with what to use now.

    Args:
        former: the answers, by flag.
        **kwargs: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, former: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.former = dict(former)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse a command line; see argparse.

        Raises:
            UserError: a setting is an old one, unknown, missing, or has an invalid value.
        """
        arguments = sys.argv[1:] if args is None else args
        # Before argparse does: it would take --show for an abbreviation of --show-dir.
        for flag in (argument.partition("=")[0].replace("_", "-") for argument in arguments):
            if flag in self.former:
                raise UserError(f"{flag}: {self.former[flag]}")
        return super().parse_args(arguments, namespace)


class KeyValueAction(DictAction):
    """Parse `--cfg-options key=value …`. Unlike mmengine's action, keeps spaces in texts and refuses other forms."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for pair in values:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                parser.error(f"--cfg-options {pair}: takes key=value pairs, such as train_dataloader.batch_size=4")
            if " " in value and not value.lstrip().startswith(("[", "(")):
                setattr(namespace, self.dest, {**getattr(namespace, self.dest), key: value})
            else:
                super().__call__(parser, namespace, [pair], option_string)


def build_parser(
    description: str | None, launchers: bool = True, former: Mapping[str, str] | None = None
) -> CommandParser:
    """Make a parser with the settings that all commands have.

    Args:
        description: what the command does.
        launchers: whether it runs on several processes.
        former: old flags and the answers to them, besides `FORMER`.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser({**FORMER, **(former or {})}, description=description, formatter_class=formatter)
    parser.add_argument("config", metavar="CONFIG", help="a config of configs/, or your own")
    if launchers:
        parser.add_argument("--work-dir", metavar="DIR", help="output folder, default work_dirs/<name of the config>")
        parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cfg-options", nargs="+", action=KeyValueAction, default={}, metavar="KEY=VALUE",
                        help="change the config; data_root=DIR moves the whole data set")  # fmt: skip
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line, and apply its `--cfg-options`.

    Raises:
        UserError: the file is missing or is not a config.
    """
    if not Path(args.config).is_file():
        raise UserError(f"CONFIG {args.config}: no such file; configs/ has the paper's configs")
    try:
        cfg = Config.fromfile(args.config)
        root = cfg.get("data_root")
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:  # a config is a program, which may raise anything
        raise UserError(f"CONFIG {args.config}: cannot be read ({_one_line(error)})") from None
    if "model" not in cfg or "backbone" not in cfg.model:
        raise UserError(f"CONFIG {args.config}: not a config of a segmentor or detector, it has no model.backbone")
    if "data_root" in args.cfg_options and root:
        _move(cfg, str(root).rstrip("/"), str(args.cfg_options["data_root"]).rstrip("/"))
    for node in _dicts(cfg):
        if node.get("num_workers") == 0:
            node.pop("persistent_workers", None)  # torch refuses the two together
    cfg.work_dir = getattr(args, "work_dir", None) or cfg.get("work_dir") or f"./work_dirs/{Path(args.config).stem}"
    cfg.launcher = getattr(args, "launcher", "none")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    return cfg


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _dicts(node: Any) -> Iterator[Any]:
    """Yield a config and all dicts inside it."""
    if isinstance(node, (dict, Config)):
        yield node
    for child in node.values() if isinstance(node, (dict, Config)) else node if isinstance(node, (list, tuple)) else ():
        yield from _dicts(child)


def _move(cfg: Config, old: str, new: str) -> None:
    """Replace the data root at the start of all paths. Base configs repeat it in data sets and evaluators."""
    for node in _dicts(cfg):
        for key, value in node.items():
            if isinstance(value, str) and (value.rstrip("/") == old or value.startswith(f"{old}/")):
                node[key] = new + value.removeprefix(old)


def drop_pretrained(cfg: Config) -> None:
    """Remove the pretrained weights from a config."""
    for settings in (cfg.model, cfg.model.backbone):
        settings.pop("pretrained", None)
    cfg.model.backbone.pop("init_cfg", None)


def join_processes(args: argparse.Namespace) -> None:
    """Join the process group of `--launcher`: nccl for GPUs, gloo for CPUs.

    mmengine could start the group too, but it calls CUDA even for gloo.

    Raises:
        UserError: the launcher did not start this process.
    """
    if args.launcher == "none":
        return
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    device = "cuda" if best_device() == "cuda" else "cpu"
    init_distributed(device, 1, "env://")
    if "RANK" not in os.environ:
        starter = dict(pytorch="torchrun, as dist_train.sh does", slurm="srun", mpi="mpirun")[args.launcher]
        raise UserError(
            f"--launcher {args.launcher}: RANK is not set; remove the flag, or start the processes with {starter}"
        )
    os.environ.setdefault("LOCAL_RANK", "0")


def check_data(cfg: Config, *loaders: str) -> None:
    """Refuse missing data before anything is built.

    Args:
        cfg: the config.
        loaders: names of the data loaders that will be used: 'train_dataloader', ….

    Raises:
        UserError: a folder or an annotation file is missing, or the image folder is empty.
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


def _no_data(loader: str, place: str, problem: str) -> str:
    hint = "put the data set there, or name its folder with --cfg-options data_root=DIR"
    return f"{loader.removesuffix('_dataloader')} data {place}: {problem}; {hint}"


def read_model_checkpoint(cfg: Config, path: str, flag: str) -> dict[str, Any]:
    """Read the checkpoint of a whole segmentor or detector safely, and check that it holds the config's variant.

    Args:
        cfg: the config.
        path: path or https address.
        flag: the flag or placeholder that names the checkpoint, for messages.

    Raises:
        UserError: the file is missing, not a checkpoint, would run code, or holds another variant.
    """
    what = f"{flag} {path}"
    checkpoint = read_checkpoint(path, what)
    weights = weights_of(checkpoint, what)
    backbone = cfg.model.get("module", cfg.model).backbone  # test-time augmentation wraps the model
    held = variant_of(entries_under(weights, "backbone"))
    wanted = getattr(MODELS.get(backbone.type), "variant", None)
    if held is None and (alone := variant_of(weights)) is not None:
        hint = "to train from it, set model.backbone.init_cfg.checkpoint in the config"
        raise UserError(f"{what}: holds a backbone only, {alone}; {hint}")
    if wanted is not None and held != wanted:
        raise UserError(f"{what}: holds {held or 'no SepViT'}, not {wanted}; {VARIANT_HINT}")
    return checkpoint
