"""Pictures of detections, for test.py."""

from pathlib import Path
from typing import Any

from mmdet.visualization import DetLocalVisualizer

from sepvit_lib.inference.fonts import use_in_figures
from sepvit_lib.mm.drawing import FileHook, read_pixels

WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class DrawingHook(FileHook):
    """Draw each test image with the detected boxes and masks, and with the ground truth if it has any.

    Args:
        folder: output folder. Each picture keeps its image's path relative to the data set.
        lowest: minimum score of the detections to draw.
    """

    def __init__(self, folder: Path, lowest: float) -> None:
        super().__init__(folder)
        self.lowest = lowest

    def write(self, sample: Any, metainfo: dict[str, Any], path: Path) -> None:
        """Draw a test image and write the picture."""
        visualizer = DetLocalVisualizer.get_instance("test")
        visualizer.dataset_meta = metainfo
        use_in_figures(metainfo["classes"])
        if path.suffix.lower() not in WRITABLE:
            path = path.with_name(f"{path.name}.png")
        image = read_pixels(sample.img_path, self.loader)
        visualizer.add_datasample(str(path), image, sample, pred_score_thr=self.lowest, out_file=str(path))
