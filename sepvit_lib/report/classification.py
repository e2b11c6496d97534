"""The report on a classifier: how good it is on labelled images."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch.utils.data import IterableDataset

from sepvit_lib.common.errors import UserError, setting, with_flags
from sepvit_lib.common.storage import PAUSES
from sepvit_lib.inference.attention import record_attention, rollout
from sepvit_lib.inference.classifier import class_names
from sepvit_lib.inference.maps import heat_overlay
from sepvit_lib.pipeline.corruptions import corruption_table
from sepvit_lib.pipeline.image_files import as_picture
from sepvit_lib.pipeline.samples import ImageData, read_sample
from sepvit_lib.report import metrics
from sepvit_lib.report.figures import confusion_matrix, unit_curves
from sepvit_lib.report.html import MAX_CLASSES, SHOWN, Cell, Page, add_classes
from sepvit_lib.report.subject import Subject
from sepvit_lib.run.output import LOG, PANELS, draw_corruptions, draw_curves, epoch_entries, read_log

COLUMNS = ("class", "training images", "images", "precision (%)", "recall (%)", "F1 (%)", "average precision (%)")
MAX_COLUMNS = 100  # classes with a column in images.csv
MISTAKES = 12

Rows = Sequence[tuple[np.ndarray, int]]  # logits and label of each image, in the order of the data set


class Outputs:
    """A network's outputs on labelled images.

    Args:
        rows: see `Rows`.
        data: the images.

    Attributes:
        logits: N × C.
        labels: N.
        probabilities: N × C.
        predicted: N.
        names: names of the images.
        groups: group of each image; None if there are none.
        classes: names of the classes.
    """

    def __init__(self, rows: Rows, data: ImageData) -> None:
        logits, labels = zip(*rows)
        self.logits, self.labels = np.array(logits, dtype=np.float64), np.array(labels)
        self.probabilities, self.predicted = softmax(self.logits, axis=1), self.logits.argmax(axis=1)
        self.classes, self.groups = class_names(data.classes, data.num_classes), groups_of(data)
        self.names = names_of(data, len(labels))


def names_of(data: ImageData, count: int) -> list[str]:
    """Names of the first images; "" for those of a stream, whose order is arbitrary."""
    name: Any = getattr(data.dataset, "inner_name", None) or getattr(data.dataset, "name", "".format)
    return [name(index) for index in range(count)]


def groups_of(data: ImageData) -> Sequence[str] | None:
    """Group of each image; None if there are none."""
    groups = getattr(data.dataset, "groups", ())
    return groups if len({*groups}) < len(groups) else None


def report(subject: Subject, rows: Rows) -> Page:
    """Make the report. Sections may be added to it before it is written."""
    outputs, page = Outputs(rows, subject.val), start(subject, len(rows))
    values = _add_accuracy(page, outputs, subject.notes())
    _add_classes(page, outputs, subject.train.label_counts() if subject.train else None)
    if len(outputs.classes) == len({*outputs.labels}) == 2:
        values |= _add_curves(page, outputs)
    values |= add_calibration(page, outputs.labels, outputs.logits, f"{predict_command(subject)} --temperature")
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


def _add_accuracy(page: Page, outputs: Outputs, notes: Sequence[str]) -> dict[str, Any]:
    """Add the headline figures. Returns them."""
    labels, classes = outputs.labels, outputs.classes
    compute, counts = partial(metrics.summary, labels, outputs.predicted, len(classes)), np.bincount(labels)
    baseline = float(counts.max() / len(labels))
    tiles = [("baseline", percent(baseline), f"always predicting {classes[counts.argmax()]}")]
    tiles += [("images", str(len(labels)), f"of {len(classes)} classes")]
    texts = ("Balanced accuracy and macro F1 are means over the classes.",)
    return dict(baseline=baseline) | add_headline(page, compute, len(labels), outputs.groups, tiles, texts, notes)


def add_headline(
    page: Page,
    compute: Callable[[np.ndarray], Mapping[str, float]],
    images: int,
    groups: Sequence[str] | None,
    tiles: Sequence[tuple[str, str, str]],
    texts: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Add headline figures, with intervals, and what a reader must know to judge them. Returns both.

    Args:
        page: the page.
        compute: see `metrics.intervals`.
        images: number of images.
        groups: group of each image, None for none.
        tiles: further figures; see `Page.tiles`.
        texts: explanations.
        notes: warnings.
    """
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


