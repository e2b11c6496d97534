"""Last of the modules that the server of processes.py imports: work that each of its commands would do again."""

import gc
from contextlib import suppress
from functools import cache

from mmengine.config import utils
from mmengine.utils import get_installed_path

utils.load = cache(utils.load)  # as sepvit_lib/mm/mmengine_private.py does
for distribution in ("onedl-mmsegmentation", "onedl-mmdetection"):
    with suppress(ValueError):  # no such config; all of the library's metafiles are read, which takes a second
        utils._get_cfg_metainfo(get_installed_path(distribution), "")
gc.freeze()  # mmengine collects garbage for each data set, among half a million objects of the libraries
