"""Parameters, multiply-adds and speed of a model. Speed is also given relative to matrix products in the same run.

    python tools/benchmark.py [--model SepViT_Tiny] [--batch-size 1 8] [--dtype float32 bfloat16] [--device cpu]

The ratio is the time of the forward pass, divided by the time of the same number of multiply-adds in large matrix
products of the same number format, which are timed before and after the model. A ratio of 1 is the speed of large
matrix products.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch.autograd import DeviceType

if not __package__:
    import _repository  # noqa: F401
import sepvit
from training.commands import Parser, positive_int, run_command
from training.devices import check_device, synchronize
from training.measure import count_multiply_adds, median_time

SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices: a GPU multiplies 2048 × 2048 faster than one call starts


def matrix_product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the multiply-adds per second of a large matrix product."""
    side = SIDES.get(device.type, SIDES["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return side**3 / median_time(lambda: a @ b, device)


def operation_times(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds that a call spends in each operation on a CPU, or in each kernel on a GPU."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        # On a GPU, operations have times too: those of their kernels, which would count twice.
        if on_gpu == (event.device_type == DeviceType.CUDA) and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + microseconds / 1e6
    return times


def print_profile(function: Callable[[], object], device: torch.device) -> None:
    """Print the operations that a call spends most time in."""
    times = operation_times(function, device)
    for name, duration in sorted(times.items(), key=lambda entry: -entry[1])[:10]:
        print(f"    {100 * duration / sum(times.values()):5.1f} %  {name}")


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--input-size", type=positive_int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="list the operations that take most of the time")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count, measure and print.

    Raises:
        UserError: the device is not available.
    """
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
                duration = median_time(partial(model, images), device, least=3.0)
                rate = statistics.mean([before, matrix_product_rate(dtype, device)])
                ratio = duration * rate / (batch_size * multiply_adds)
                print(
                    f"{dtype_name}, batch {batch_size}: {1e3 * duration / batch_size:.2f} ms/image, "
                    f"{ratio:.2f} × the time at the {rate / 1e9:.0f} G multiply-adds/s of a matrix product"
                )
                if args.profile:
                    print_profile(partial(model, images), device)


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use a smaller --batch-size or --input-size"
    return run_command("benchmark.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
