"""The report on a classifier: how good it is on labelled images."""

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import expit, softmax
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch.utils.data import IterableDataset

from sepvit_lib.common.errors import UserError, setting, with_flags
from sepvit_lib.common.storage import PAUSES
from sepvit_lib.inference.attention import record_attention, rollout
from sepvit_lib.inference.classifier import THRESHOLD, class_names
from sepvit_lib.inference.maps import heat_overlay
from sepvit_lib.pipeline.corruptions import corruption_table
from sepvit_lib.pipeline.data_sets.table import SEPARATOR
from sepvit_lib.pipeline.image_files import as_picture
from sepvit_lib.pipeline.samples import ImageData, read_sample
from sepvit_lib.report import metrics
from sepvit_lib.report.figures import unit_curves
from sepvit_lib.report.html import Page, Tiles, add_classes, add_confusions
from sepvit_lib.report.subject import Subject
from sepvit_lib.run.output import LOG, PANELS, draw_corruptions, draw_curves, epoch_entries, read_log

COLUMNS = ("class", "training images", "images", "precision (%)", "recall (%)", "F1 (%)", "average precision (%)")
MAX_COLUMNS = 100  # classes with a column in images.csv
MISTAKES = 12

DIAGONAL = ((0.0, 0.0), (1.0, 1.0))

Rows = Sequence[tuple[np.ndarray, Any]]  # logits and target of each image, as of `engine.evaluate`


class Outputs:
    """A network's outputs on labelled images.

    Args:
        rows: see `Rows`.
        data: the images.

    Attributes:
        logits: N × C.
        probabilities: N × C.
        targets: whether an image has a label, N × C.
        predicted: whether an image is predicted to have a label, N × C.
        is_correct: whether all labels of an image are predicted correctly, N.
        names: names of the images; "" in a stream, whose order is arbitrary.
        groups: group of each image; None if there are none.
        classes: names of the classes.
    """

    def __init__(self, rows: Rows, data: ImageData) -> None:
        logits, targets = (np.array(column) for column in zip(*rows))
        self.logits, self.classes = logits.astype(np.float64), class_names(data.classes, data.num_classes)
        if targets.ndim == 2:  # several labels
            self.probabilities, self.targets = expit(self.logits), targets.astype(bool)
            self.predicted = self.probabilities >= THRESHOLD
        else:
            self.probabilities, indices = softmax(self.logits, axis=1), np.arange(data.num_classes)
            self.targets, self.predicted = (part[:, None] == indices for part in (targets, logits.argmax(axis=1)))
        self.is_correct = (self.targets == self.predicted).all(axis=1)
        name: Any = getattr(data.dataset, "inner_name", None) or getattr(data.dataset, "name", "".format)
        self.names, groups = [name(index) for index in range(len(rows))], getattr(data.dataset, "groups", ())
        self.groups: Sequence[str] | None = groups if len({*groups}) < len(groups) else None

    def texts(self) -> list[list[str]]:
        """Labels of all images, and their predicted labels."""
        masks = (self.targets, self.predicted)
        return [[SEPARATOR.join(compress(self.classes, row)) for row in mask] for mask in masks]


def report(subject: Subject, rows: Rows) -> Page:
    """Make the report. Sections may be added to it before it is written."""
    outputs, page = Outputs(rows, subject.val), start(subject, len(rows))
    labels, predicted, count = outputs.targets.argmax(axis=1), outputs.predicted.argmax(axis=1), len(outputs.classes)
    compute, counts = partial(metrics.summary, labels, predicted, count), outputs.targets.sum(axis=0)
    baseline = float(counts.max() / len(labels))
    tiles = [("baseline", percent(baseline), f"always predicting {outputs.classes[counts.argmax()]}")]
    tiles += [("images", str(len(labels)), f"of {count} classes")]
    text = "Balanced accuracy and macro F1 are means over the classes."
    values = dict(baseline=baseline) | add_headline(page, subject, outputs, compute, tiles, text)
    add_classes(page, class_columns(outputs, subject.train), "F1 (%)")
    matrix = np.bincount(count * labels + predicted, minlength=count**2).reshape(count, count)
    add_confusions(page, matrix, outputs.classes, "images")
    if count == len({*labels}) == 2:
        values |= _add_curves(page, outputs)
    values |= add_calibration(page, labels, outputs.logits, f"{predict_command(subject)} --temperature")
    _add_images(page, outputs, subject)
    return finish(page, subject, values)


