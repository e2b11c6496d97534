# The paper's result: 46.4 box AP, 302 GFLOPs at 800 × 1280.
_base_ = "retinanet_sepvit_t_fpn_1x_coco_pvt_setting.py"

model = dict(backbone=_base_.sepvit_small)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
