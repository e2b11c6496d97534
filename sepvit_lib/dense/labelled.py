"""mmseg's data sets as people keep them: hidden files and folders, and blank lines of a list, name no image.

Importing this module changes mmseg's class for this process.
"""

import os
from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset

from sepvit_lib.training.images import is_hidden

_load_data_list = BaseSegDataset.load_data_list


def load_visible(self: Any) -> list[dict[str, Any]]:
    """List the images of a data set and their labels, as mmseg does, without what is none."""
    folder = self.data_prefix.get("img_path") or ""
    samples = _load_data_list(self)
    names = [os.path.relpath(sample["img_path"], folder) for sample in samples]
    if self.ann_file and not os.path.isdir(self.ann_file):
        return [sample for sample, name in zip(samples, names) if name != self.img_suffix]
    return [sample for sample, name in zip(samples, names) if not any(map(is_hidden, Path(name).parts))]


BaseSegDataset.load_data_list = load_visible  # in the classes derived from it, too
