"""Classify images: print each image's likeliest classes, and optionally write results to files and draw pictures.

    python predict.py IMAGE … --resume PATH [--topk 5] [--json FILE] [--csv FILE] [--features FILE] [--out DIR]

IMAGE is an image, a folder of images, or a pattern such as "photos/**/*.jpg". PATH is a checkpoint of main.py or of the
published code, a folder in timm's layout, or a file that tools/export.py wrote. If an image may have several labels, a
star marks its labels: the classes whose probability is at least --threshold. Unreadable images are reported and
skipped; the exit status is then 1.
"""

import sepvit_lib.common.environment  # noqa: F401 before timm

# isort: split
import argparse
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from sepvit_lib.common import tables
from sepvit_lib.common.class_weights import read_class_values
from sepvit_lib.common.command_line import Parser, fraction, natural, path, positive, positive_int, run_command
from sepvit_lib.common.devices import available_cores, best_device, check_device
from sepvit_lib.common.errors import UNREADABLE_STATUS, UserError, one_line
from sepvit_lib.common.storage import make_folder, write_output
from sepvit_lib.inference.classifier import THRESHOLD, Classifier, Description, Preparation, load_classifier
from sepvit_lib.inference.images import PLACEHOLDER, Task, check_pictures, find_images, read_image
from sepvit_lib.inference.pictures import with_classes
from sepvit_lib.pipeline.image_files import as_picture
from sepvit_lib.run.state import Precision

STANDARD_OUTPUT = "-"


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image.

    Attributes:
        task: the image.
        classes: names and probabilities (0 to 1) of the classes, the likeliest first.
        labels: names of the classes that the image has, if it may have several; otherwise None.
        features: features before the classifier, C; None unless asked for.
    """

    task: Task
    classes: list[tuple[str, float]]
    labels: list[str] | None = None
    features: Tensor | None = None


def read(prepare: Preparation, orientation: str, tasks: Sequence[Task]) -> list[Tensor | str]:
    """Read images. Returns the classifier's input for each image, or the reason why it is unreadable."""
    entries: list[Tensor | str] = []
    for task in tasks:
        try:
            what, channels = f"{PLACEHOLDER} {task.path}", prepare.preprocessing.channels
            entries.append(prepare(read_image(task.path, what, orientation, channels)))
        except UserError as error:
            entries.append(str(error))
    return entries


def main(args: argparse.Namespace) -> int:
    """Classify the images. Returns the exit status.

    Raises:
        UserError: there is no image or no classifier, or the results cannot be written.
    """
    check_device(args.device)
    check_outputs(args)
    precision = Precision.of(torch.device(args.device), args.amp)
    classifier = load_classifier(args.resume, args.model, args.averaged, precision)
    thresholds = find_thresholds(args, classifier)
    if args.features and classifier.embed is None:
        raise UserError(f"--features {args.features}: an exported file computes only logits; pass --resume CHECKPOINT")
    tasks = find_images(args.images, classifier.prepare.preprocessing.channels != 3)
    if args.out:
        check_pictures(tasks, Path(args.out), args.overwrite)
        make_folder(Path(args.out), f"--out {args.out}")
    predictions: list[Prediction] = []
    prints = STANDARD_OUTPUT not in (args.json, args.csv)
    with tqdm(total=len(tasks), desc="predict", unit=" images", dynamic_ncols=True, disable=None) as bar:
        for prediction in predict(classifier, tasks, args, thresholds):
            bar.update()
            if isinstance(prediction, str):
                bar.write(f"predict.py: {prediction}", file=sys.stderr)
                continue
            predictions.append(prediction)
            if args.out:
                draw(prediction, Path(args.out), classifier.description)
            if prints:
                bar.write(as_text(prediction), file=sys.stdout)
    write_results(predictions, args)
    return UNREADABLE_STATUS if len(predictions) < len(tasks) else 0


