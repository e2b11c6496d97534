"""The report of a segmentor, for test.py."""

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import collect_results

from segmentation.drawing import DrawingHook, labels_in
from sepvit_lib.common.label_metrics import class_metrics
from sepvit_lib.mm.drawing import MIN_HEIGHT
from sepvit_lib.mm.report import ReportHook
from sepvit_lib.report.html import Page, add_classes, add_confusions

TILES = dict(mIoU="mean IoU", aAcc="pixel accuracy", mAcc="mean class accuracy")
COLUMNS = ("class", "pixels (%)", "IoU (%)", "accuracy = recall (%)", "precision (%)", "Dice = F1 (%)")


class SegmentationReportHook(ReportHook):
    """Write the report of a segmentor, which mmseg's `IoUMetric` evaluates."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, DrawingHook(folder, MIN_HEIGHT))
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
        classes = runner.test_dataloader.dataset.metainfo["classes"]
        total, images = np.zeros((len(classes), len(classes)), dtype=np.int64), []
        for pairs, pixels in self.images:
            matrix = np.zeros_like(total)
            matrix.flat[pairs] = pixels
            total += matrix
            present = matrix.any(axis=1)
            iou, accuracy = measures(matrix)[0][present], matrix.trace() / max(matrix.sum(), 1)
            images.append((iou.mean(), accuracy) if present.any() else (np.nan, np.nan))
        shares = total.sum(axis=1) / total.sum()
        details = dict(aAcc=f"{100 * shares.max():.2f} % if all were {classes[shares.argmax()]}")
        printed = {name.rpartition("/")[2]: value for name, value in metrics.items()}  # without the metric's prefix
        tiles = [(title, f"{printed[name]:.2f} %", details.get(name, "")) for name, title in TILES.items()]
        page.tiles([*tiles, ("images", str(len(images)), f"of {len(classes)} classes")])
        columns = (classes, *100 * np.vstack([shares, measures(total)]))
        add_classes(page, dict(zip(COLUMNS, columns)), "IoU (%)")
        add_confusions(page, total, classes, "pixels")
        lines = [("", *classes), *((name, *row) for name, row in zip(classes, total.tolist()))]
        page.table("confusion_matrix", lines, [])
        means, accuracies = 100 * np.array(images).T
        figures = {"mean IoU (%)": means.tolist(), "pixel accuracy (%)": accuracies.tolist()}
        note = "Lowest mean IoU over the classes in the ground truth. Legend: shares of the predicted pixels."
        self.add_images(page, runner, figures, 100 - means, note)


def measures(matrix: np.ndarray) -> np.ndarray:
    """Compute IoU, recall, precision and Dice of each class, 4 × C, 0 to 1, from a confusion matrix.

    Args:
        matrix: numbers of pixels, C × C. Rows are labels.
    """
    precision, recall, dice = class_metrics(matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal())
    return np.stack([dice / (2 - dice), recall, precision, dice])
