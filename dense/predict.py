"""What predict.py of segmentation and of detection share: a model for single images."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from torch import nn

import checkpoints
import utils
from dense.runner import VARIANT_HINT
from dense.settings import build_parser, drop_pretrained, read_config, read_model_checkpoint
from training.commands import Parser, run_command
from utils import UserError


def build_predict_parser(description: str) -> Parser:
    """The parser of predict.py."""
    parser = build_parser(description, launchers=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of the whole segmentor or detector")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    return parser


def build_inference_model(cfg: Config, checkpoint_path: str) -> nn.Module:
    """The model of a config with a checkpoint's weights, in evaluation mode on the best device.

    It has `cfg` and `dataset_meta` (classes and palette), as mmseg's and mmdet's inference functions expect.

    Raises:
        UserError: the checkpoint is missing, would run code, or does not fit.
    """
    checkpoint = read_model_checkpoint(cfg, checkpoint_path, "CHECKPOINT")
    drop_pretrained(cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    what = f"CHECKPOINT {checkpoint_path}"
    checkpoints.load_weights(model, checkpoints.weights_of(checkpoint, what), what, VARIANT_HINT, network="backbone")
    dataset = cfg.test_dataloader.dataset
    meta = checkpoint.get("meta", {}).get("dataset_meta")
    model.dataset_meta = meta or {**DATASETS.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}
    model.cfg = cfg
    return model.to(get_device()).eval()


def predict(args: argparse.Namespace, draw: Callable[..., tuple[Any, str]]) -> None:
    """Draw the predictions for each image.

    Args:
        args: the command line.
        draw: from model, path and image (H × W × 3, RGB), and the least score where the command has one, to a PIL image
            and a line that says what is in it.

    Raises:
        UserError: an image cannot be read, or the folder not written.
    """
    cfg = read_config(args)
    images = {path: read_image(path) for path in args.images}
    outs = {path: Path(args.out) / f"{Path(path).stem}.png" for path in args.images}
    for path, out in outs.items():
        if list(outs.values()).count(out) > 1:
            raise UserError(f"IMAGE {path}: another image has its name, and both would become {out}; draw them apart")
        if out.resolve() == Path(path).resolve():
            raise UserError(f"--out {args.out}: would overwrite IMAGE {path}; name another folder")
    model = build_inference_model(cfg, args.checkpoint)
    utils.make_folder(Path(args.out), "--out")
    least = [args.score_thr] if "score_thr" in args else []
    for path, image in images.items():
        with torch.no_grad():
            picture, line = draw(model, path, image, *least)
        picture.save(outs[path])
        print(f"{path}: {line}; drawn in {outs[path]}", flush=True)


def read_image(path: str) -> np.ndarray:
    """Read an image, H × W × 3, RGB, 0 to 255.

    Raises:
        UserError: it is missing or no image.
    """
    if not Path(path).is_file():
        raise UserError(f"IMAGE {path}: no such file")
    image = mmcv.imread(path)
    if image is None:
        raise UserError(f"IMAGE {path}: not an image that can be read")
    return mmcv.bgr2rgb(image)


def run_prediction(
    parser: Parser,
    draw: Callable[..., tuple[Any, str]],
    arguments: list[str] | None = None,
) -> int:
    """Run predict.py; returns its exit status."""
    return run_command("predict.py", lambda: predict(parser.parse_args(arguments), draw))
