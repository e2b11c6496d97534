_base_ = "mask_rcnn_sepvit_t_fpn_3x_coco_swin_setting.py"

model = dict(
    backbone=dict(
        type="SepViT_Small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="pretrained/SepViT_Small.pth"),
    )
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
