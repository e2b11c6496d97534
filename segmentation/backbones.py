"""SepViT's variants as backbones of mmsegmentation: `backbone=dict(type="SepViT_Tiny", …)` in a config.

They are the dense form of sepvit.py with the arguments of `SepViTBackbone`: drop_path_rate, out_indices, with_cp,
frozen_stages, init_cfg or pretrained, and those of `sepvit.SepViTStages`. The configs import this module.
"""

from mmseg.registry import MODELS

from sepvit_lib.mm.backbone import SepViT_Base, SepViT_Lite, SepViT_Small, SepViT_Tiny

for backbone in (SepViT_Lite, SepViT_Tiny, SepViT_Small, SepViT_Base):
    MODELS.register_module(module=backbone)
