"""Metrics of classes, and of images with several labels."""

from collections.abc import Callable

import numpy as np


def class_metrics(images: np.ndarray, predictions: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Compute precision, recall and F1 of each class, 3 × C, 0 to 1. Undefined values are NaN.

    Args:
        images: number of images (or pixels) of each class, C.
        predictions: number of predictions of each class, C.
        hits: number of correct predictions of each class, C.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.stack([hits / predictions, hits / images, 2 * hits / (images + predictions)])


def label_metrics(targets: np.ndarray, logits: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Make the function that computes mean average precision, F1, and the share of images whose labels are all correct.

    Args:
        targets: N × C, whether an image has a label.
        logits: N × C.

    Returns:
        a function of the number of times that each image counts, N. Its values are from 0 to 1.
    """
    order, predicted = np.argsort(-logits, axis=0), logits >= 0
    ranked, keys = (np.take_along_axis(values, order, axis=0) for values in (targets, -logits))
    last = np.stack([np.searchsorted(column, column, side="right") - 1 for column in keys.T], axis=1)  # of equal ones

    def compute(times: np.ndarray) -> dict[str, float]:
        counts = times[order] * ranked  # N × C
        precision = np.take_along_axis(counts.cumsum(axis=0) / times[order].cumsum(axis=0).clip(1e-9), last, axis=0)
        areas = (counts * precision).sum(axis=0) / counts.sum(axis=0).clip(1e-9)
        hits, total = times @ (targets & predicted), times @ targets + times @ predicted
        right, occurs = times @ (targets == predicted).all(axis=1), counts.any(axis=0)
        return {
            "mAP": float(areas[occurs].mean()) if occurs.any() else np.nan,
            "macro F1": float((2 * hits[total > 0] / total[total > 0]).mean()) if total.any() else np.nan,
            "micro F1": float(2 * hits.sum() / max(total.sum(), 1)),
            "exact match": float(right / times.sum()),
        }

    return compute
