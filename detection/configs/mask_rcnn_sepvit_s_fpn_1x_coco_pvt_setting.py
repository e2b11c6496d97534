# The paper's result: 47.2 box AP, 42.9 mask AP, 321 GFLOPs at 800 × 1280.
_base_ = "mask_rcnn_sepvit_t_fpn_1x_coco_pvt_setting.py"

model = dict(backbone=_base_.sepvit_small)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
