"""The report of a detector, for test.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from pycocotools.cocoeval import COCOeval

from detection.drawing import DrawingHook
from sepvit_lib.mm.report import ReportHook
from sepvit_lib.report.figures import unit_curves
from sepvit_lib.report.html import Page, add_classes

SCORE = 0.3  # minimum score of the detections that are counted and drawn
MAX_CURVES = 10  # classes with a curve each
IOUS = {0: 0.5, 5: 0.75}  # of the precision-recall curves, by index of the threshold
KINDS = dict(bbox="box", segm="mask")
SUMMARY = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "IoU 0.50", "AP75": "IoU 0.75"}  # COCOeval's first figures
SUMMARY |= {"AP small": "below 32² pixels", "AP medium": "32² to 96² pixels", "AP large": "above 96² pixels"}
COUNTS = ("objects", "detections", "false negatives", "false positives")


class DetectionReportHook(ReportHook):
    """Write the report of a detector, from the evaluations of pycocotools that mmdet's `CocoMetric` makes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, DrawingHook(folder, SCORE))
        self.evaluations: list[COCOeval] = []
        self.source: Any = None  # the module of `CocoMetric`

    def before_test(self, runner: Any) -> None:
        """Keep the evaluations, which `CocoMetric` discards."""
        from mmdet.evaluation.metrics import coco_metric  # prints a warning, which `test.py --help` should not

        self.source = coco_metric
        self.source.COCOeval = self._evaluation

    def _evaluation(self, *args: Any) -> COCOeval:
        self.evaluations.append(COCOeval(*args))
        return self.evaluations[-1]

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the report in the main process, which evaluates."""
        self.source.COCOeval = COCOeval
        if self.evaluations:
            self.write(runner, metrics or {})
        elif is_main_process():
            (self.folder / "report.html").unlink(missing_ok=True)  # of an earlier checkpoint
            runner.logger.warning("no report was written: mmdet evaluates nothing if there are no detections")

    def add_results(self, page: Page, runner: Any, metrics: dict[str, float]) -> None:
        """Add the results."""
        first, data = self.evaluations[0], runner.test_dataloader.dataset
        counts, tiles, curves = matches(first), [], {}
        columns = {"class": [first.cocoGt.cats[number]["name"] for number in first.params.catIds]}
        columns |= dict(zip(COUNTS, counts.sum(axis=1).T.tolist()))
        for evaluation in self.evaluations:
            kind, precision = KINDS[evaluation.params.iouType], evaluation.eval["precision"][..., 0, -1]
            curves[kind] = np.where(precision < 0, np.nan, precision)  # IoU thresholds × recalls × classes
            for (name, detail), value in zip(SUMMARY.items(), evaluation.stats):
                tiles.append((f"{kind} {name}", f"{100 * value:.1f} %" if value >= 0 else "–", detail))
            columns[f"{kind} AP (%)"] = (100 * curves[kind].mean(axis=(0, 1))).tolist()
            columns[f"{kind} AP50 (%)"] = (100 * curves[kind][0].mean(axis=0)).tolist()
        page.tiles(tiles)
        add_classes(page, columns, next(name for name in columns if "AP" in name))
        kind = KINDS[first.params.iouType]
        page.text(f"Counts: detections with a score ≥ {SCORE}, matched at {kind} IoU ≥ 0.5. AP uses all detections.")
        page.text("Precision-recall curves", "h2")
        for kind, precision in curves.items():
            add_curves(page, kind, first.params.recThrs, precision, columns["class"])
        order = np.searchsorted(first.params.imgIds, [data.get_data_info(n)["img_id"] for n in range(len(data))])
        images = counts.sum(axis=0)[order]
        note = "The most false negatives and false positives. Left: objects. Right: detections, with scores in percent."
        self.add_images(page, runner, dict(zip(COUNTS, images.T.tolist())), images[:, 2:].sum(axis=1), note)


def matches(evaluation: COCOeval) -> np.ndarray:
    """Count objects, detections, false negatives and false positives of each class and image, classes × images × 4.

    The score is at least `SCORE`, the IoU at least 0.5. Crowds, and detections that match them, are not counted.
    """
    settings = evaluation.params
    counts = np.zeros((len(settings.catIds), len(settings.imgIds), len(COUNTS)), dtype=int)
    images = np.array(evaluation.evalImgs, dtype=object).reshape(len(counts), len(settings.areaRng), -1)
    for index, found in np.ndenumerate(images[:, 0]):  # the first of the ranges of areas has all objects
        if found is not None:
            counted = ~found["dtIgnore"][0] & (np.array(found["dtScores"]) >= SCORE)
            objects, detections = int(np.sum(found["gtIgnore"] == 0)), int(counted.sum())
            hits = int((counted & (found["dtMatches"][0] > 0)).sum())
            counts[index] = objects, detections, objects - hits, detections - hits
    return counts


def add_curves(page: Page, kind: str, recall: np.ndarray, precision: np.ndarray, classes: Sequence[str]) -> None:
    """Add precision-recall curves: the means over the classes with objects, and for few classes, those of each class.

    Args:
        page: the page.
        kind: 'box' or 'mask'.
        recall: R.
        precision: IoU thresholds × R × C, NaN for classes without objects.
        classes: C names.
    """
    present = [number for number in range(len(classes)) if not np.isnan(precision[0, 0, number])]
    means = {f"IoU {iou}": (recall, precision[index][:, present].mean(axis=1)) for index, iou in IOUS.items()}
    charts = {"mean": (means, "IoU 0.5 and 0.75, mean over the classes with objects")}
    if len(classes) <= MAX_CURVES:
        own = {classes[number]: (recall, precision[0, :, number]) for number in present}
        charts["classes"] = (own, "IoU 0.5, each class")
    for name, (lines, caption) in charts.items():
        draw = partial(unit_curves, lines, [(0, 0)], "recall", "precision")
        page.figure(f"precision_recall_{kind}_{name}", draw, f"{kind} {caption}")
