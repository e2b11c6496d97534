"""Shared by the drawing code of segmentation and detection: read and enlarge images, and name files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from sepvit_lib.mm.config_lookup import inner_data_sets, orientation_in
from sepvit_lib.mm.image_loading import LoadReadableImage

MIN_HEIGHT, MAX_WIDTH = 256, 4096  # of enlarged images, in pixels


def enlargement(height: int, width: int) -> int:
    """Return the factor by which an image is enlarged for drawing, from its size in pixels.

    Small images are enlarged to keep class names legible.
    """
    return max(1, min(-(-MIN_HEIGHT // height), MAX_WIDTH // width))


def read_pixels(path: str, loader: Any) -> np.ndarray:
    """Read an image of a data set, H × W × 3, RGB, 0 to 255, in the orientation of its labels.

    Args:
        path: the image.
        loader: settings of its data loader.
    """
    orientation = orientation_in(loader)
    loaded = LoadReadableImage(orientation=orientation).transform(dict(img_path=path))
    return loaded["img"][..., ::-1]


def path_inside(dataset: Any, image: str) -> Path:
    """Return an image's path relative to the folder of its data set's images.

    If there are several folders, the path is relative to their common parent, so that images with the same name have
    different paths.

    Args:
        dataset: the data set, which may wrap others.
        image: the image's path.
    """
    path, folders = os.path.abspath(image), [os.path.abspath(folder) for folder in image_folders(dataset)]
    relative = Path(os.path.relpath(path, os.path.commonpath(folders))) if folders else Path("..")
    if ".." in relative.parts:  # annotations may name images outside the data set's folders
        relative = Path(path).relative_to(Path(path).anchor)
    return relative


def image_folders(dataset: Any) -> list[str]:
    """Return the folders of a data set's images. A data set may wrap others."""
    prefixes = getattr(dataset, "data_prefix", None) or {}
    own = [str(folder) for kind in ("img_path", "img") if (folder := prefixes.get(kind))]
    return own + [folder for part in inner_data_sets(dataset) for folder in image_folders(part)]


class FileHook(Hook):
    """Write one file for each test image.

    Args:
        folder: output folder. Each file keeps its image's path relative to the data set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loader: Any = {}

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write the files of a batch."""
        dataset = runner.test_dataloader.dataset
        self.loader = runner.cfg.test_dataloader
        for sample in outputs or ():
            self.write(sample, dataset.metainfo, self.folder / path_inside(dataset, sample.img_path))

    def write(self, sample: Any, metainfo: dict[str, Any], path: Path) -> None:
        """Write the file of an image.

        Args:
            sample: mmengine's data sample, with the prediction.
            metainfo: metadata of the data set, with classes and palette.
            path: the file's path in the output folder, with the image's suffix.
        """
        raise NotImplementedError
