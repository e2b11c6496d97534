_base_ = "upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"

model = dict(
    backbone=dict(
        type="SepViT_Small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="pretrained/SepViT_Small.pth"),
    )
)
