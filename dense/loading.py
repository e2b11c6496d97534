"""Loading of training images that tolerates a few unreadable ones."""

import logging
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from training.storage import with_retries
from training.unreadable import check_unreadable

SLOTS = 1 << 20  # more than any of the data sets has training images


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """Load images as mmcv's `LoadImageFromFile` does, but name and skip unreadable ones.

    In training, mmengine's data sets then choose another image at random. In testing, they raise an error.

    Args:
        max_unreadable: how many images may be unreadable, for all loader workers of a process together.
        **kwargs: arguments of `LoadImageFromFile`.
    """

    def __init__(self, max_unreadable: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_unreadable = max_unreadable
        self.unreadable = torch.zeros(SLOTS, dtype=torch.bool).share_memory_()  # by image, shared by all workers

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load an image into `results`. Returns None if it is unreadable.

        Raises:
            UserError: too many images are unreadable.
        """
        load = super().transform
        try:
            return with_retries(lambda: load(results), Path(results["img_path"]).parent)
        except Exception as error:  # the type depends on the image format and on the damage
            slot, image = results["sample_idx"] % SLOTS, results["img_path"]
            if not self.unreadable[slot]:
                self.unreadable[slot] = True
                check_unreadable(
                    int(self.unreadable.sum()),
                    self.max_unreadable,
                    f"{image} ({error})",
                    "max_unreadable of LoadReadableImage",
                    hint="repair the images, or raise max_unreadable in the config",
                )
                print_log(f"image {image}: cannot be read ({error}); another replaces it", "current", logging.WARNING)
            return None
