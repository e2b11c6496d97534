"""The backbone of a segmentor or detector in ONNX, for images of any size divisible by 32 and batches of any size."""

if not __package__:
    import _repository  # noqa: F401
import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from sepvit_lib.inference.backbones import Backbone, load_backbone
from sepvit_lib.inference.exported import kind_of, onnxruntime_session, run_onnxruntime
from sepvit_lib.inference.packages import require
from sepvit_lib.inference.rounds import interleave, ratio
from sepvit_lib.training.devices import available_cores
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.storage import make_folder
from tools.export_formats import LARGEST_DIFFERENCE, export_onnx

FORMAT = "onnx"
STRIDE = 32
# Every block has several windows along each side: the exporter would take a single one for fixed.
TRACED = (2, 3, 256, 320)
# One window in the last stages, padding in some or all stages, and the sizes of ADE20K and COCO.
COMPARED = ((1, 3, 32, 64), (3, 3, 224, 224), (1, 3, 512, 512), (2, 3, 416, 608), (1, 3, 800, 1280))
TIMED = (1, 3, 512, 512)
CPU = torch.device("cpu")


def find(path: str, averaged: bool) -> Backbone | None:
    """Load the backbone that a checkpoint holds; None if it is a classifier's or an exported file."""
    if Path(path).is_dir() or kind_of(Path(path)):
        return None
    return load_backbone(path, f"--resume {path}", averaged)


def export(backbone: Backbone, folder: Path, args: argparse.Namespace) -> int:
    """Write a backbone to ONNX, compare it at several sizes, and print the differences and its speed.

    Returns:
        the exit status.

    Raises:
        UserError: another format is asked for, or the file is refused or cannot be written.
    """
    others = [name for name in args.formats or () if name != FORMAT]
    if others:
        raise UserError(
            f"--formats {others[0]}: --resume {args.resume} holds a backbone, "
            f"{backbone.variant}, which is exported to {FORMAT} only"
        )
    require(f"--formats {FORMAT}", "onnx", "onnxscript", "onnxruntime")
    target = folder / f"{backbone.variant}-backbone.onnx"
    if target.exists() and not args.overwrite:
        raise UserError(f"--out {folder}: {target.name} exists; name another folder, or replace it with --overwrite")
    make_folder(folder, f"--out {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as work:
        file = Path(work) / target.name
        write(backbone, file, args.opset[0])
        count = len(backbone.network.out_indices)
        print(f"{backbone.variant}, backbone, {count} maps, {file.stat().st_size / 1e6:.1f} MB")
        compare(backbone, file, args.rounds)
        file.replace(target)
    print(f"written to {target}")
    return 0


def write(backbone: Backbone, file: Path, opset: int) -> None:
    """Write the network with its maps as outputs, named after their stages."""
    height, width = Dim("height"), Dim("width")
    shapes = ({0: Dim("batch"), 2: STRIDE * height, 3: STRIDE * width},)
    names = [f"stage{number}" for number in backbone.network.out_indices]
    export_onnx(backbone.network, torch.randn(TRACED), file, shapes, opset, outputs=names)


def compare(backbone: Backbone, file: Path, rounds: int) -> None:
    """Print the largest difference of the maps at each of several sizes, and the speed beside the network's.

    Raises:
        UserError: the maps differ too much.
    """
    run = run_onnxruntime(onnxruntime_session(file, available_cores()))
    for shape in COMPARED:
        images = torch.randn(shape)
        with torch.inference_mode():
            difference = largest_difference(run(images), backbone.network(images))
        print(f"  {shape[0]} × {shape[2]} × {shape[3]}: largest difference {difference:.1e}")
        if not difference < LARGEST_DIFFERENCE:
            raise UserError(
                f"--formats {FORMAT}: refused, its maps differ by {difference:.1e}, more than {LARGEST_DIFFERENCE:g}"
            )
    images = torch.randn(TIMED)
    with torch.inference_mode():
        times = interleave({"ONNX": lambda: run(images), "eager": lambda: backbone.network(images)}, CPU, rounds)
    speed = ratio(times.seconds["eager"], times.seconds["ONNX"])
    print(
        f"  {TIMED[2]} × {TIMED[3]} in ONNX Runtime: {speed.median:.2f} × the speed of PyTorch in eager mode "
        f"({speed.low:.2f} to {speed.high:.2f})"
    )


def largest_difference(maps: list[Tensor], others: tuple[Tensor, ...]) -> float:
    """Largest difference between two lists of maps."""
    return max(float((a - b).abs().max()) for a, b in zip(maps, others, strict=True))
