"""Measure the throughput of main.py's training loaders alone (`--loader faithful` and `--loader fast`).

    python benchmarks/input_pipeline.py --data-path imagenet [--input-size 224] [--workers 0 2] [--rounds 5]
    python benchmarks/input_pipeline.py --synthetic 500x375 [--images 512] [--out FILE.json]

Both loaders augment as in the published recipe. They are measured alternately, round by round. The fast loader's work
on the device is not measured. Without workers, CPU time is measured, since other processes disturb it less: the result
is images per second per core. `--synthetic` writes JPEGs (quality 90) composed of scikit-image's and scikit-learn's
photographs.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import main as classification
from datasets import LoaderSettings, build_train_loader, epoch_batches
from sepvit_lib.common.command_line import Parser, natural, path, positive_int, run_command
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.machine import describe
from sepvit_lib.common.packages import require
from sepvit_lib.common.storage import write_output
from sepvit_lib.rounds import Spread, ratio
from tools.exporting.data import photographs

LOADERS = ("faithful", "fast")
TILE = (300, 400)  # height and width of the largest part of a photograph; all photographs are at least as large
CLASSES = 8  # of synthetic images
QUALITY = 90  # of synthetic JPEGs


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write JPEGs of a given size into class folders. Each is composed of parts of photographs, which are not resized.

    Args:
        folder: folder in which `train` is created.
        size: width and height in pixels.
        count: number of images.
    """
    from sklearn.datasets import load_sample_images

    sources = [*map(np.asarray, photographs().images), *load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        file = folder / "train" / str(number % CLASSES) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(composed(sources, *size, rng)).save(file, quality=QUALITY)


def composed(photographs: Sequence[np.ndarray], width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Compose an image, height × width × 3, of parts of photographs."""
    image = np.empty((height, width, 3), np.uint8)
    for top, left in itertools.product(range(0, height, TILE[0]), range(0, width, TILE[1])):
        photograph = photographs[int(rng.integers(len(photographs)))]
        y, x = (int(rng.integers(side - part + 1)) for side, part in zip(photograph.shape, TILE))
        rows, columns = min(TILE[0], height - top), min(TILE[1], width - left)
        image[top : top + rows, left : left + columns] = photograph[y : y + rows, x : x + columns]
    return image


def build_loader(args: argparse.Namespace, root: str, name: str, workers: int) -> DataLoader:
    """Build one of main.py's training loaders, on at most `--images` images.

    Raises:
        UserError: the images are missing, or there are fewer than one batch.
    """
    flags = ["--data-path", root, "--loader", name, "--input-size", str(args.input_size), "--no-pin-mem"]
    flags += ["--device", "cpu", "--batch-size", str(args.batch_size), "--num_workers", str(workers)]
    settings = classification.build_parser().parse_args(flags)
    data = classification.build_data(settings, is_train=True)
    samples, count = data.dataset.samples, min(args.images, len(data))
    if count < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: there are only {count} images; use a smaller batch")
    data.dataset.samples = [samples[index * len(samples) // count] for index in range(count)]
    return build_train_loader(data, classification.settings_from(settings, LoaderSettings))


def measure(loaders: dict[str, DataLoader], workers: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each loader in each round, after a warm-up round that starts the workers."""
    clock = time.perf_counter if workers else time.process_time
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name in sorted(loaders, reverse=bool(number % 2)):
            start = clock()
            images = sum(len(batch[1]) for batch in epoch_batches(loaders[name], number, 0, 1, lambda _: None))
            if number:
                rates[name].append(images / (clock() - start))
    return rates


def size(text: str) -> tuple[int, int]:
    """Parse the size of synthetic images: WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    return positive_int(width), positive_int(height)


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", type=path, help="folder with class folders in train/")
    about = "write images of this size, and measure with them"
    source.add_argument("--synthetic", type=size, metavar="WIDTHxHEIGHT", help=about)
    add("--images", type=positive_int, default=512, help="images per measurement")
    add("--input-size", type=positive_int, default=224)
    add("--batch-size", type=positive_int, default=64)
    add("--workers", type=natural, nargs="+", default=[0, 2], help="numbers of loader workers")
    add("--rounds", type=positive_int, default=5)
    add("--out", type=path, metavar="FILE.json", help="also write the results to this file")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: the images are missing or too few, or the file cannot be written.
    """
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.synthetic is not None:
            require("--synthetic", "skimage", "sklearn", extra="demo")
            write_photographs(Path(folder), args.synthetic, args.images)
        for workers in args.workers:
            loaders = {name: build_loader(args, args.data_path or folder, name, workers) for name in LOADERS}
            rates = measure(loaders, workers, args.rounds)
            print(f"{workers} workers" if workers else "without workers, per second per core")
            for name, measured in rates.items():
                rate, gain = Spread.of(measured), ratio(measured, rates["faithful"])
                spread = f"{gain.median:.2f} × ({gain.low:.2f} to {gain.high:.2f})"
                print(f"  {name:8} {rate.median:8.0f} images/s, {spread}")
                figures.setdefault(str(workers), {})[name] = {"images_per_second": asdict(rate), "ratio": asdict(gain)}
    if args.out is not None:
        settings = dict(images=args.images, synthetic=args.synthetic, input_size=args.input_size, rounds=args.rounds)
        record = dict(machine=describe(torch.device("cpu")), **settings, loaders=figures)
        content = json.dumps(record, indent=1).encode() + b"\n"
        write_output(Path(args.out), lambda file: file.write(content), f"--out {args.out}")


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use fewer --workers, or a smaller --batch-size"
    return run_command("input_pipeline.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
