"""Segment single images and draw the results with a legend.

python predict.py CONFIG CHECKPOINT IMAGE … --out DIR [--overwrite] [--cfg-options KEY=VALUE …]

IMAGE is an image, a folder of images, or a pattern such as "photos/*.jpg". Images are turned upright,
unless the model was trained with EXIF orientations ignored. The exit status is 1 if an image cannot be read or resized.
"""

if not __package__:
    import _repository  # noqa: F401
import sys
from typing import Any

import numpy as np
from PIL import Image

from segmentation.drawing import draw, labels_in, shares
from sepvit_lib.mm.commands.predict import build_predict_parser, infer, run_prediction


def segment(model: Any, image: np.ndarray) -> Any:
    """Segment an image.

    Args:
        model: the segmentor, from `sepvit_lib.mm.commands.predict.build_inference_model`.
        image: H × W × 3, RGB, 0 to 255.

    Returns:
        mmseg's data sample, with the labels in `pred_sem_seg`.
    """
    from mmseg.apis import inference_model  # prints noise unless its parts are imported first

    return infer(inference_model, model, image)


def draw_prediction(model: Any, path: str, image: np.ndarray) -> tuple[Image.Image, str]:
    """Segment an image, and draw the result.

    Args:
        model: see `segment`.
        path: unused.
        image: H × W × 3, RGB, 0 to 255.

    Returns:
        the picture, and a line of text with the largest classes.
    """
    classes, palette = model.dataset_meta["classes"], model.dataset_meta["palette"]
    labels = labels_in(segment(model, image).pred_sem_seg)
    share = shares(labels, len(classes))
    largest = [f"{classes[index]} {100 * share[index]:.1f} %" for index in np.argsort(-share)[:5] if share[index] > 0]
    return draw(image, {"prediction": labels}, classes, palette), ", ".join(largest)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    return run_prediction(build_predict_parser(__doc__), draw_prediction, arguments)


if __name__ == "__main__":
    sys.exit(main())
