# The paper's result: 47.9 box AP, 302 GFLOPs at 800 × 1280.
_base_ = "retinanet_sepvit_t_fpn_3x_ms_coco.py"

model = dict(backbone=_base_.sepvit_small)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
