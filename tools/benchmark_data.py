"""Speed of the input pipeline alone: stage by stage on one core, and whole loaders with several workers.

    python tools/benchmark_data.py --data imagenet [--input-size 224] [--workers 0 1 2] [--rounds 5] [--out FILE.json]
    python tools/benchmark_data.py --synthetic 500x375 [--count 512]

Two pipelines augment by the published recipe, `faithful` and `fast`. They are measured in turn, round by round. Ratios
are to `faithful`, pair by pair. Each is read from class folders and from a webdataset of the same images, which is
written to a temporary folder. `--synthetic` writes JPEGs (quality 90) composed of scikit-image's and scikit-learn's
photographs.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import io
import itertools
import json
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, functional

import main as classification
from datasets import DeviceTransform, LoaderSettings, build_train_loader, build_transform, epoch_batches
from sepvit_lib.training.commands import Parser, natural, path, positive_int, run_command
from sepvit_lib.training.decoding import CropDecoder
from sepvit_lib.training.devices import available_cores
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.images import decode, read_file
from sepvit_lib.training.samples import ImageData, collate
from sepvit_lib.training.state import Precision
from sepvit_lib.training.storage import write_file
from utils import Stream, seed_cpu

PIPELINES = {
    "faithful": ["--loader", "faithful", "--device", "cpu"],
    "fast": ["--loader", "fast", "--device", "cpu"],
}
CPU = Precision(torch.device("cpu"), None)
SOURCES = ("class folders", "webdataset")
STAGES = ("seed", "read", "decode", "crop", "resize", "augment", "normalise", "erase", "collate")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # of scikit-image
MORE_PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # of scikit-learn
TILE = (300, 400)  # largest part of a photograph, height and width; all photographs are at least as large
CLASSES = 8  # of synthetic images
QUALITY = 90  # of synthetic JPEGs

Stage = tuple[str, Callable[[Any], Any]]

# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write JPEGs of a size into class folders. Each is composed of parts of photographs, at their own resolution.

    Args:
        folder: folder for `train`.
        size: width and height in pixels.
        count: number of images.
    """
    photographs = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    photographs += [load_sample_image(name) for name in MORE_PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / "train" / str(number % CLASSES) / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(composed(photographs, *size, rng)).save(place, quality=QUALITY)


def composed(photographs: Sequence[np.ndarray], width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Cover an image, height × width × 3, with parts of photographs."""
    image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, TILE[0]):
        for left in range(0, width, TILE[1]):
            photograph = photographs[int(rng.integers(len(photographs)))]
            y, x = (int(rng.integers(side - part + 1)) for side, part in zip(photograph.shape, TILE))
            rows, columns = min(TILE[0], height - top), min(TILE[1], width - left)
            image[top : top + rows, left : left + columns] = photograph[y : y + rows, x : x + columns]
    return image


def write_webdataset(folder: Path, data: ImageData, shards: int) -> str:
    """Write the images of class folders as shards of a webdataset. Returns the split that names them."""
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:02}.tar", "w") as archive:
            for number, (name, target) in list(enumerate(data.dataset.samples))[shard::shards]:
                for ending, content in ((Path(name).suffix, Path(name).read_bytes()), (".cls", str(target).encode())):
                    member = tarfile.TarInfo(f"{number:08}{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return f"train-{{00..{shards - 1:02}}}.tar|{len(data)}"


def find_images(args: argparse.Namespace, pipeline: str, where: Sequence[str]) -> ImageData:
    """Find the training images for a pipeline, at most `--images` of a data set of class folders."""
    data = classification.build_data(settings_of(args, pipeline, where), is_train=True)
    if hasattr(data.dataset, "samples"):
        samples, count = data.dataset.samples, min(args.images, len(data))
        data.dataset.samples = [samples[index * len(samples) // count] for index in range(count)]
    return data


def settings_of(args: argparse.Namespace, pipeline: str, where: Sequence[str], workers: int = 0) -> argparse.Namespace:
    """Settings of main.py for a pipeline."""
    settings = [*where, *PIPELINES[pipeline], "--no-pin-mem", "--input-size", str(args.input_size)]
    settings += ["--batch-size", str(args.batch_size), "--num_workers", str(workers)]
    return classification.build_parser().parse_args(settings)


# ----------------------------------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------------------------------


def stages_of(data: ImageData) -> list[Stage]:
    """The stages that turn an image's path into what its pipeline collates."""
    if isinstance(data.decode, CropDecoder):
        return [
            ("read", read_file),
            ("decode", data.decode.decode),
            ("resize", data.decode.resize),
            ("augment", data.transform),
        ]
    crop, *steps, to_tensor, normalize, erasing = data.transform.transforms
    return [
        ("read", read_file),
        ("decode", decode),
        ("crop", lambda image: functional.crop(image, *crop.get_params(image, crop.scale, crop.ratio))),
        ("resize", lambda image: functional.resize(image, crop.size, crop.interpolation)),
        ("augment", Compose(steps)),
        ("normalise", lambda image: normalize(to_tensor(image))),
        ("erase", erasing),
    ]


def batch_stages_of(pipeline: str) -> list[Stage]:
    """The stages that turn samples into a batch, and a batch into images on the device, here a CPU."""
    if pipeline == "faithful":
        return [("collate", collate)]
    device = device_transform()
    (erase,) = device.erasing
    device.erasing = []
    return [("collate", lambda samples: collate(samples)[0]), ("normalise", device), ("erase", erase)]


def device_transform() -> DeviceTransform:
    """What the device does in the fast pipeline."""
    settings = classification.build_parser().parse_args(["--loader", "fast"])
    return DeviceTransform(build_transform(True, classification.transform_settings(settings)), CPU)


def time_stages(data: ImageData, pipeline: str, batch_size: int) -> dict[str, float]:
    """CPU seconds per image that a pipeline's stages take on one core.

    Raises:
        UserError: the fast loader leaves an image to PIL, and so has no stages for it.
    """
    times = dict.fromkeys(STAGES, 0.0)

    def timed(stages: Sequence[Stage], value: Any) -> Any:
        for name, function in stages:
            start = time.process_time()
            value = function(value)
            times[name] += time.process_time() - start
        return value

    stages = [("seed", lambda sample: seed_sample(*sample)), *stages_of(data)]
    batch_stages, samples = batch_stages_of(pipeline), []
    for number, (name, target) in enumerate(data.dataset.samples):
        try:
            samples.append((timed(stages, (name, number)), target, ""))
        except ValueError as error:
            raise UserError(f"{name}: the fast loader leaves it to PIL ({error}); measure other JPEGs") from None
        if len(samples) == batch_size or number == len(data) - 1:
            timed(batch_stages, samples)
            samples = []
    return {stage: seconds / len(data) for stage, seconds in times.items() if seconds}


def seed_sample(path: str, number: int) -> str:
    """Seed an image's augmentation. Returns the image's path."""
    seed_cpu(Stream.AUGMENTATION, 0, 0, number)
    return path


def measure_stages(images: dict[str, ImageData], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds per image of each pipeline's stages."""
    rounds: dict[str, list[dict[str, float]]] = {pipeline: [] for pipeline in images}
    for number in range(args.rounds + 1):
        for pipeline, data in images.items():
            times = time_stages(data, pipeline, args.batch_size)
            if number:  # the first round warms up
                rounds[pipeline].append(times)
    return {
        pipeline: {stage: 1e3 * statistics.median(times[stage] for times in measured) for stage in measured[0]}
        for pipeline, measured in rounds.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------------------------------


def measure_loaders(loaders: dict[tuple[str, str], DataLoader], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Images per second of each loader in each round, with what the device does where that is a CPU.

    Without workers, seconds of CPU time count: they are images per second and core, and other processes disturb less.
    """
    alone = all(loader.num_workers == 0 for loader in loaders.values())
    clock = time.process_time if alone else time.perf_counter
    rates: dict[tuple[str, str], list[float]] = {name: [] for name in loaders}
    prepare = device_transform()
    names = list(loaders)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start, images = clock(), 0
            for batch, targets, _ in epoch_batches(loaders[name], number, 0, 1, lambda place: None):
                images += len(targets)
                if name[1] == "fast":
                    prepare(batch)
            if number:  # the first round starts the workers
                rates[name].append(images / (clock() - start))
    return rates


def build_loaders(
    args: argparse.Namespace, places: dict[str, list[str]], workers: int
) -> dict[tuple[str, str], DataLoader]:
    """Build a loader of each source for each pipeline."""
    loaders = {}
    for (source, where), pipeline in itertools.product(places.items(), PIPELINES):
        settings = classification.settings_from(settings_of(args, pipeline, where, workers), LoaderSettings)
        loaders[source, pipeline] = build_train_loader(find_images(args, pipeline, where), settings)
    return loaders


def summary(rates: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median rate of each loader, and median, least and greatest ratio to the faithful loader of class folders."""
    baseline = rates[SOURCES[0], "faithful"]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (source, pipeline), measured in rates.items():
        ratios = [rate / before for rate, before in zip(measured, baseline)]
        figures.setdefault(source, {})[pipeline] = {
            "images_per_second": statistics.median(measured),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "greatest_ratio": max(ratios),
        }
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def print_stages(stages: dict[str, dict[str, float]]) -> None:
    """Print the stages of all pipelines as a table, in ms per image."""
    print("\none core, CPU ms per image")
    print(f"{'':12}" + "".join(f"{pipeline:>12}" for pipeline in stages))
    for stage in STAGES:
        print(f"{stage:12}" + "".join(f"{times.get(stage, 0):12.3f}" for times in stages.values()))
    print(f"{'sum':12}" + "".join(f"{sum(times.values()):12.3f}" for times in stages.values()))
    print(f"{'images/s':12}" + "".join(f"{1e3 / sum(times.values()):12.0f}" for times in stages.values()))
    faithful = sum(stages["faithful"].values())
    print(f"{'ratio':12}" + "".join(f"{faithful / sum(times.values()):12.2f}" for times in stages.values()))


def print_loaders(figures: dict[str, dict[str, dict[str, float]]], workers: int) -> None:
    """Print the rates of all loaders with a number of workers."""
    print(f"\nwhole loader, {workers} workers" if workers else "\nwhole loader without workers, one core")
    for source, pipelines in figures.items():
        for pipeline, figure in pipelines.items():
            spread = f"{figure['least_ratio']:.2f} to {figure['greatest_ratio']:.2f}"
            print(
                f"{source:14} {pipeline:10} {figure['images_per_second']:8.0f} images/s, "
                f"{figure['ratio']:.2f} × ({spread})"
            )


def machine() -> dict[str, Any]:
    """Processor and versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy")
    return dict(
        processor=model,
        cores=available_cores(),
        python=platform.python_version(),
        **{name: version(name) for name in packages},
    )


def size(text: str) -> tuple[int, int]:
    """Parse a size: WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    return positive_int(width), positive_int(height)


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=path, help="folder with train/ of class folders")
    add("--synthetic", type=size, metavar="WIDTHxHEIGHT", help="write images of this size, and measure with them")
    add("--count", type=positive_int, default=512, help="number of synthetic images")
    add("--images", type=positive_int, default=512, help="images in a measurement")
    add("--input-size", type=positive_int, default=224)
    add("--batch-size", type=positive_int, default=64)
    add("--workers", type=natural, nargs="+", default=[0, 1, 2], help="numbers of loader workers")
    add("--rounds", type=positive_int, default=5)
    add("--out", type=path, metavar="FILE.json", help="also write the figures there")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: the images are missing, too few or too small a crop, or the file cannot be written.
    """
    if (args.data is None) == (args.synthetic is None):
        raise UserError("--data, --synthetic: choose one: a folder of images, or the size of images to write")
    if args.input_size <= 32:
        raise UserError(f"--input-size {args.input_size}: up to 32, all images are decoded by PIL; use a larger one")
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        if args.synthetic is not None:
            write_photographs(folders[0], args.synthetic, args.count)
        root = args.data if args.data is not None else folders[0]
        record = measure(args, root, folders[1])
    if args.out is not None:
        content = json.dumps(record, indent=1).encode()
        try:
            write_file(Path(args.out), lambda file: file.write(content + b"\n"))
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); name another file") from None


def measure(args: argparse.Namespace, root: str | Path, shards: Path) -> dict[str, Any]:
    """Measure all pipelines on the images of a folder, and print the figures.

    Args:
        args: settings.
        root: folder with `train`.
        shards: empty folder for a webdataset of the same images.

    Returns:
        all figures.
    """
    where = ["--data-path", str(root)]
    images = {pipeline: find_images(args, pipeline, where) for pipeline in PIPELINES}
    data = images["faithful"]
    if len(data) < args.batch_size:
        measured = f"{len(data)} images of {root} are measured"
        raise UserError(f"--batch-size {args.batch_size}: only {measured}; use a smaller one")
    sizes = [Path(name).stat().st_size for name, _ in data.dataset.samples]
    print(
        f"{len(data)} images of {statistics.mean(sizes) / 1e3:.0f} KB on average, to {args.input_size} × "
        f"{args.input_size}; {machine()['processor']}, torch {torch.__version__}"
    )
    stages = measure_stages(images, args)
    print_stages(stages)
    split = write_webdataset(shards, data, max(1, *args.workers))
    places = {
        SOURCES[0]: where,
        SOURCES[1]: [
            "--data-set",
            "wds/images",
            "--data-path",
            str(shards),
            "--train-split",
            split,
            "--num-classes",
            str(data.num_classes),
        ],
    }
    loaders = {}
    for workers in args.workers:
        loaders[workers] = summary(measure_loaders(build_loaders(args, places, workers), args.rounds))
        print_loaders(loaders[workers], workers)
    return dict(
        machine=machine(),
        images=len(data),
        mean_bytes=statistics.mean(sizes),
        input_size=args.input_size,
        batch_size=args.batch_size,
        rounds=args.rounds,
        milliseconds=stages,
        loaders=loaders,
    )


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use fewer --workers, or a smaller --batch-size"
    return run_command("benchmark_data.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
