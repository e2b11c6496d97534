"""The report on a classifier of images with several labels."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_recall_fscore_support

from sepvit_lib.inference.classifier import THRESHOLD, class_names
from sepvit_lib.pipeline.data_sets.table import SEPARATOR
from sepvit_lib.report import classification as single
from sepvit_lib.report.html import Page
from sepvit_lib.report.subject import Subject

OVER = "all pairs of an image and a class"


def report(subject: Subject, rows: single.Rows) -> Page:
    """Make the report."""
    logits, targets = (np.array(column) for column in zip(*rows))
    targets, probabilities, page = targets.astype(bool), expit(logits), single.start(subject, len(rows))
    texts = (
        "mAP and macro F1 are means over the classes; micro F1 pools all labels.",
        f"An image has a label if its probability is at least {THRESHOLD}.",
        "Exact match: the share of images whose labels are all correct.",
    )
    tiles = [("images", str(len(rows)), f"with {targets.sum()} labels of {targets.shape[1]} classes")]
    compute, groups = summary(targets, probabilities), single.groups_of(subject.val)
    values = single.add_headline(page, compute, len(rows), groups, tiles, texts, subject.notes())
    add_classes(page, subject, targets, probabilities)
    pairs = np.stack([np.zeros(logits.size), logits.ravel()], axis=1)  # the softmax of a pair is the sigmoid
    command = single.predict_command(subject)
    values |= single.add_calibration(page, targets.ravel().astype(int), pairs, f"{command} --temperature", OVER)
    add_images(page, subject, targets, probabilities)
    return single.finish(page, subject, values)


def summary(targets: np.ndarray, probabilities: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Make the function that computes mean average precision, F1, and the share of images whose labels are all correct.

    Args:
        targets: N × C, whether an image has a label.
        probabilities: N × C.

    Returns:
        a function of the number of times that each image counts, N. Its values are from 0 to 1.
    """
    order, predicted = np.argsort(-probabilities, axis=0), probabilities >= THRESHOLD
    ranked, keys = (np.take_along_axis(values, order, axis=0) for values in (targets, -probabilities))
    last = np.stack([np.searchsorted(column, column, side="right") - 1 for column in keys.T], axis=1)  # of equal ones

    def compute(times: np.ndarray) -> dict[str, float]:
        counts = times[order] * ranked  # N × C
        precision = np.take_along_axis(counts.cumsum(axis=0) / times[order].cumsum(axis=0).clip(1e-9), last, axis=0)
        areas = (counts * precision).sum(axis=0) / counts.sum(axis=0).clip(1e-9)
        hits, total = times @ (targets & predicted), times @ targets + times @ predicted
        right = times @ (targets == predicted).all(axis=1)
        return {
            "mAP": float(areas[counts.any(axis=0)].mean()),
            "macro F1": float((2 * hits[total > 0] / total[total > 0]).mean()),
            "micro F1": float(2 * hits.sum() / max(total.sum(), 1)),
            "exact match": float(right / times.sum()),
        }

    return compute


def add_classes(page: Page, subject: Subject, targets: np.ndarray, probabilities: np.ndarray) -> None:
    """Add the figures of each class, and the thresholds with the highest F1."""
    names = class_names(subject.val.classes, subject.val.num_classes)
    found = precision_recall_fscore_support(targets, probabilities >= THRESHOLD, zero_division=np.nan)
    header = ("class", "training images", "images", "precision (%)", "recall (%)", "F1 (%)", "average precision (%)")
    trained, thresholds = subject.train.label_counts() if subject.train else None, dict[str, float]()
    lines: list[tuple[Any, ...]] = [(*header, "threshold", "F1 with it (%)")]
    for number, (name, own, scores, *values, images) in enumerate(zip(names, targets.T, probabilities.T, *found)):
        precision, recall, limits = precision_recall_curve(own, scores) if images else (*np.zeros((2, 2)), [THRESHOLD])
        f1 = 2 * precision * recall / (precision + recall).clip(1e-9)
        thresholds[name] = float(limits[f1[:-1].argmax()])
        area = 100 * average_precision_score(own, scores) if images else None
        row = (name, trained and trained[number], int(images), *(100 * value for value in values), area)
        lines.append((*row, f"{thresholds[name]:.3f}", 100 * f1[:-1].max()))
    page.text("Classes", "h2")
    page.table("classes", lines)
    page.text(
        "The thresholds maximise F1 on these images, so expect lower values on others. They are for probabilities "
        "without a temperature. To use them:"
    )
    page.text(f"{single.predict_command(subject)} --threshold thresholds.json", "pre")
    page.files["thresholds.json"] = json.dumps(thresholds, ensure_ascii=False).encode()


def add_images(page: Page, subject: Subject, targets: np.ndarray, probabilities: np.ndarray) -> None:
    """Add the most confident mistakes, and the file of all images."""
    classes = class_names(subject.val.classes, subject.val.num_classes)
    names, masks = single.names_of(subject.val, len(targets)), (targets, probabilities >= THRESHOLD)
    labels, predicted = ([SEPARATOR.join(np.array(classes)[row]) for row in mask] for mask in masks)
    lines = zip(names, labels, predicted, *probabilities.T.tolist())
    page.table("images", [("image", "labels", "prediction", *classes), *lines], [])
    order = np.argsort(-np.abs(targets - probabilities).max(axis=1), kind="stable").tolist()
    wrong = [index for index in order if labels[index] != predicted[index]]
    captions = {n: [f"{predicted[n] or 'no label'}; labels: {labels[n] or 'none'}", names[n]] for n in wrong}
    single.add_mistakes(page, subject, captions)
