"""Make mmseg's data sets skip hidden files and folders, and blank lines in image lists.

Importing this module patches mmseg's class in this process.
"""

import os
from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset

from sepvit_lib.pipeline.image_files import is_hidden

_load_data_list = BaseSegDataset.load_data_list


def load_visible(self: Any) -> list[dict[str, Any]]:
    """List the images and labels of a data set as mmseg does, without hidden files and blank lines."""
    folder = self.data_prefix.get("img_path") or ""
    samples = _load_data_list(self)
    names = [os.path.relpath(sample["img_path"], folder) for sample in samples]
    if self.ann_file and not os.path.isdir(self.ann_file):
        return [sample for sample, name in zip(samples, names) if name != self.img_suffix]
    return [sample for sample, name in zip(samples, names) if not any(map(is_hidden, Path(name).parts))]


BaseSegDataset.load_data_list = load_visible  # also affects subclasses