def _add_classes(page: Page, outputs: Outputs, train_counts: Counter[int] | None) -> None:
    """Add the figures of each class, with its number of training images if known, and the confusions."""
    labels, predicted, classes, count = outputs.labels, outputs.predicted, outputs.classes, len(outputs.classes)
    found = metrics.per_class(labels, outputs.probabilities)
    trained = [None if train_counts is None else train_counts[label] for label in range(count)]
    precision, recall, f1, images, area = found.T
    values = (
        classes,
        trained,
        images.astype(int).tolist(),
        *(100 * column for column in (precision, recall, f1, area)),
    )
    add_classes(page, dict(zip(COLUMNS, values)), "F1 (%)")
    wrong = Counter((classes[a], classes[b]) for a, b in zip(labels, predicted) if a != b).most_common()
    lines: list[Sequence[Cell]] = [("label", "prediction", "images"), *((*pair, number) for pair, number in wrong)]
    is_large = count > MAX_CLASSES
    if is_large:
        page.text("Most frequent confusions", "h2")
    else:
        matrix = np.bincount(count * labels + predicted, minlength=count**2).reshape(count, count)
        page.figure("confusion_matrix", partial(confusion_matrix, matrix, classes), "Confusion matrix, in images")
    page.table("confusions", lines, lines[: SHOWN + 1] if is_large else [])


def _add_curves(page: Page, outputs: Outputs) -> dict[str, Any]:
    """Add the ROC and precision-recall curves of two classes. Returns the areas below them."""
    counts = np.bincount(outputs.labels, minlength=2)
    positive, share = int(counts[1] <= counts[0]), counts.min() / counts.sum()
    labels, scores, name = outputs.labels == positive, outputs.probabilities[:, positive], outputs.classes[positive]
    area, precision = float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))
    page.text("ROC and precision-recall curves", "h2")
    page.text(f"The positive class is {name}, the rarer one. Dashed: images in random order.")
    curve = {f"area {area:.3f}": roc_curve(labels, scores)[:2]}
    draw = partial(unit_curves, curve, [(0, 0), (1, 1)], "false positive rate", "true positive rate")
    page.figure("roc", draw, "ROC curve")
    curve = {f"average precision {precision:.3f}": precision_recall_curve(labels, scores)[1::-1]}
    draw = partial(unit_curves, curve, [(0, share), (1, share)], "recall", "precision")
    page.figure("precision_recall", draw, "Precision-recall curve")
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
    draw = partial(unit_curves, curves, [(0, 0), (1, 1)], "confidence (probability of the prediction)", "accuracy")
    page.figure("reliability", draw, "Reliability diagram. Dashed: perfect calibration")
    return values


def _add_images(page: Page, outputs: Outputs, subject: Subject) -> None:
    """Add the most confident mistakes, and the file of all images."""
    classes, probabilities, is_correct = outputs.classes, outputs.probabilities, outputs.labels == outputs.predicted
    names = ([classes[number] for number in numbers] for numbers in (outputs.labels, outputs.predicted))
    columns: dict[str, Sequence[Any]] = dict(zip(("image", "label", "prediction"), (outputs.names, *names)))
    columns |= dict(probability=probabilities.max(axis=1).tolist(), correct=is_correct.astype(int).tolist())
    columns |= {"group": outputs.groups} if outputs.groups else {}
    lines = [*zip(*columns.values(), *(probabilities.T.tolist() if len(classes) <= MAX_COLUMNS else ()))]
    page.table("images", [(*columns, *classes[: len(lines[0]) - len(columns)]), *lines], [])
    wrong = [index for index in np.argsort(-probabilities.max(axis=1), kind="stable").tolist() if not is_correct[index]]
    captions = {n: [f"{lines[n][2]} {percent(lines[n][3])}; label: {lines[n][1]}", lines[n][0]] for n in wrong}
    add_mistakes(page, subject, captions)


def add_mistakes(page: Page, subject: Subject, captions: Mapping[int, Sequence[str]]) -> None:
    """Add pictures of the first mistakes, given the lines below each one; none for a stream, which has no indices."""
    shown = list(captions)[:MISTAKES]
    if shown and not isinstance(subject.val.dataset, IterableDataset):
        page.text("Most confident mistakes", "h2")
        page.text(
            "Left: what the network sees. Right, for SepViT: the attention rollout, averaged over the image. Yellow: "
            "ten times uniform attention or more. Dark blue: a tenth or less."
        )
        page.pictures("mistakes", [(picture(subject, index), captions[index]) for index in shown])


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