def start(subject: Subject, images: int) -> Page:
    """Start a report."""
    weights = subject.settings["resume"] or "random weights"
    return Page(f"{subject.settings['model']} on {images} images", f"{weights}, {date.today()}")


def predict_command(subject: Subject) -> str:
    """The command that classifies an image."""
    path = shlex.quote(subject.settings["resume"])
    return with_flags(f"python predict.py IMAGE {setting('resume', path)}", subject.flags)


def finish(page: Page, subject: Subject, values: dict[str, Any]) -> Page:
    """Add the curves of the training, data and settings, and all figures as a file."""
    with suppress(UserError):  # not a log
        if entries := epoch_entries(read_log(Path(subject.settings["resume"]).parent / LOG)):
            page.text("Training", "h2")
            for number, panel in enumerate(PANELS.items(), start=1):
                page.figure(f"training_{number}", partial(draw_curves, {"": [entries]}, dict([panel])), "")
    values |= subject.add_facts(page)
    page.files["report.json"] = json.dumps(values, indent=1).encode() + b"\n"
    return page


def add_corruptions(page: Page, top1: Mapping[str, Sequence[float]], clean: float) -> None:
    """Add top-1 (%) by corruption and severity, and without corruption."""
    page.text("Robustness", "h2")
    page.text("Top-1 under the corruptions of ImageNet-C, each at five severities.")
    page.figure("corruptions", partial(draw_corruptions, top1, clean), "Top-1 (%), as means")
    page.table("corruptions", corruption_table(top1, clean))


def add_headline(
    page: Page, subject: Subject, outputs: Outputs, compute: metrics.Compute, tiles: Tiles, *texts: str
) -> dict[str, Any]:
    """Add headline figures, with intervals, and what a reader must know to judge them. Returns both.

    Args:
        page: the page.
        subject: the evaluation.
        outputs: the outputs.
        compute: see `metrics.Compute`.
        tiles: further figures.
        *texts: explanations.
    """
    images, groups, notes = len(outputs.names), outputs.groups, subject.notes()
    values, ranges = compute(np.ones(images)), metrics.intervals(compute, images, groups)
    details = ("95 %: {:.1f} to {:.1f} %".format(*100 * ranges[name]) for name in values)
    page.tiles([*zip(values, map(percent, values.values()), details), *tiles])
    units = "single images" if groups is None else f"whole groups of images ({len({*groups})} groups)"
    interval = f"Ranges are 95 % bootstrap confidence intervals: {metrics.RESAMPLES} resamples of {units}."
    limits = "They reflect only the sampling of images, not how much networks trained with other seeds differ."
    for text in (*texts, interval, limits):
        page.text(text)
    for note in notes:
        page.text(note, "warning")
    intervals = {name: ends.tolist() for name, ends in ranges.items()}
    return dict(images=images, **values, intervals=intervals, bootstrap=units, notes=notes)


def class_columns(outputs: Outputs, train: ImageData | None) -> dict[str, Sequence[Any]]:
    """Figures of the classes, with their numbers of training images if known, by name of the column."""
    counts, images = train.label_counts() if train else None, outputs.targets.sum(axis=0).tolist()
    trained = [None if counts is None else counts[number] for number in range(len(images))]
    shares = metrics.per_class(outputs.targets, outputs.predicted, outputs.probabilities)
    return dict(zip(COLUMNS, (outputs.classes, trained, images, *100 * shares)))


def _add_curves(page: Page, outputs: Outputs) -> dict[str, Any]:
    """Add the ROC and precision-recall curves of two classes. Returns the areas below them."""
    counts = outputs.targets.sum(axis=0)
    positive, share = int(counts[1] <= counts[0]), counts.min() / counts.sum()
    labels, scores, name = outputs.targets[:, positive], outputs.probabilities[:, positive], outputs.classes[positive]
    area, precision = float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))
    page.text("ROC and precision-recall curves", "h2")
    page.text(f"The positive class is {name}, the rarer one. Dashed: images in random order.")
    roc = {f"area {area:.3f}": roc_curve(labels, scores)[:2]}
    page.figure("roc", lambda: unit_curves(roc, DIAGONAL, "false positive rate", "true positive rate"), "ROC curve")
    curve = {f"average precision {precision:.3f}": precision_recall_curve(labels, scores)[1::-1]}
    line = [(0, share), (1, share)]
    page.figure("precision_recall", lambda: unit_curves(curve, line, "recall", "precision"), "Precision-recall curve")
    return dict(positive_class=name, roc_area=area, average_precision=precision)


