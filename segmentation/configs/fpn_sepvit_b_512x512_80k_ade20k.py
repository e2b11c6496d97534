_base_ = "fpn_sepvit_t_512x512_80k_ade20k.py"

model = dict(
    backbone=dict(
        type="SepViT_Base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="pretrained/SepViT_Base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
