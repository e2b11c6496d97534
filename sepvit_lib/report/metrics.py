"""Figures that describe how good a classifier is, from its logits on labelled images. Pure functions of arrays.

Shapes use N for images and C for classes.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score

from sepvit_lib.common.label_metrics import class_metrics

RESAMPLES, SEED = 1000, 0  # of the bootstrap
TAILS = (2.5, 97.5)  # percentiles at the ends of an interval
BINS = 15  # of the confidence
TEMPERATURES = (0.05, 20.0)  # that are tried

# Function that computes metrics, 0 to 1, from the number of times that each image counts, N.
Compute = Callable[[np.ndarray], Mapping[str, float]]


def summary(labels: np.ndarray, predicted: np.ndarray, num_classes: int, times: np.ndarray) -> dict[str, float]:
    """Compute accuracy, balanced accuracy (the mean of the classes' recalls) and macro F1, 0 to 1.

    Each image has one label. Classes that do not occur are not counted, as in `engine.evaluate`.

    Args:
        labels: N.
        predicted: the predicted classes, N.
        num_classes: C.
        times: number of times that each image counts, N.
    """
    images, predictions = (np.bincount(index, times, num_classes) for index in (labels, predicted))
    hits = np.bincount(labels, times * (labels == predicted), num_classes)
    _, recall, f1 = class_metrics(images, predictions, hits)
    values = hits.sum() / images.sum(), np.nanmean(recall), np.nanmean(f1)
    return dict(zip(("accuracy", "balanced accuracy", "macro F1"), map(float, values)))


def intervals(compute: Compute, count: int, groups: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Compute 95 % bootstrap confidence intervals, low and high: of resampled images or groups.

    Args:
        compute: see `Compute`.
        count: N.
        groups: group of each image; None to resample single images.
    """
    members = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    size, random = int(members.max()) + 1, np.random.default_rng(SEED)
    draws = (np.bincount(random.integers(size, size=size), minlength=size) for _ in range(RESAMPLES))
    samples = [compute(times[members]) for times in draws]
    return {name: np.nanpercentile([sample[name] for sample in samples], TAILS) for name in samples[0]}


def per_class(targets: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Compute precision, recall, F1 and average precision of each class, 4 × C, 0 to 1.

    Undefined values are NaN: recall and average precision of a class without images, precision of one never predicted.

    Args:
        targets: whether an image has a label, N × C.
        predicted: whether an image is predicted to have a label, N × C.
        scores: scores or probabilities, N × C.
    """
    counts = (mask.sum(axis=0) for mask in (targets, predicted, targets & predicted))
    pairs = zip(targets.T, scores.T)
    areas = [average_precision_score(own, column) if own.any() else np.nan for own, column in pairs]
    return np.vstack([class_metrics(*counts), areas])


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the expected calibration error, in bins of equal width.

    The confidence of a prediction is the probability of the predicted class.

    Args:
        labels: N.
        probabilities: N × C.

    Returns:
        the error, 0 to 1; and the mean confidence, the accuracy and the number of images of each bin with images,
        bins × 3.
    """
    top, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    index = np.minimum((top * BINS).astype(int), BINS - 1)
    parts = [index == number for number in np.unique(index)]
    bins = np.array([(top[part].mean(), correct[part].mean(), part.sum()) for part in parts])
    return float(np.abs(bins[:, 0] - bins[:, 1]) @ bins[:, 2] / len(labels)), bins


def best_temperature(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Find the temperature that minimises the log loss of softmax(logits / temperature).

    Args:
        labels: N.
        logits: N × C.

    Returns:
        the temperature; None if the log loss is lowest at an end of `TEMPERATURES`, for example if all predictions are
        correct.
    """

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return float(np.exp(found.x)) if low + 0.01 < found.x < high - 0.01 else None
