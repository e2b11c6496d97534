"""The report on a classifier of images with several labels."""

import json
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_recall_fscore_support

from sepvit_lib.common.label_metrics import label_metrics
from sepvit_lib.inference.classifier import THRESHOLD, class_names
from sepvit_lib.pipeline.data_sets.table import SEPARATOR
from sepvit_lib.report import classification as single
from sepvit_lib.report.html import Page, add_classes
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
    compute, groups = label_metrics(targets, logits), single.groups_of(subject.val)
    values = single.add_headline(page, compute, len(rows), groups, tiles, texts, subject.notes())
    add_labels(page, subject, targets, probabilities)
    pairs = np.stack([np.zeros(logits.size), logits.ravel()], axis=1)  # the softmax of a pair is the sigmoid
    command = single.predict_command(subject)
    values |= single.add_calibration(page, targets.ravel().astype(int), pairs, f"{command} --temperature", OVER)
    add_images(page, subject, targets, probabilities)
    return single.finish(page, subject, values)


def add_labels(page: Page, subject: Subject, targets: np.ndarray, probabilities: np.ndarray) -> None:
    """Add the metrics of each class, and the thresholds with the highest F1."""
    trained, thresholds = subject.train.label_counts() if subject.train else None, dict[str, float]()
    lines: list[tuple[Any, ...]] = []
    for number, name in enumerate(class_names(subject.val.classes, subject.val.num_classes)):
        own, scores = targets[:, number], probabilities[:, number]
        values = precision_recall_fscore_support(own, scores >= THRESHOLD, average="binary", zero_division=np.nan)[:3]
        threshold, f1 = best_threshold(own, scores)
        area = average_precision_score(own, scores) if own.any() else np.nan
        shares = (*values, area)
        row = (name, trained and trained[number], int(own.sum()), *(100 * float(value) for value in shares))
        thresholds[name] = threshold
        lines.append((*row, f"{threshold:.3f}", 100 * f1))
    add_classes(page, dict(zip((*single.COLUMNS, "threshold", "F1 with it (%)"), zip(*lines))), "F1 (%)")
    page.text(
        "The thresholds maximise F1 on these images, so expect lower values on others. They are for probabilities "
        "without a temperature. To use them:"
    )
    page.text(f"{single.predict_command(subject)} --threshold thresholds.json", "pre")
    page.files["thresholds.json"] = json.dumps(thresholds, ensure_ascii=False).encode()


def best_threshold(targets: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Threshold of a class with the highest F1, in the middle between two probabilities; and this F1.

    Args:
        targets: N, whether an image has the label.
        probabilities: N.
    """
    if not targets.any():
        return THRESHOLD, np.nan
    precision, recall, limits = precision_recall_curve(targets, probabilities)
    f1 = 2 * precision * recall / (precision + recall).clip(1e-9)
    best = int(f1[:-1].argmax())
    return float(limits[best] + (limits[best - 1] if best else 0)) / 2, float(f1[best])


def add_images(page: Page, subject: Subject, targets: np.ndarray, probabilities: np.ndarray) -> None:
    """Add the most confident mistakes, and the file of all images."""
    classes, groups = class_names(subject.val.classes, subject.val.num_classes), single.groups_of(subject.val)
    names, masks = single.names_of(subject.val, len(targets)), (targets, probabilities >= THRESHOLD)
    labels, predicted = ([SEPARATOR.join(np.array(classes)[row]) for row in mask] for mask in masks)
    header, columns = ["image", "labels", "prediction"], [names, labels, predicted]
    if groups:
        header, columns = [*header, "group"], [*columns, list(groups)]
    if len(classes) <= single.MAX_COLUMNS:
        header, columns = [*header, *classes], [*columns, *probabilities.T.tolist()]
    page.table("images", [header, *zip(*columns)], [])
    order = np.argsort(-np.abs(targets - probabilities).max(axis=1), kind="stable").tolist()
    wrong = [index for index in order if labels[index] != predicted[index]]
    captions = {n: [f"{predicted[n] or 'no label'}; labels: {labels[n] or 'none'}", names[n]] for n in wrong}
    single.add_mistakes(page, subject, captions)