def add_calibration(
    page: Page, labels: np.ndarray, logits: np.ndarray, command: str, over: str = "all images"
) -> dict[str, Any]:
    """Add the calibration, without and with the best temperature, which `command` sets. Returns the figures.

    Args:
        page: the page.
        labels: N.
        logits: N × C.
        command: a command to which the temperature is appended.
        over: what N counts.
    """
    error, bins = metrics.reliability(labels, softmax(logits, axis=1))
    curves, values = {"as trained": bins[:, :2].T}, dict(calibration_error=error)
    page.text("Calibration", "h2")
    page.text(f"Expected calibration error over {over}, in {metrics.BINS} bins of equal width: {percent(error)}.")
    if temperature := metrics.best_temperature(labels, logits):
        scaled, after = metrics.reliability(labels, softmax(logits / temperature, axis=1))
        curves[f"temperature {temperature:.3f}"] = after[:, :2].T
        values |= dict(temperature=temperature, calibration_error_with_temperature=scaled)
        page.text(f"Temperature {temperature:.3f}, which minimises the log loss, changes it to {percent(scaled)}.")
        page.text("The temperature was chosen on these images, so expect a larger error on others. To apply it:")
        page.text(f"{command} {temperature:.3f}", "pre")
    draw = partial(unit_curves, curves, DIAGONAL, "confidence (probability of the prediction)", "accuracy")
    page.figure("reliability", draw, "Reliability diagram. Dashed: perfect calibration")
    return values


def _add_images(page: Page, outputs: Outputs, subject: Subject) -> None:
    """Add the images, with the probability of each prediction."""
    labels, predicted = outputs.texts()
    top, correct = outputs.probabilities.max(axis=1), outputs.is_correct.astype(int).tolist()
    columns = dict(label=labels, prediction=predicted, probability=top.tolist(), correct=correct)
    captions = [f"{name} {percent(share)}; label: {label}" for name, share, label in zip(predicted, top, labels)]
    add_images(page, subject, outputs, columns, top, captions)


def add_images(
    page: Page, subject: Subject, outputs: Outputs, columns: dict[str, Any], confidence: np.ndarray, captions: list[str]
) -> None:
    """Add the file of all images, and pictures of the most confident mistakes; none in a stream, which has no indices.

    Args:
        page: the page.
        subject: the evaluation.
        outputs: the outputs.
        columns: values of the images by name of the column.
        confidence: confidence of each prediction.
        captions: text below the picture of each image.
    """
    columns = {"image": outputs.names, **columns, **({"group": outputs.groups} if outputs.groups else {})}
    header, values = [*columns], [*columns.values()]
    if len(outputs.classes) <= MAX_COLUMNS:
        header, values = [*header, *outputs.classes], [*values, *outputs.probabilities.T.tolist()]
    page.table("images", [header, *zip(*values)], [])
    shown = [n for n in np.argsort(-confidence, kind="stable").tolist() if not outputs.is_correct[n]][:MISTAKES]
    if shown and not isinstance(subject.val.dataset, IterableDataset):
        page.text("Most confident mistakes", "h2")
        page.text(
            "Left: what the network sees. Right, for SepViT: the attention rollout, averaged over the image. Yellow: "
            "ten times uniform attention or more. Dark blue: a tenth or less."
        )
        page.pictures("mistakes", [(picture(subject, n), [captions[n], outputs.names[n]]) for n in shown])


def picture(subject: Subject, index: int) -> Image.Image:
    """Draw the part of an image that the network sees, and beside it, for a SepViT, what it attends to.

    This is the attention rollout, averaged over the image, as the network averages its features.
    """
    data, network = subject.val, subject.network
    source = read_sample(data.dataset, index, PAUSES, data.decode)[0]
    image = np.asarray(as_picture(subject.preprocessing.crop(source)))
    try:
        through = rollout(record_attention(network, data.transform(source)[None].to(next(network.parameters()).device)))
    except (ValueError, RuntimeError):  # not a SepViT, compiled, without attention among windows, too little memory
        return Image.fromarray(image)
    relative = through.weights[0].mean(dim=0).reshape(through.grid) * len(through.weights[0])
    return Image.fromarray(np.hstack([image, heat_overlay(image, relative.cpu().numpy(), through.stride)]))


def percent(share: Any) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.1f} %"
