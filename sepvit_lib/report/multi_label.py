"""The report on a classifier of images with several labels."""

import json
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_curve

from sepvit_lib.common.label_metrics import label_metrics
from sepvit_lib.inference.classifier import THRESHOLD
from sepvit_lib.report import classification as single
from sepvit_lib.report.html import Page, add_classes
from sepvit_lib.report.subject import Subject

OVER = "all pairs of an image and a class"


def report(subject: Subject, rows: single.Rows) -> Page:
    """Make the report."""
    outputs, page = single.Outputs(rows, subject.val), single.start(subject, len(rows))
    targets, logits, command = outputs.targets, outputs.logits, single.predict_command(subject)
    texts = (
        "mAP and macro F1 are means over the classes; micro F1 pools all labels.",
        f"An image has a label if its probability is at least {THRESHOLD}.",
        "Exact match: the share of images whose labels are all correct.",
    )
    tiles = [("images", str(len(rows)), f"with {targets.sum()} labels of {targets.shape[1]} classes")]
    values = single.add_headline(page, subject, outputs, label_metrics(targets, logits), tiles, *texts)
    add_thresholds(page, outputs, single.class_columns(outputs, subject.train), command)
    pairs = np.stack([np.zeros(logits.size), logits.ravel()], axis=1)  # the softmax of a pair is the sigmoid
    values |= single.add_calibration(page, targets.ravel().astype(int), pairs, f"{command} --temperature", OVER)
    labels, predicted = outputs.texts()
    captions = [f"{found or 'no label'}; labels: {own or 'none'}" for found, own in zip(predicted, labels)]
    confidence = np.abs(targets - outputs.probabilities).max(axis=1)
    columns = dict(labels=labels, prediction=predicted)
    single.add_images(page, subject, outputs, columns, confidence, captions)
    return single.finish(page, subject, values)


def add_thresholds(page: Page, outputs: single.Outputs, columns: dict[str, Any], command: str) -> None:
    """Add the classes, with the thresholds that have the highest F1.

    Args:
        page: the page.
        outputs: the outputs.
        columns: figures of the classes by name.
        command: a command to which the thresholds' flag is appended.
    """
    thresholds, f1 = zip(*map(best_threshold, outputs.targets.T, outputs.probabilities.T))
    columns |= {"threshold": [f"{value:.3f}" for value in thresholds], "F1 with it (%)": 100 * np.array(f1)}
    add_classes(page, columns, "F1 (%)")
    page.text(
        "The thresholds maximise F1 on these images, so expect lower values on others. They are for probabilities "
        "without a temperature. To use them:"
    )
    page.text(f"{command} --threshold thresholds.json", "pre")
    page.files["thresholds.json"] = json.dumps(dict(zip(outputs.classes, thresholds)), ensure_ascii=False).encode()


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
