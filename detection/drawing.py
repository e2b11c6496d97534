"""Pictures of detections, for test.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import Hook

from dense.drawing import place_in, read_stored

WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class DrawingHook(Hook):
    """Draw each test image with its true boxes and masks, if it has any, and the detected ones.

    Args:
        folder: where to write one picture per image, with the image's path inside its data set.
        lowest: lowest score to draw.
    """

    def __init__(self, folder: Path, lowest: float) -> None:
        self.folder = folder
        self.lowest = lowest

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the images of a batch."""
        dataset = runner.test_dataloader.dataset
        visualizer = DetLocalVisualizer.get_instance("test")
        visualizer.dataset_meta = dataset.metainfo
        for sample in outputs or ():
            path = self.folder / place_in(dataset, sample.img_path)
            if path.suffix.lower() not in WRITABLE:
                path = path.with_name(f"{path.name}.png")
            visualizer.add_datasample(str(path), read_stored(sample.img_path), sample, pred_score_thr=self.lowest,
                                      out_file=str(path))  # fmt: skip
