# The paper's result: 49.4 box AP, 44.6 mask AP, 321 GFLOPs at 800 × 1280.
_base_ = "mask_rcnn_sepvit_t_fpn_3x_coco_swin_setting.py"

model = dict(backbone=_base_.sepvit_small)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
