"""Parameters, multiply-adds and speed of a model, the speed also as a ratio to that of matrix products in the same run.

    python tools/benchmark.py [--model SepViT_Tiny] [--batch-size 1 8] [--dtype float32 bfloat16] [--device cpu]

The ratio is the time of the forward pass over the time that its multiply-adds take at the rate of a large matrix
product of the same number format, measured before and after each timing: 1 would be large matrix products alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sepvit
from training.commands import Parser, positive_int, run_command
from training.devices import check_device

SIDE = 2048  # of the matrices


def count_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of a forward pass, as fvcore counts: matrix products, convolutions, linear and LayerNorm layers."""
    normalised = []
    hooks = [
        module.register_forward_hook(lambda *call: normalised.append(call[2].numel()))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    # The counter knows the products that attention is made of, not the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() // 2 + 5 * sum(normalised)


def seconds(function: Callable[[], object], device: torch.device, least: float = 1.0) -> float:
    """Median time of a call, over at least `least` seconds after one to warm up."""

    def call() -> float:
        start = time.perf_counter()
        function()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start

    call()
    times = [call()]
    while sum(times) < least:
        times.append(call())
    return statistics.median(times)


def matrix_product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a large matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    return SIDE**3 / seconds(lambda: a @ b, device)


def profile(model: nn.Module, images: torch.Tensor) -> None:
    """Print which operations a forward pass spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if images.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        model(images)
    averages = profiler.key_averages()
    attribute = "self_device_time_total" if images.is_cuda else "self_cpu_time_total"
    total = sum(getattr(event, attribute) for event in averages)
    for event in sorted(averages, key=lambda event: -getattr(event, attribute))[:10]:
        print(f"    {100 * getattr(event, attribute) / total:5.1f} %  {event.key}")


def build_parser() -> Parser:
    """The command's settings."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--input-size", type=positive_int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="list the operations a pass spends its time in")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count, measure and print."""
    check_device(args.device)
    device = torch.device(args.device)
    model = timm.create_model(args.model, img_size=args.input_size).eval()
    multiply_adds = count_multiply_adds(model, torch.zeros(1, 3, args.input_size, args.input_size))
    parameters = sum(p.numel() for p in model.parameters())
    model.to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}, {args.input_size} × {args.input_size}: {parameters / 1e6:.3f} M parameters, "
          f"{multiply_adds / 1e9:.3f} G multiply-adds; torch {torch.__version__}, {name}")  # fmt: skip
    for dtype_name in args.dtype:
        dtype = getattr(torch, dtype_name)
        for batch_size in args.batch_size:
            images = torch.randn(batch_size, 3, args.input_size, args.input_size, device=device)
            enabled = dtype != torch.float32
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
                before = matrix_product_rate(dtype, device)
                duration = seconds(lambda images=images: model(images), device, least=3.0)
                rate = statistics.mean([before, matrix_product_rate(dtype, device)])
                ratio = duration * rate / (batch_size * multiply_adds)
                print(
                    f"{dtype_name}, batch {batch_size}: {1e3 * duration / batch_size:.2f} ms/image, "
                    f"{ratio:.2f} × the time at the {rate / 1e9:.0f} G multiply-adds/s of a matrix product"
                )
                if args.profile:
                    profile(model, images)


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    advice = "take a smaller --batch-size or --input-size"
    return run_command("benchmark.py", lambda: main(build_parser().parse_args(arguments)), advice)


if __name__ == "__main__":
    sys.exit(run())
