"""How long training stands still for a checkpoint, written in the background and in the loop itself.

    python tools/benchmark_checkpoint.py [--model SepViT_Tiny] [--device cpu] [--out DIR] [--times 5]

The network, AdamW's moments and averaged weights are saved in both ways in turn; prints medians and their ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sepvit
from checkpoints import CheckpointWriter, numbered
from engine import Precision, Training
from training.commands import Parser, path, positive_int, run_command
from training.devices import check_device
from utils import UserError, make_folder


def trained_once(name: str, device: torch.device) -> Training:
    """A run with all that a checkpoint holds."""
    model = timm.create_model(name, num_classes=1000).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return Training(model, model, optimizer, scheduler, Precision(device, None).scaler(), ModelEmaV3(model))


def check_folder(folder: str) -> None:
    """Refuse a folder to measure that is not there, or cannot be written to.

    Raises:
        UserError: it is so.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--out {folder}: no such folder; name one on the disk to measure")
    make_folder(Path(folder), "--out")


def build_parser() -> Parser:
    """The command's settings."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=path, help="folder on the disk to measure; the temporary one by default")
    parser.add_argument("--times", type=positive_int, default=5)
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: the device or the folder is not there, or the checkpoints cannot be written.
    """
    check_device(args.device)
    if args.out is not None:
        check_folder(args.out)
    training = trained_once(args.model, torch.device(args.device))
    stalls: dict[str, list[float]] = {"background": [], "loop": []}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        try:
            for _ in range(args.times):
                for way, times in stalls.items():
                    start = time.perf_counter()
                    training.steps += 1
                    writer.save(training.checkpoint() | dict(args={}))
                    if way == "loop":
                        writer.wait()
                    times.append(time.perf_counter() - start)
                    writer.wait()
                    if writer.failure is not None:
                        where = f"--out {args.out or Path(folder).parent}"
                        raise UserError(f"{where}: cannot be written ({writer.failure}); name a folder with more space")
        finally:
            writer.wait()  # when interrupted: the folder is deleted next
        size = numbered(Path(folder))[0].stat().st_size
    background, loop = (statistics.median(times) for times in stalls.values())
    print(f"{args.model}, {size / 1e6:.0f} MB: training stands still for {background:.2f} s, written in the loop for "
          f"{loop:.2f} s; ratio {loop / background:.1f}")  # fmt: skip


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    return run_command(
        "benchmark_checkpoint.py", lambda: main(build_parser().parse_args(arguments)), "take a smaller --model"
    )


if __name__ == "__main__":
    sys.exit(run())
