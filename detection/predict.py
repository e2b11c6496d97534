"""Detect objects in single images and draw boxes, masks, class names and scores.

python predict.py CONFIG CHECKPOINT IMAGE … --out DIR [--score-thr SCORE] [--cfg-options KEY=VALUE …]
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from mmdet.apis import inference_detector
from mmdet.visualization import DetLocalVisualizer
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dense.drawing import enlargement
from dense.predict import build_predict_parser, run_prediction
from training.commands import fraction


def draw_detections(model: nn.Module, path: str, image: np.ndarray, least: float) -> tuple[Image.Image, str]:
    """Detect objects in an image; gives the picture of those scored `least` or more, and their numbers in a line."""
    sample = inference_detector(model, path)
    found = sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= least]
    scale = enlargement(len(image))
    found.bboxes *= scale
    if "masks" in found:
        found.masks = found.masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    visualizer = DetLocalVisualizer.get_instance("predict")
    visualizer.dataset_meta = model.dataset_meta
    enlarged = image.repeat(scale, 0).repeat(scale, 1)
    visualizer.add_datasample(path, enlarged, sample, draw_gt=False, pred_score_thr=least)
    counts = Counter(model.dataset_meta["classes"][label] for label in found.labels.tolist())
    line = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
    return Image.fromarray(visualizer.get_image()), line or f"nothing scored {least} or more"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = build_predict_parser(__doc__)
    parser.add_argument("--score-thr", type=fraction, default=0.3, metavar="SCORE", help="least score, default 0.3")
    return run_prediction(parser, draw_detections, arguments)


if __name__ == "__main__":
    sys.exit(main())
