"""Shared by predict.py of segmentation and detection: build a model for inference, and draw its predictions."""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS
from PIL import Image
from torch import nn

from sepvit_lib.common.command_line import Parser, path, run_command
from sepvit_lib.common.errors import UNREADABLE_STATUS, UserError
from sepvit_lib.common.processes import print_line
from sepvit_lib.common.storage import make_folder
from sepvit_lib.inference.images import PLACEHOLDER, Task, check_pictures, find_images, read_image
from sepvit_lib.mm.build import build_errors, build_model, check_test_parts, check_weights
from sepvit_lib.mm.check_classes import classes_in
from sepvit_lib.mm.check_data import unread
from sepvit_lib.mm.config import build_parser, drop_pretrained, read_config, read_model_checkpoint, where_of
from sepvit_lib.mm.config_lookup import classes_of, data_sets
from sepvit_lib.mm.console import progress_bar
from sepvit_lib.pipeline.image_files import orientation_for

# Draws a prediction. Takes the model, the path, the image (H × W × 3, RGB) and, in detection, the minimum score.
# Returns a picture, and a line of text that describes the prediction.
Renderer = Callable[..., tuple[Image.Image, str]]


def build_predict_parser(description: str | None) -> Parser:
    """Make the parser of predict.py."""
    parser = build_parser(description, launchers=False)
    add = parser.add_argument
    add("checkpoint", type=path, metavar="CHECKPOINT", help="checkpoint of the whole segmentor or detector")
    add("images", nargs="+", type=path, metavar="IMAGE", help="an image, a folder of images, or a pattern")
    add("--out", required=True, type=path, metavar="DIR", help="folder for the pictures")
    add("--overwrite", action="store_true", help="replace pictures that already exist in DIR")
    return parser


def build_inference_model(cfg: Config, checkpoint_path: str, where: str) -> nn.Module:
    """Build a config's model with a checkpoint's weights, in evaluation mode, on the best available device.

    The model gets the attributes `cfg` and `dataset_meta` (classes and palette), as the inference functions of mmseg
    and mmdet expect, and `orientation`, the orientation in which to read images. Its test pipeline takes images in
    memory, without labels.

    Args:
        cfg: the config.
        checkpoint_path: path or https URL of the checkpoint.
        where: name of the config in messages.

    Raises:
        UserError: the config has no test data, or the checkpoint is missing, would run code, or does not match.
    """
    check_test_parts(cfg, where)
    checkpoint = read_model_checkpoint(cfg, checkpoint_path, "CHECKPOINT")
    drop_pretrained(cfg)
    with build_errors(where):
        model = revert_sync_batchnorm(build_model(cfg))
    check_weights(model, checkpoint, f"CHECKPOINT {checkpoint_path}")
    with build_errors(where):
        found = next(data_sets(cfg, "test_dataloader"), None)
        if found is None:  # building the data set usually raises a more precise error
            built = DATASETS.build(cfg.test_dataloader.dataset)
            raise TypeError(f"test_dataloader.dataset: {type(built).__name__} is not derived from BaseDataset")
    node, kind = found
    names = classes_in(checkpoint)
    if names is None:
        print_line(f"CHECKPOINT {checkpoint_path}: does not name its classes; the config's are used, matched by number")
    with build_errors(where):
        stated = unread(node, kind).metainfo  # with a palette, which the library creates if the config has none
    held = (checkpoint.get("meta") or {}).get("dataset_meta") or {}
    model.dataset_meta = {**stated, **held, "classes": names or classes_of(node, kind)}
    model.orientation = orientation_for(checkpoint.get("reading"))
    model.cfg = copy.deepcopy(cfg)
    steps = [step for step in node.pipeline if not str(step.get("type")).rpartition(".")[2].startswith("Load")]
    model.cfg.test_pipeline = [dict(type=f"{cfg.default_scope}.LoadImageFromNDArray"), *steps]
    for node, _ in data_sets(model.cfg, "test_dataloader"):
        node["pipeline"] = model.cfg.test_pipeline
    return model.to(get_device()).eval()


class NarrowImageError(UserError):
    """An image is too narrow to be resized."""


def infer(function: Callable[..., Any], model: nn.Module, image: np.ndarray) -> Any:
    """Run mmseg's or mmdet's inference function on an image.

    Args:
        function: takes a model and an image in BGR.
        model: see `build_inference_model`.
        image: H × W × 3, RGB, 0 to 255.

    Raises:
        NarrowImageError: the image is too narrow to be resized.
    """
    try:
        return function(model, mmcv.rgb2bgr(image))
    except cv2.error:
        raise NarrowImageError("The image is too narrow to be resized for the network; crop it.") from None


def predict(args: argparse.Namespace, draw: Renderer) -> int:
    """Draw the predictions for each image. Images that cannot be read or resized are reported and skipped.

    Args:
        args: the command line.
        draw: see `Renderer`.

    Returns:
        the exit status: 1 if images were skipped.

    Raises:
        UserError: there is no image, a picture would overwrite a file, or the folder is not writable.
    """
    cfg, out = read_config(args), Path(args.out)
    tasks = find_images(args.images)
    check_pictures(tasks, out, args.overwrite)
    model = build_inference_model(cfg, args.checkpoint, where_of(args))
    make_folder(out, f"--out {args.out}")
    lowest = [args.score_thr] if "score_thr" in args else []
    failed = 0
    with progress_bar(len(tasks), "predict") as bar:
        for task in tasks:
            result = _drawn(model, draw, task, lowest)
            bar.update()
            if isinstance(result, str):
                failed += 1
                bar.write(f"predict.py: {result}", file=sys.stderr)
                continue
            picture, line = result
            file = task.picture(out)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            print_line(f"{task.path}: {line}; drawn in {file}")
    return UNREADABLE_STATUS if failed else 0


def _drawn(model: Any, draw: Renderer, task: Task, lowest: Sequence[float]) -> tuple[Image.Image, str] | str:
    """Draw the prediction for an image. If the image cannot be read or resized, returns the reason."""
    what = f"{PLACEHOLDER} {task.path}"
    try:
        image = np.asarray(read_image(task.path, what, model.orientation))
    except UserError as error:
        return str(error)
    try:
        with torch.no_grad():
            return draw(model, str(task.path), image, *lowest)
    except NarrowImageError as error:
        return f"{what}: {error}"


def run_prediction(parser: Parser, draw: Renderer, arguments: list[str] | None = None) -> int:
    """Run predict.py. Returns its exit status."""
    return run_command("predict.py", lambda: predict(parser.parse_args(arguments), draw), parser)
