"""Count the costs of a segmentor or detector, and those of its backbone by stage and kind of operation."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm

from sepvit import SepViTStages
from sepvit_lib.common.command_line import positive_int, run_command
from sepvit_lib.count import (
    costs_as_text,
    costs_of,
    count_multiply_adds,
    memory_as_text,
    memory_of,
    padding_as_text,
    summary,
    total_of,
)
from sepvit_lib.mm.build import build_errors, build_model
from sepvit_lib.mm.config import build_parser, drop_pretrained, read_config, where_of


def count(args: argparse.Namespace, samples: Callable[[int, int], list[Any]] | None = None) -> None:
    """Print the parameters of each part of a model, the model's multiply-adds, and its backbone's costs.

    Args:
        args: the command line.
        samples: takes an image's height and width in pixels, and returns a detector's inputs other than the image.
    """
    cfg = read_config(args)
    drop_pretrained(cfg)
    torch.manual_seed(0)
    with build_errors(where_of(args)):
        model = revert_sync_batchnorm(build_model(cfg)).eval()
    images = torch.zeros(1, 3, *args.shape)
    inputs = (images, samples(*args.shape)) if samples else (images,)
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, part in model.named_children():
        if any(True for _ in part.parameters()):
            print(f"{name + ':':20} {sum(p.numel() for p in part.parameters()) / 1e6:8.3f} M parameters")
    backbone = costs_of(model.backbone, images)
    print(f"{'backbone:':20} {total_of(backbone, 'multiply_adds') / 1e9:8.3f} G multiply-adds")
    print(
        f"{cfg.model.type}, {args.shape[0]} × {args.shape[1]} pixels: {total / 1e6:.3f} M parameters, "
        f"{count_multiply_adds(model, *inputs) / 1e9:.3f} G multiply-adds"
    )
    print(f"\nbackbone, {cfg.model.backbone.type}: {summary(backbone)}\n")
    print(costs_as_text(backbone), flush=True)
    if isinstance(model.backbone, SepViTStages):
        print(f"\n{padding_as_text(model.backbone, args.shape)}")
    if args.memory:
        print(f"\n{memory_as_text(memory_of(model.backbone, images), len(images), images.device)}")


def run_count(
    description: str | None, shape: tuple[int, int], samples: Callable[[int, int], list[Any]] | None = None
) -> int:
    """Run get_flops.py. Returns its exit status.

    Args:
        description: what the command does.
        shape: default image size (H, W), in pixels.
        samples: see `count`.
    """
    parser = build_parser(description, launchers=False)
    add = parser.add_argument
    size = f"image size in pixels, default {shape[0]} {shape[1]}"
    add("--shape", type=positive_int, nargs=2, default=shape, metavar=("H", "W"), help=size)
    add(
        "--memory", action="store_true", help="also measure the memory of the backbone's forward pass and training step"
    )
    return run_command("get_flops.py", lambda: count(parser.parse_args(), samples), parser, "use a smaller --shape")
