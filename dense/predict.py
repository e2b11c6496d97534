"""Shared by predict.py of segmentation and of detection: a model for single images, and drawing its predictions."""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from PIL import Image
from torch import nn

from dense.checks import build_model, check_test_parts, check_weights, config_errors
from dense.console import progress_bar
from dense.data import IMAGE_SUFFIXES, check_types
from dense.parts import classes_of, data_sets
from dense.settings import CommandParser, build_parser, drop_pretrained, read_config, read_model_checkpoint, where_of
from training.commands import path, run_command
from training.errors import UserError
from training.processes import print_line
from training.storage import make_folder

# From model, path and image (H × W × 3, RGB), and the lowest score if the command has one, to a picture and a line that
# describes its content.
Draw = Callable[..., tuple[Image.Image, str]]


def build_predict_parser(description: str | None) -> CommandParser:
    """Make the parser of predict.py."""
    parser = build_parser(description, launchers=False)
    parser.add_argument(
        "checkpoint", type=path, metavar="CHECKPOINT", help="checkpoint of the whole segmentor or detector"
    )
    parser.add_argument("images", nargs="+", type=path, metavar="IMAGE", help="an image, or a folder of images")
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are in DIR already")
    return parser


def build_inference_model(cfg: Config, checkpoint_path: str, where: str) -> nn.Module:
    """Build a config's model with a checkpoint's weights, in evaluation mode on the best device.

    The model gets the attributes `cfg` and `dataset_meta` (classes and palette), as the inference functions of mmseg
    and mmdet expect. Its pipeline is for images in memory, upright, and without labels.

    Args:
        cfg: the config.
        checkpoint_path: path or https address of the checkpoint.
        where: names the config in messages.

    Raises:
        UserError: the checkpoint is missing, would run code, or does not fit, or the config names no data to test on.
    """
    check_test_parts(cfg, where)
    check_types(cfg, "test_dataloader")
    checkpoint = read_model_checkpoint(cfg, checkpoint_path, "CHECKPOINT")
    drop_pretrained(cfg)
    with config_errors(cfg, where, "model"):
        model = revert_sync_batchnorm(build_model(cfg))
    check_weights(model, checkpoint, f"CHECKPOINT {checkpoint_path}")
    node, kind = next(data_sets(cfg, "test_dataloader"), (None, None))
    if node is None or kind is None:
        name = cfg.test_dataloader.dataset.get("type")
        raise UserError(f"test_dataloader.dataset.type={name}: has no classes and no pipeline; derive it from "
                        "mmengine's BaseDataset")  # fmt: skip
    meta = checkpoint.get("meta", {}).get("dataset_meta")
    model.dataset_meta = meta or {**kind.METAINFO, **(node.get("metainfo") or {}), "classes": classes_of(node, kind)}
    model.cfg = copy.deepcopy(cfg)
    steps = [step for step in node.pipeline if not str(step.get("type")).rpartition(".")[2].startswith("Load")]
    model.cfg.test_pipeline = [dict(type=f"{cfg.default_scope}.LoadImageFromNDArray"), *steps]
    for node, _ in data_sets(model.cfg, "test_dataloader"):
        node["pipeline"] = model.cfg.test_pipeline
    return model.to(get_device()).eval()


@dataclass(frozen=True)
class Task:
    """An image to predict.

    Attributes:
        path: its file.
        out: the file of its picture.
    """

    path: Path
    out: Path


def list_tasks(paths: list[str], out: Path) -> list[Task]:
    """List the images to predict, and where their pictures go. Pictures of a folder's images keep its structure.

    Args:
        paths: images and folders of images.
        out: folder of the pictures.

    Raises:
        UserError: an image is missing, a folder has none, or two would get one picture.
    """
    tasks = [Task(path, out / inner.with_suffix(".png")) for name in paths for path, inner in _images_of(Path(name))]
    places: dict[Path, Path] = {}
    for task in tasks:
        other = places.setdefault(task.out, task.path)
        if other.resolve() != task.path.resolve():
            raise UserError(f"IMAGE {task.path}: would get the same picture as {other}, {task.out}; rename one, name "
                            "the folder that holds both, or predict them into two folders")  # fmt: skip
    return list({task.out: task for task in tasks}.values())  # an image given twice is predicted once


def _images_of(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield images and the paths that name their pictures: an image itself, or those in a folder and its folders."""
    if path.is_file():
        yield path, Path(path.name)
        return
    if not path.is_dir():
        raise UserError(f"IMAGE {path}: no such file")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"IMAGE {path}: a folder without images (files ending in {', '.join(sorted(IMAGE_SUFFIXES))})")
    for file in found:
        yield file, file.relative_to(path)


def check_tasks(tasks: list[Task], out: str, overwrite: bool) -> None:
    """Refuse to read or to overwrite the wrong files before anything is written.

    Args:
        tasks: the images.
        out: the folder of the pictures, as given.
        overwrite: whether pictures may be replaced.

    Raises:
        UserError: an image is unreadable, or a picture would overwrite a file.
    """
    images = {task.path.resolve() for task in tasks}
    for task in tasks:
        if task.out.resolve() in images:
            raise UserError(f"--out {out}: would overwrite IMAGE {task.out}; name another folder")
        if task.out.exists() and not overwrite:
            raise UserError(f"--out {out}: {task.out} exists; name another folder, or replace it: --overwrite")
    for task in tasks:
        read_image(task.path)


def read_image(path: Path) -> np.ndarray:
    """Read an image, H × W × 3, RGB, 0 to 255, upright: its EXIF orientation is applied.

    Raises:
        UserError: the file is not an image.
    """
    try:
        image = mmcv.imfrombytes(path.read_bytes(), channel_order="rgb")
    except (OSError, ValueError, AssertionError, cv2.error):
        image = None
    if image is None:
        raise UserError(f"IMAGE {path}: not an image, or a damaged one")
    return image


def predict(args: argparse.Namespace, draw: Draw) -> None:
    """Draw the predictions for each image.

    Args:
        args: the command line.
        draw: see `Draw`.

    Raises:
        UserError: an image is unreadable, a picture would overwrite a file, or the folder is not writable.
    """
    cfg = read_config(args)
    tasks = list_tasks(args.images, Path(args.out))
    check_tasks(tasks, args.out, args.overwrite)
    model = build_inference_model(cfg, args.checkpoint, where_of(args))
    make_folder(Path(args.out), f"--out {args.out}")
    lowest = [args.score_thr] if "score_thr" in args else []
    with progress_bar(len(tasks), "predict") as bar:
        for task in tasks:
            with torch.no_grad():
                picture, line = draw(model, str(task.path), read_image(task.path), *lowest)
            task.out.parent.mkdir(parents=True, exist_ok=True)
            picture.save(task.out)
            print_line(f"{task.path}: {line}; drawn in {task.out}")
            bar.update()


def run_prediction(parser: CommandParser, draw: Draw, arguments: list[str] | None = None) -> int:
    """Run predict.py. Returns its exit status."""
    return run_command("predict.py", lambda: predict(parser.parse_args(arguments), draw), parser)
