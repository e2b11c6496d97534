# The first base of every config: makes the backbones known, also to mmsegmentation's and mmdetection's own tools, and
# the bases that follow as `mmseg::…` and `mmdet::…`.
import importlib
import sys

sys.path.insert(0, "{{ fileDirname }}/../..")
importlib.import_module("dense.backbone")
custom_imports = dict(imports=["dense.backbone", "dense.loading"], allow_failed_imports=False)

# The variants with the paper's stochastic depth, their weights as main.py saves them.
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
# For optim_wrapper.paramwise_cfg: no weight decay on norms and positional encodings.
no_weight_decay = dict(norm_decay_mult=0.0, custom_keys={"pos_block": dict(decay_mult=0.0)})
