"""Real images on which export.py compares the exported files and calibrates int8."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

import main
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import require
from sepvit_lib.common.saved_settings import settings_in
from sepvit_lib.inference.classifier import Classifier, class_names
from sepvit_lib.pipeline.image_files import evenly_spaced
from sepvit_lib.pipeline.samples import ImageData, ValSamples
from sepvit_lib.pipeline.streams import ValStream
from sepvit_lib.run.checkpoints import read_checkpoint

CALIBRATION_IMAGES = 128
BATCH_SIZE = 8
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # bundled with scikit-image

# Settings of the training run that choose its images.
OF_DATA = set(
    "val_fraction split_seed path_column label_column split_column group_column weight_column multi_label "
    "ignore_classes".split()
)


@dataclass(frozen=True)
class Images:
    """Images on which to compare the forms of a classifier.

    Attributes:
        source: description of the images.
        images: the images, RGB or C × H × W.
        labels: class index of each image, or 1 for each of its labels and 0 for the others; empty if unknown.
    """

    source: str
    images: Sequence[Image.Image | Tensor]
    labels: Sequence[int | Tensor] = ()

    @property
    def metric(self) -> str:
        """Name of the metric that `correct` computes."""
        return "sample F1" if self.labels and isinstance(self.labels[0], Tensor) else "top-1"

    def batches(self) -> Iterator[tuple[Sequence[Image.Image | Tensor], Sequence[int | Tensor]]]:
        """Batches of images and labels."""
        for start in range(0, len(self.images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            yield self.images[part], self.labels[part]

    def accuracy(self, classifier: Classifier, logits: Callable[[Tensor], Tensor]) -> float:
        """Accuracy (0 to 1) of a function from a classifier's inputs to logits. See `correct`."""
        hits = 0.0
        for images, labels in self.batches():
            inputs = torch.stack([classifier.prepare(image) for image in images])
            hits += correct(logits(inputs), labels)
        return hits / len(self.images)


def correct(logits: Tensor, labels: Sequence[int | Tensor]) -> float:
    """Number of correctly classified images: for several labels per image, the sum of the images' F1.

    Args:
        logits: images × classes.
        labels: see `Images.labels`.
    """
    targets = torch.stack([torch.as_tensor(label) for label in labels])
    if targets.ndim == 1:
        return float((logits.argmax(dim=1) == targets).sum())
    hits, total = ((logits >= 0) & (targets > 0)).sum(dim=1), (logits >= 0).sum(dim=1) + (targets > 0).sum(dim=1)
    return float(torch.where(total > 0, 2 * hits / total, 1).sum())


def photographs(channels: int = 3) -> Images:
    """Sample photographs from scikit-image, in different shapes; noise for other than three channels.

    Raises:
        UserError: scikit-image is missing.
    """
    if channels != 3:
        return Images("four images of noise", [torch.rand(channels, 480, 640) for _ in PHOTOGRAPHS])
    require("the photographs to compare on (or choose a data set with --data-path)", "skimage", extra="demo")
    import skimage.data

    images = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    return Images("four sample photographs from scikit-image", images)


def find_labelled(args: argparse.Namespace, classifier: Classifier) -> Images:
    """Validation images of the data set, evenly spaced.

    Raises:
        UserError: there are no images, or their classes differ from the classifier's.
    """
    data, names = _find(args, classifier, is_train=False), classifier.description.classes
    if data.classes:  # readable names, like the classifier's
        data = replace(data, classes=list(class_names(data.classes, data.num_classes)))
    data = data.matched(names if classifier.is_named else None, f"--resume {args.resume}")
    if data.num_classes != len(names):
        counts = f"{data.num_classes} classes, but the checkpoint has {len(names)}"
        raise UserError(f"--data-path {args.data_path}: has {counts}; use the data set that it was trained on")
    images, labels = zip(*_spaced(data, args.images))
    return Images(f"{len(images)} validation images of {args.data_path}", images, labels)


def calibration_images(args: argparse.Namespace, classifier: Classifier) -> list[Image.Image | Tensor]:
    """Training images, evenly spaced.

    Raises:
        UserError: there are no images.
    """
    return [image for image, _ in _spaced(_find(args, classifier, is_train=True), CALIBRATION_IMAGES)]


def _find(args: argparse.Namespace, classifier: Classifier, is_train: bool) -> ImageData:
    settings = main.build_parser().parse_args([])
    settings.data_path, settings.data_set, settings.class_map = args.data_path, args.data_set, args.class_map
    settings.orientation = classifier.description.orientation
    settings.in_chans = classifier.description.preprocessing.channels
    saved = {} if Path(args.resume).is_dir() else settings_in(read_checkpoint(args.resume, f"--resume {args.resume}"))
    for name in OF_DATA & saved.keys():
        setattr(settings, name, saved[name])
    return main.build_data(settings, is_train)


def _spaced(data: ImageData, count: int) -> Iterator[tuple[Image.Image | Tensor, int | Tensor]]:
    """At most `count` images of a data set with their labels: evenly spaced, or the first ones of a stream."""
    data = replace(data, transform=lambda image: image)
    if isinstance(data.dataset, IterableDataset):
        yield from itertools.islice(ValStream(data), count)
        return
    samples = ValSamples(data)
    yield from (samples[index] for index in evenly_spaced(range(len(samples)), count))
