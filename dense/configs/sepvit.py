# The first base of every config: makes the backbones known, also to mmsegmentation's and mmdetection's own tools, and
# the bases that follow as `mmseg::…` and `mmdet::…`.
import importlib
import os
import sys

# At the end, where it hides no library of a host program's: this folder's datasets.py has the name of Hugging Face's.
sys.path += {os.path.realpath("{{ fileDirname }}/../..")}.difference(sys.path)
importlib.import_module("dense.backbone")
custom_imports = dict(imports=["dense.backbone", "dense.loading"], allow_failed_imports=False)

# The variants with the published code's stochastic depth, their weights as main.py saves them. A summary of the paper
# has 0.2, 0.3 and 0.4 for Semantic FPN, and 0.3, 0.3 and 0.5 for UPerNet.
sepvit_tiny = dict(
    type="SepViT_Tiny",
    drop_path_rate=0.2,
    init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Tiny.pth"),
)
sepvit_small = dict(
    type="SepViT_Small",
    drop_path_rate=0.3,
    init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Small.pth"),
)
sepvit_base = dict(
    type="SepViT_Base",
    drop_path_rate=0.5,
    init_cfg=dict(type="Pretrained", checkpoint="pretrained/SepViT_Base.pth"),
)
# For optim_wrapper.paramwise_cfg, as published: no weight decay on what has one of these words in its name. These are
# the backbone's norms and positional encodings; the batch norms of UPerNet's heads are named `bn`, and are decayed.
no_weight_decay = dict(custom_keys={"norm": dict(decay_mult=0.0), "pos_block": dict(decay_mult=0.0)})
