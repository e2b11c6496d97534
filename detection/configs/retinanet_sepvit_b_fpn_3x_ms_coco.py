# The training settings of SepViT-S, with the backbone of SepViT-B. The published code has no Base detectors.
_base_ = "retinanet_sepvit_t_fpn_3x_ms_coco.py"

model = dict(backbone=_base_.sepvit_base, neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