def find_thresholds(args: argparse.Namespace, classifier: Classifier) -> Tensor:
    """Probability of each class from which an image has this label; infinite if each image has a single label.

    Raises:
        UserError: a file of thresholds cannot be read, or each image has a single label.
    """
    made, what = classifier.description, f"--threshold {args.threshold}"
    if args.threshold is not None and not made.multi_label:
        raise UserError(f"{what}: --resume {args.resume} has one label per image; omit --threshold")
    if isinstance(args.threshold, str):
        return torch.tensor(read_class_values(args.threshold, made.classes, what))
    threshold = (THRESHOLD if args.threshold is None else args.threshold) if made.multi_label else math.inf
    return torch.full((len(made.classes),), threshold)


def predict(
    classifier: Classifier, tasks: Sequence[Task], args: argparse.Namespace, thresholds: Tensor
) -> Iterator[Prediction | str]:
    """Classify images in batches. Yields a prediction for each image in order, or the reason why it is unreadable."""
    loader: DataLoader[Task] = DataLoader(
        tasks,  # type: ignore[arg-type]  # a sequence is enough
        batch_size=args.batch_size,
        num_workers=min(args.num_workers, (len(tasks) - 1) // args.batch_size),  # no workers for a single batch
        collate_fn=partial(read, classifier.prepare, classifier.description.orientation),
        pin_memory=torch.device(args.device).type == "cuda",
    )
    minimum, remaining = dict(zip(classifier.description.classes, thresholds.tolist())), iter(tasks)
    for batch in loader:
        inputs = [entry for entry in batch if not isinstance(entry, str)]
        outputs = iter(compute(classifier, inputs, args) if inputs else ())
        for entry, task in zip(batch, remaining):
            if isinstance(entry, str):
                yield entry
            else:
                probabilities, features = next(outputs)
                rows = classifier.ranked(probabilities)
                labels = [name for name, value in rows if value >= minimum[name]]
                shown = rows[: args.topk] + [row for row in rows[args.topk :] if row[0] in labels]
                yield Prediction(task, shown, labels if classifier.description.multi_label else None, features)


def compute(
    classifier: Classifier, inputs: Sequence[Tensor], args: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Compute the probabilities, and if asked for, the features, of each image in a batch."""
    if not args.features:
        return zip(classifier.probabilities(classifier.logits(inputs), args.temperature), itertools.repeat(None))
    logits, features = classifier.logits_and_features(inputs)
    return zip(classifier.probabilities(logits, args.temperature), features)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def as_text(prediction: Prediction) -> str:
    """Format a prediction as lines: the image's path, then one line per class, with probability and name."""
    labels = prediction.labels or ()
    rows = (f"{'* '[name not in labels]} {100 * value:6.2f} %  {name}" for name, value in prediction.classes)
    return "\n".join([one_line(str(prediction.task.path)), *rows])


def as_json(predictions: Sequence[Prediction]) -> str:
    """Format predictions as a JSON array: one object per image, with its classes and their probabilities."""
    entries = []
    for prediction in predictions:
        rows = [{"class": name, "probability": round(probability, 6)} for name, probability in prediction.classes]
        labels = {} if prediction.labels is None else {"labels": prediction.labels}
        entries.append({"image": str(prediction.task.path), **labels, "predictions": rows})
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Format predictions as CSV: one line per class, with image, rank, class, probability and whether it is a label."""
    lines = [["image", "rank", "class", "probability"]]
    if any(prediction.labels is not None for prediction in predictions):
        lines[0].append("is_label")
    for prediction in predictions:
        for rank, (name, probability) in enumerate(prediction.classes, start=1):
            is_label = [] if prediction.labels is None else [str(int(name in prediction.labels))]
            lines.append([str(prediction.task.path), str(rank), name, f"{probability:.6f}", *is_label])
    return tables.as_csv(lines) + "\n"


def as_arrays(predictions: Sequence[Prediction]) -> bytes:
    """Format the features as a NumPy archive: `images`, the N paths, and `features`, N × C, float32."""
    file, paths = io.BytesIO(), [str(prediction.task.path) for prediction in predictions]
    rows = [prediction.features.numpy() for prediction in predictions if prediction.features is not None]
    np.savez(file, images=np.array(paths), features=np.stack(rows) if rows else np.empty((0, 0), np.float32))
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[Prediction]], str | bytes]] = dict(json=as_json, csv=as_csv, features=as_arrays)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before anything is computed.

    Raises:
        UserError: two formats, or the features, are to be written to standard output; or a path is a folder, or its
            folder is missing.
    """
    if args.json == args.csv == STANDARD_OUTPUT:
        raise UserError("--json - and --csv -: only one of them can be written to standard output")
    if args.features == STANDARD_OUTPUT:
        raise UserError("--features -: must be a file")
    for flag in FORMATS:
        name = getattr(args, flag)
        if name and name != STANDARD_OUTPUT and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            raise UserError(f"--{flag} {name}: must be a file in an existing folder, or - for standard output")


def write_results(predictions: Sequence[Prediction], args: argparse.Namespace) -> None:
    """Write the requested files, each atomically.

    Raises:
        UserError: a file cannot be written.
    """
    for flag, convert in FORMATS.items():
        name = getattr(args, flag)
        content = convert(predictions) if name else ""
        if name == STANDARD_OUTPUT:
            print(content, end="")
        elif name:
            if isinstance(content, str):
                content = content.encode("utf-8", "surrogateescape")  # file names may contain any bytes
            write_output(Path(name), methodcaller("write", content), f"--{flag} {name}")


def draw(prediction: Prediction, out: Path, description: Description) -> None:
    """Write a picture that shows the image and its most likely classes.

    Raises:
        UserError: the picture cannot be written.
    """
    picture, path, channels = prediction.task.picture(out), prediction.task.path, description.preprocessing.channels
    image = as_picture(read_image(path, f"{PLACEHOLDER} {path}", description.orientation, channels))
    drawn = with_classes(image, prediction.classes)
    write_output(picture, lambda file: drawn.save(file, format="PNG"), f"--out {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


def share_or_file(text: str) -> float | str:
    """Parse a number from 0 to 1, or the path of a file."""
    try:
        return fraction(text)
    except ValueError:
        return path(text)


def build_parser() -> Parser:
    """Make the command's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", type=path, metavar=PLACEHOLDER, help="an image, a folder of images, or a glob pattern")
    add("--resume", required=True, type=path, metavar="PATH", help="checkpoint or exported file")
    add("--model", default="", metavar="NAME", help="timm's name of the network, if PATH does not specify it")
    add("--averaged", action="store_true", help="use the checkpoint's averaged weights")
    add("--topk", type=positive_int, default=5, metavar="K", help="number of classes per image, default 5")
    about = f"minimum probability of a label, default {THRESHOLD}, or a JSON file with one per class"
    add("--threshold", type=share_or_file, metavar="PROBABILITY|FILE", help=about)
    about = "divide the logits by T, which calibrates the probabilities; main.py --report finds T"
    add("--temperature", type=positive, default=1.0, metavar="T", help=about)
    add("--json", type=path, metavar="FILE", help="write the results as JSON; -: to standard output")
    add("--csv", type=path, metavar="FILE", help="write the results as CSV; -: to standard output")
    about = "write the features before the classifier as NumPy arrays: `images`, `features` (images × C)"
    add("--features", default="", type=path, metavar="FILE.npz", help=about)
    add("--out", type=path, metavar="DIR", help="write pictures with the classes on them")
    add("--overwrite", action="store_true", help="replace existing pictures in DIR")
    add("--batch-size", type=positive_int, default=32, metavar="N", help="images per forward pass, default 32")
    workers = min(10, available_cores())
    add("--num_workers", type=natural, default=workers, metavar="N", help=f"loader workers, default {workers}")
    add("--device", default=best_device(), help="cuda, mps or cpu; by default the best available")
    formats = ("auto", "bfloat16", "float16", "off")
    add("--amp", choices=formats, default="auto", help="mixed precision; auto: bfloat16 or float16, only on CUDA")
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 1 if images are unreadable, 2 for a user's mistake."""
    parser = build_parser()
    return run_command("predict.py", lambda: main(parser.parse_args(arguments)), parser, "use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(run())
