"""Detect objects in single images and draw boxes, masks, class names and scores.

python predict.py CONFIG CHECKPOINT IMAGE … --out DIR [--overwrite] [--score-thr SCORE] [--cfg-options KEY=VALUE …]

IMAGE is an image, a folder of images, or a pattern such as "photos/*.jpg". Images are turned upright,
unless the model was trained with EXIF orientations ignored. The exit status is 1 if an image cannot be read or resized.
"""

if not __package__:
    import _repository  # noqa: F401
import sys
from collections import Counter
from typing import Any

import numpy as np
from mmdet.visualization import DetLocalVisualizer
from PIL import Image

from sepvit_lib.common.command_line import fraction
from sepvit_lib.inference.fonts import use_in_figures
from sepvit_lib.mm.commands.predict import build_predict_parser, infer, run_prediction
from sepvit_lib.mm.drawing import enlargement


def detect(model: Any, image: np.ndarray, lowest: float) -> Any:
    """Detect objects in an image.

    Args:
        model: the detector, from `sepvit_lib.mm.commands.predict.build_inference_model`.
        image: H × W × 3, RGB, 0 to 255.
        lowest: minimum score of an object.

    Returns:
        mmdet's data sample, with the objects in `pred_instances`.
    """
    from mmdet.apis import inference_detector  # prints noise unless its parts are imported first

    sample = infer(inference_detector, model, image)
    sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= lowest]
    return sample


def draw_sample(model: Any, path: str, image: np.ndarray, sample: Any) -> Image.Image:
    """Draw the objects of a data sample, which is modified in place.

    Args:
        model: see `detect`.
        path: path of the image; the file is not opened.
        image: see `detect`.
        sample: the result of `detect`.
    """
    found = sample.pred_instances
    scale = enlargement(*image.shape[:2])
    found.bboxes *= scale
    if "masks" in found:
        found.masks = found.masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    visualizer = DetLocalVisualizer.get_instance("predict")
    visualizer.dataset_meta = model.dataset_meta
    use_in_figures(model.dataset_meta["classes"])
    enlarged = image.repeat(scale, 0).repeat(scale, 1)
    visualizer.add_datasample(path, enlarged, sample, draw_gt=False, pred_score_thr=0)
    return Image.fromarray(visualizer.get_image())


def draw_detections(model: Any, path: str, image: np.ndarray, lowest: float) -> tuple[Image.Image, str]:
    """Detect objects in an image, and draw them.

    Args:
        model: see `detect`.
        path: path of the image; the file is not opened.
        image: see `detect`.
        lowest: minimum score of an object.

    Returns:
        the picture, and a line of text with the number of objects of each class.
    """
    sample = detect(model, image, lowest)
    counts = Counter(model.dataset_meta["classes"][label] for label in sample.pred_instances.labels.tolist())
    line = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
    return draw_sample(model, path, image, sample), line or f"no detection with a score of {lowest} or more"


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = build_predict_parser(__doc__)
    parser.add_argument(
        "--score-thr", type=fraction, default=0.3, metavar="SCORE", help="lowest score to draw, default 0.3"
    )
    return run_prediction(parser, draw_detections, arguments)


if __name__ == "__main__":
    sys.exit(main())
