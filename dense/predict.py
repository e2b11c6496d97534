"""Shared by predict.py of segmentation and of detection: a model for single images, and drawing its predictions."""

import argparse
from collections.abc import Callable
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from PIL import Image
from torch import nn

from dense.runner import VARIANT_HINT
from dense.settings import CommandParser, build_parser, drop_pretrained, read_config, read_model_checkpoint
from training.checkpoints import load_weights, weights_of
from training.commands import run_command
from training.errors import UserError
from training.storage import make_folder

# From model, path and image (H × W × 3, RGB), and the lowest score if the command has one, to a picture and a line that
# describes its content.
Draw = Callable[..., tuple[Image.Image, str]]


def build_predict_parser(description: str | None) -> CommandParser:
    """Make the parser of predict.py."""
    parser = build_parser(description, launchers=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint of the whole segmentor or detector")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    return parser


def build_inference_model(cfg: Config, checkpoint_path: str) -> nn.Module:
    """Build a config's model with a checkpoint's weights, in evaluation mode on the best device.

    The model gets the attributes `cfg` and `dataset_meta` (classes and palette), as the inference functions of mmseg
    and mmdet expect.

    Raises:
        UserError: the checkpoint is missing, would run code, or does not fit.
    """
    checkpoint = read_model_checkpoint(cfg, checkpoint_path, "CHECKPOINT")
    drop_pretrained(cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    what = f"CHECKPOINT {checkpoint_path}"
    load_weights(model, weights_of(checkpoint, what), what, variant_hint=VARIANT_HINT, network="backbone")
    dataset = cfg.test_dataloader.dataset
    meta = checkpoint.get("meta", {}).get("dataset_meta")
    model.dataset_meta = meta or {**DATASETS.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}
    model.cfg = cfg
    return model.to(get_device()).eval()


def predict(args: argparse.Namespace, draw: Draw) -> None:
    """Draw the predictions for each image.

    Args:
        args: the command line.
        draw: see `Draw`.

    Raises:
        UserError: an image is unreadable, or the folder is not writable.
    """
    cfg = read_config(args)
    images = {path: read_image(path) for path in args.images}
    outs = {path: Path(args.out) / f"{Path(path).stem}.png" for path in args.images}
    for path, out in outs.items():
        if list(outs.values()).count(out) > 1:
            raise UserError(f"IMAGE {path}: another image has this name, and both would become {out}; use two folders")
        if out.resolve() == Path(path).resolve():
            raise UserError(f"--out {args.out}: would overwrite IMAGE {path}; name another folder")
    model = build_inference_model(cfg, args.checkpoint)
    make_folder(Path(args.out), f"--out {args.out}")
    lowest = [args.score_thr] if "score_thr" in args else []
    for path, image in images.items():
        with torch.no_grad():
            picture, line = draw(model, path, image, *lowest)
        picture.save(outs[path])
        print(f"{path}: {line}; drawn in {outs[path]}", flush=True)


def read_image(path: str) -> np.ndarray:
    """Read an image, H × W × 3, RGB, 0 to 255.

    Raises:
        UserError: the file is missing or not an image.
    """
    if not Path(path).is_file():
        raise UserError(f"IMAGE {path}: no such file")
    image = mmcv.imread(path)
    if image is None:
        raise UserError(f"IMAGE {path}: not an image, or a damaged one")
    return mmcv.bgr2rgb(image)


def run_prediction(parser: CommandParser, draw: Draw, arguments: list[str] | None = None) -> int:
    """Run predict.py. Returns its exit status."""
    return run_command("predict.py", lambda: predict(parser.parse_args(arguments), draw), parser)
