# Shared by the configs of segmentation and detection. It imports the backbones. After this import, a config can inherit
# from `mmseg::…` and `mmdet::…`, so `_base_` must list this file before their configs.
import importlib
import os
import sys

# Makes the repository importable, also for mmsegmentation's and mmdetection's own tools. It comes last in the path,
# so that it shadows no other module.
sys.path += {os.path.realpath("{{ fileDirname }}/../../..")} - {*sys.path}
importlib.import_module("sepvit_lib.mm.backbone")
custom_imports = dict(imports=["sepvit_lib.mm.backbone", "sepvit_lib.mm.image_loading"], allow_failed_imports=False)

# The variants, with the published code's drop-path rates, and with pretrained weights from main.py. A summary of the
# paper states rates of 0.2, 0.3 and 0.4 for Semantic FPN, and of 0.3, 0.3 and 0.5 for UPerNet.
sepvit_tiny = dict(
    type="SepViT_Tiny", drop_path_rate=0.2, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Tiny.pth")
)
sepvit_small = dict(
    type="SepViT_Small", drop_path_rate=0.3, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Small.pth")
)
sepvit_base = dict(
    type="SepViT_Base", drop_path_rate=0.5, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Base.pth")
)
# For optim_wrapper.paramwise_cfg, as published: no weight decay for parameters with these words in their names, i.e.
# the backbone's norms and positional encodings. UPerNet's batch norms are named `bn`, so they are decayed.
no_weight_decay = dict(custom_keys={"norm": dict(decay_mult=0.0), "pos_block": dict(decay_mult=0.0)})
