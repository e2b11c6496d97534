# The first base of every config. It makes the backbones available, in mmsegmentation's and mmdetection's own tools too,
# and enables the bases that follow it to be `mmseg::…` and `mmdet::…`.
import importlib
import importlib.util
import os
import sys

# Unless this project is installed. At the end of the path, where it hides no module of a host program.
if importlib.util.find_spec("sepvit_lib") is None:
    sys.path.append(os.path.realpath("{{ fileDirname }}/../../.."))
importlib.import_module("sepvit_lib.dense.backbone")
custom_imports = dict(imports=["sepvit_lib.dense.backbone", "sepvit_lib.dense.loading"], allow_failed_imports=False)

# The variants, with the published code's stochastic depth and weights that main.py saved. A summary of the paper has
# stochastic depths of 0.2, 0.3 and 0.4 for Semantic FPN, and of 0.3, 0.3 and 0.5 for UPerNet.
sepvit_tiny = dict(
    type="SepViT_Tiny", drop_path_rate=0.2, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Tiny.pth")
)
sepvit_small = dict(
    type="SepViT_Small", drop_path_rate=0.3, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Small.pth")
)
sepvit_base = dict(
    type="SepViT_Base", drop_path_rate=0.5, init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Base.pth")
)
# For optim_wrapper.paramwise_cfg, as published: parameters with one of these words in their names are not decayed, that
# is, the backbone's norms and positional encodings. The batch norms of UPerNet's heads are named `bn`, and are decayed.
no_weight_decay = dict(custom_keys={"norm": dict(decay_mult=0.0), "pos_block": dict(decay_mult=0.0)})
