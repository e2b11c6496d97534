"""How long saving a checkpoint stops training, if it is written in the background and if it is written in the loop.

    python tools/benchmark_checkpoint.py [--model SepViT_Tiny] [--device cpu] [--out DIR] [--times 5]

A checkpoint holds the network, AdamW's moments and averaged weights. It is saved both ways, alternately. Prints the
medians and their ratio.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from timm.scheduler import StepLRScheduler
from timm.utils import ModelEmaV3

import sepvit
from sepvit_lib.training.checkpoints import CheckpointWriter
from sepvit_lib.training.commands import Parser, path, positive_int, run_command
from sepvit_lib.training.devices import check_device
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.naming import StepNames
from sepvit_lib.training.state import Precision, Training
from sepvit_lib.training.storage import make_folder


def trained_once(name: str, device: torch.device) -> Training:
    """Make a run's state after one step, with everything that a checkpoint holds."""
    model = timm.create_model(name, num_classes=1000).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler = StepLRScheduler(optimizer, decay_t=1)
    return Training(model, model, optimizer, scheduler, Precision(device, None).scaler(), ModelEmaV3(model))


def check_folder(folder: str) -> None:
    """Refuse a folder that is missing or not writable.

    Raises:
        UserError: it is.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--out {folder}: no such folder; name one on the disk to measure")
    make_folder(Path(folder), f"--out {folder}")


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=path, help="folder on the disk to measure, default the temporary folder")
    parser.add_argument("--times", type=positive_int, default=5)
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: the device is not available, the folder is missing, or the checkpoints cannot be written.
    """
    check_device(args.device)
    if args.out is not None:
        check_folder(args.out)
    state = trained_once(args.model, torch.device(args.device))
    stalls: dict[str, list[float]] = {"background": [], "loop": []}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        names = StepNames(keep=1)
        writer = CheckpointWriter(Path(folder), names)
        try:
            for _ in range(args.times):
                for way, times in stalls.items():
                    start = time.perf_counter()
                    state.global_step += 1
                    writer.save(state.checkpoint() | dict(args={}))
                    if way == "loop":
                        writer.wait()
                    times.append(time.perf_counter() - start)
                    writer.wait()
                    if writer.failure is not None:
                        where = f"--out {args.out or Path(folder).parent}"
                        raise UserError(f"{where}: cannot be written ({writer.failure}); name a folder with more space")
        finally:
            writer.wait()  # after Ctrl-C, too: the folder is deleted next
        size = names.numbered(Path(folder))[0].stat().st_size
    background, loop = (statistics.median(times) for times in stalls.values())
    print(
        f"{args.model}, {size / 1e6:.0f} MB: training stops for {background:.2f} s if written in the background, "
        f"for {loop:.2f} s if written in the loop; ratio {loop / background:.1f}"
    )


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use a smaller --model"
    return run_command("benchmark_checkpoint.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
