"""Pictures of detections, for test.py."""

from pathlib import Path
from typing import Any

from mmdet.visualization import DetLocalVisualizer

from sepvit_lib.dense.drawing import FileHook, read_pixels
from sepvit_lib.inference.fonts import use_in_figures

WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class DrawingHook(FileHook):
    """Draw each test image with its true boxes and masks, if it has any, and the detected ones.

    Args:
        folder: where to write one picture per image, with the image's path inside its data set.
        lowest: lowest score to draw.
    """

    def __init__(self, folder: Path, lowest: float) -> None:
        super().__init__(folder)
        self.lowest = lowest

    def write(self, sample: Any, metainfo: dict[str, Any], path: Path) -> None:
        """Draw an image."""
        visualizer = DetLocalVisualizer.get_instance("test")
        visualizer.dataset_meta = metainfo
        use_in_figures(metainfo["classes"])
        if path.suffix.lower() not in WRITABLE:
            path = path.with_name(f"{path.name}.png")
        image = read_pixels(sample.img_path, self.loader)
        visualizer.add_datasample(str(path), image, sample, pred_score_thr=self.lowest, out_file=str(path))
