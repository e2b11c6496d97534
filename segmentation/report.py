"""The report of a segmentor, for test.py."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import collect_results

from segmentation.drawing import DrawingHook, labels_in
from sepvit_lib.mm.drawing import MIN_HEIGHT
from sepvit_lib.mm.report import ReportHook
from sepvit_lib.report.html import Page, add_classes, add_confusions

TILES = dict(mIoU="mean IoU", aAcc="pixel accuracy", mAcc="mean class accuracy")
COLUMNS = {"IoU (%)": "IoU", "accuracy = recall (%)": "Acc", "precision (%)": "Precision", "Dice = F1 (%)": "Dice"}


class SegmentationReportHook(ReportHook):
    """Write the report of a segmentor, which mmseg's `IoUMetric` evaluates."""

    def __init__(self) -> None:
        super().__init__(DrawingHook(Path(), MIN_HEIGHT))
        # Of each image: the pairs of label and prediction that occur, as label · C + prediction, and their pixels.
        self.images: list[tuple[np.ndarray, np.ndarray]] = []

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count the pairs of label and prediction in the images of a batch."""
        count = len(runner.test_dataloader.dataset.metainfo["classes"])
        for sample in outputs or ():
            label, prediction = labels_in(sample.gt_sem_seg), labels_in(sample.pred_sem_seg)
            counted = (label != runner.test_evaluator.metrics[0].ignore_index) & (label < count)
            pixels = np.bincount((count * label + prediction)[counted], minlength=count**2)
            self.images.append((pixels.nonzero()[0], pixels[pixels > 0]))

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Collect the counts of all processes, and write the report."""
        folder = str(Path(runner.log_dir) / "collected_for_report")
        images = collect_results(self.images, len(runner.test_dataloader.dataset), "cpu", folder)
        if images is not None:  # the main process
            self.images = images
            self.write(runner, metrics or {})

    def add_results(self, page: Page, runner: Any, metrics: dict[str, float]) -> None:
        """Add the results."""
        classes, metric = runner.test_dataloader.dataset.metainfo["classes"], runner.test_evaluator.metrics[0]
        total, images = np.zeros((len(classes), len(classes)), dtype=np.int64), []
        for pairs, pixels in self.images:
            matrix = np.zeros_like(total)
            matrix.flat[pairs] = pixels
            total += matrix
            found, present = measures(matrix, metric, "mIoU"), matrix.any(axis=1)
            images.append((float(found["IoU"][present].mean()) if present.any() else np.nan, float(found["aAcc"])))
        shares, found = total.sum(axis=1) / total.sum(), measures(total, metric, "mIoU", "mDice", "mFscore")
        details = dict(aAcc=f"{100 * shares.max():.2f} % if all were {classes[shares.argmax()]}")
        printed = {name.rpartition("/")[2]: value for name, value in metrics.items()}  # without the metric's prefix
        tiles = [(title, f"{printed[name]:.2f} %", details.get(name, "")) for name, title in TILES.items()]
        page.tiles([*tiles, ("images", str(len(images)), f"of {len(classes)} classes")])
        columns = {title: (100 * found[name]).tolist() for title, name in COLUMNS.items()}
        add_classes(page, {"class": classes, "pixels (%)": (100 * shares).tolist(), **columns}, "IoU (%)")
        add_confusions(page, total, classes, "pixels")
        lines = [("", *classes), *((name, *row) for name, row in zip(classes, total.tolist()))]
        page.table("confusion_matrix", lines, [])
        means, accuracies = 100 * np.array(images).T
        worst = [index for index in np.argsort(means, kind="stable").tolist() if means[index] < 100]
        columns = {"mean IoU (%)": means.tolist(), "pixel accuracy (%)": accuracies.tolist()}
        note = "Lowest mean IoU over the classes in the ground truth. Legend: shares of the predicted pixels."
        self.add_images(page, runner, columns, worst, note)


def measures(matrix: np.ndarray, metric: Any, *names: str) -> dict[str, np.ndarray]:
    """Compute measures with mmseg's metric, 0 to 1, from a confusion matrix, C × C. Rows are labels."""
    parts = (matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))
    hits, labels, predictions = (torch.from_numpy(part.astype(float)) for part in parts)
    areas = (hits, labels + predictions - hits, predictions, labels)
    found: dict[str, np.ndarray] = metric.total_area_to_metrics(*areas, list(names), metric.nan_to_num, metric.beta)
    return found
