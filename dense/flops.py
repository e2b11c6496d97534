"""The command that counts parameters and multiply-adds of a whole segmentor or detector."""

import argparse

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

import utils
from dense.settings import build_parser, read_config
from tools.benchmark import count_multiply_adds
from utils import positive_int


def count(args: argparse.Namespace) -> None:
    """Print the parameters and multiply-adds of a config's model, by part."""
    cfg = read_config(args)
    cfg.model.pretrained = cfg.model.backbone.init_cfg = cfg.model.backbone.pretrained = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    images = torch.zeros(1, 3, *args.shape)
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, part in model.named_children():
        print(f"{name + ':':20} {sum(p.numel() for p in part.parameters()) / 1e6:8.3f} M parameters")
    backbone = count_multiply_adds(model.backbone, images)
    print(f"{'backbone:':20} {backbone / 1e9:8.3f} G multiply-adds")
    print(f"{cfg.model.type}, {args.shape[0]} × {args.shape[1]} pixels: {total / 1e6:.3f} M parameters, "
          f"{count_multiply_adds(model, images) / 1e9:.3f} G multiply-adds")  # fmt: skip


def run_count(description: str, shape: tuple[int, int], arguments: list[str] | None = None) -> int:
    """Run get_flops.py, by default for images of `shape` (H, W) pixels; returns its exit status."""
    parser = build_parser(description, launchers=False)
    parser.add_argument("--shape", type=positive_int, nargs=2, default=shape, metavar=("H", "W"),
                        help=f"image size in pixels, {shape[0]} {shape[1]} by default")  # fmt: skip
    return utils.run_command("get_flops.py", lambda: count(parser.parse_args(arguments)))
