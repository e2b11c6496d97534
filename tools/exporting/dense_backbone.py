"""The backbone of a segmentor or detector in ONNX, by default for images of any size divisible by 32
and batches of any size."""

import argparse
import tempfile
from collections.abc import Sequence
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
        shapes = [(args.batch_size or shape[0], 3, *(args.static or shape[2:])) for shape in (TRACED, *COMPARED, TIMED)]
        write(backbone, file, args, shapes[0])
        count = len(backbone.network.out_indices)
        print(f"{backbone.variant}, backbone, {count} maps, {file.stat().st_size / 1e6:.1f} MB")
        compare(backbone, file, args.rounds, list(dict.fromkeys(shapes[1:-1])), shapes[-1])
        file.replace(target)
    print(f"written to {target}")


def write(backbone: Backbone, file: Path, args: argparse.Namespace, traced: tuple[int, ...]) -> None:
    """Write the network to ONNX, traced with images of shape `traced`. Its outputs are named after their stages."""
    sizes = {} if args.static else {2: STRIDE * Dim("height"), 3: STRIDE * Dim("width")}
    sizes |= {} if args.batch_size else {0: Dim("batch")}
    names = [f"stage{number}" for number in backbone.network.out_indices]
    network = exportable(backbone.network)
    export_onnx(network, torch.randn(traced), file, (sizes,) if sizes else None, args.opset[0], outputs=names)


def compare(
    backbone: Backbone, file: Path, rounds: int, shapes: Sequence[tuple[int, ...]], timed: tuple[int, ...]
) -> None:
    """Print the largest difference of the maps for images of several shapes, and the speed relative to PyTorch.

    Raises:
        UserError: the maps differ too much.
    """
    run = open_onnx(file)
    with torch.inference_mode():
        for shape in shapes:
            images = torch.randn(shape)
            maps = zip(run(images), backbone.network(images), strict=True)
            difference = max(float((a - b).abs().max()) for a, b in maps)
            print(f"  {shape[0]} × {shape[2]} × {shape[3]}: largest difference {difference:.1e}")
            if not difference < MAX_DIFFERENCE:
                raise UserError(f"--formats onnx: its maps differ by {difference:.1e}, more than {MAX_DIFFERENCE:g}")
        images = torch.randn(timed)
        calls = {"ONNX": lambda: run(images), "eager": lambda: backbone.network(images)}
        times = time_calls(calls, rounds)
    speed = ratio(times["eager"], times["ONNX"]).median
    print(f"  {timed[2]} × {timed[3]} in ONNX Runtime: {speed:.2f} × the speed of PyTorch in eager mode")
