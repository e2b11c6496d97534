"""Loading of training images, some of which may be broken."""

import logging
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from utils import UserError, patiently

SLOTS = 1 << 20  # more than the training images of the data sets there are


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """Loads images like mmcv's `LoadImageFromFile`; one that cannot be read is named once and left out.

    mmengine's data sets then take another one at random, in training. In testing they refuse.

    Args:
        max_unreadable: images that may be left out, by all loader workers of a process together.
        kwargs: of `LoadImageFromFile`.
    """

    def __init__(self, max_unreadable: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_unreadable = max_unreadable
        self.unreadable = torch.zeros(SLOTS, dtype=torch.bool).share_memory_()  # by all workers; by image

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load an image into `results`; None where it cannot be read.

        Raises:
            UserError: too many cannot.
        """
        load = super().transform
        try:
            return patiently(lambda: load(results), Path(results["img_path"]).parent)
        except Exception as error:  # what broken images raise depends on how they are broken
            slot, message = results["sample_idx"] % SLOTS, f"image {results['img_path']}: cannot be read ({error})"
            if not self.unreadable[slot]:
                self.unreadable[slot] = True
                count = int(self.unreadable.sum())
                if count > self.max_unreadable:
                    raise UserError(f"{message}, the {count}. of them; repair them, or raise max_unreadable of "
                                    "LoadReadableImage in the config") from None  # fmt: skip
                print_log(f"{message}; another one is taken in its place", "current", logging.WARNING)
            return None
