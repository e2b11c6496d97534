"""The backbone of a segmentor or detector in ONNX, by default for any batch size and image size divisible by 32."""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch.export import Dim

from sepvit import exportable
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import require
from sepvit_lib.common.storage import make_folder
from sepvit_lib.inference.backbones import Backbone, load_backbone
from sepvit_lib.inference.exported import kind_of, open_onnx
from sepvit_lib.rounds import ratio
from tools.exporting.comparison import time_calls
from tools.exporting.writers import MAX_DIFFERENCE, export_onnx

STRIDE = 32
# At this size, every block has several windows along each side: the exporter would treat a dimension of 1 as static.
TRACED = (2, 3, 256, 320)
# These sizes have one window in the last stages, or padding in some or all stages, or are those of ADE20K and COCO.
COMPARED = ((1, 3, 32, 64), (3, 3, 224, 224), (1, 3, 512, 512), (2, 3, 416, 608), (1, 3, 800, 1280))
TIMED = (1, 3, 512, 512)


def find(path: str, averaged: bool) -> Backbone | None:
    """Load the backbone in a checkpoint; None for a classifier's checkpoint, a folder or an exported file."""
    if Path(path).is_dir() or kind_of(Path(path)):
        return None
    return load_backbone(path, f"--resume {path}", averaged)


def export(backbone: Backbone, folder: Path, args: argparse.Namespace) -> None:
    """Write a backbone to ONNX, compare the file with PyTorch at several sizes, and print differences and speed.

    Raises:
        UserError: a different format is requested, the maps differ too much, or the file cannot be written.
    """
    if others := set(args.formats or ()) - {"onnx"}:
        raise UserError(f"--formats {others.pop()}: --resume {args.resume} contains a backbone; choose onnx")
    require("--formats onnx", "onnx", "onnxscript", "onnxruntime")
    target = folder / f"{backbone.variant}-backbone.onnx"
    if target.exists() and not args.overwrite:
        raise UserError(f"--out {folder}: {target.name} exists; choose another folder, or pass --overwrite")
    make_folder(folder, f"--out {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as work:
        file = Path(work) / target.name
        write(backbone, file, args.opset[0], args.batch_size, args.static)
        count = len(backbone.network.out_indices)
        print(f"{backbone.variant}, backbone, {count} maps, {file.stat().st_size / 1e6:.1f} MB")
        compare(backbone, file, args.rounds, args.batch_size, args.static)
        file.replace(target)
    print(f"written to {target}")


def write(
    backbone: Backbone, file: Path, opset: int, batch_size: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """Write the network to ONNX, for any batch size and image size that is not given.

    Its outputs are the maps, named after their stages.
    """
    dimensions = {} if size else {2: STRIDE * Dim("height"), 3: STRIDE * Dim("width")}
    dimensions |= {} if batch_size else {0: Dim("batch")}
    names = [f"stage{number}" for number in backbone.network.out_indices]
    network, images = exportable(backbone.network), torch.randn(fixed(TRACED, batch_size, size))
    export_onnx(network, images, file, (dimensions,) if dimensions else None, opset, outputs=names)


def fixed(
    shape: tuple[int, int, int, int], batch_size: int | None, size: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """A shape of images with the batch size and image size that are given."""
    return batch_size or shape[0], shape[1], *(size or shape[2:])


def compare(
    backbone: Backbone, file: Path, rounds: int, batch_size: int | None = None, size: tuple[int, int] | None = None
) -> None:
    """Print the largest difference of the maps at each of several sizes, and the speed relative to PyTorch.

    Raises:
        UserError: the maps differ too much.
    """
    run = open_onnx(file)
    with torch.inference_mode():
        shapes = dict.fromkeys(fixed(shape, batch_size, size) for shape in COMPARED)
        largest = max(map(math.prod, COMPARED))  # for the sake of memory
        for shape in [shape for shape in shapes if math.prod(shape) <= largest] or list(shapes)[:1]:
            images = torch.randn(shape)
            maps = zip(run(images), backbone.network(images), strict=True)
            difference = max(float((a - b).abs().max()) for a, b in maps)
            print(f"  {shape[0]} × {shape[2]} × {shape[3]}: largest difference {difference:.1e}")
            if not difference < MAX_DIFFERENCE:
                raise UserError(f"--formats onnx: its maps differ by {difference:.1e}, more than {MAX_DIFFERENCE:g}")
        images = torch.randn(fixed(TIMED, batch_size, size))
        calls = {"ONNX": lambda: run(images), "eager": lambda: backbone.network(images)}
        times = time_calls(calls, rounds)
    speed = ratio(times["eager"], times["ONNX"]).median
    print(f"  {images.shape[2]} × {images.shape[3]} in ONNX Runtime: {speed:.2f} × the speed of PyTorch in eager mode")
