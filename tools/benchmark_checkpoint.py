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


def trained_once(name: str, device: torch.device) -> Training:
    """A run with all that a checkpoint holds."""
    model = timm.create_model(name, num_classes=1000).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return Training(model, model, optimizer, scheduler, Precision(device, None).scaler(), ModelEmaV3(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="folder on the disk to measure; the temporary one by default")
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    training = trained_once(args.model, torch.device(args.device))
    stalls: dict[str, list[float]] = {"background": [], "loop": []}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        for _ in range(args.times):
            for way, times in stalls.items():
                start = time.perf_counter()
                training.steps += 1
                writer.save(training.checkpoint() | dict(args={}))
                if way == "loop":
                    writer.wait()
                times.append(time.perf_counter() - start)
                writer.wait()
        size = numbered(Path(folder))[0].stat().st_size
    background, loop = (statistics.median(times) for times in stalls.values())
    print(f"{args.model}, {size / 1e6:.0f} MB: training stands still for {background:.2f} s, written in the loop for "
          f"{loop:.2f} s; ratio {loop / background:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
