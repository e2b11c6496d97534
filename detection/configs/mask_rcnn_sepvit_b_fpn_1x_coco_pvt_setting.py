# The training settings of SepViT-S, with the backbone of SepViT-B. The published code has no Base detectors.
_base_ = "mask_rcnn_sepvit_t_fpn_1x_coco_pvt_setting.py"

model = dict(backbone=_base_.sepvit_base, neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
