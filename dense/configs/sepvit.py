# The first base of every config: makes the backbones known, also to mmsegmentation's and mmdetection's own tools, and
# the bases that follow as `mmseg::…` and `mmdet::…`.
import importlib
import sys

sys.path.insert(0, "{{ fileDirname }}/../..")
importlib.import_module("dense.backbone")
custom_imports = dict(imports=["dense.backbone"], allow_failed_imports=False)
