# The first base of every config. It registers the backbones of segmentation/backbones.py.
_base_ = "../../../sepvit_lib/mm/configs/sepvit.py"

custom_imports = dict(imports=["segmentation.backbones", "sepvit_lib.mm.image_loading"])
