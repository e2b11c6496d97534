_base_ = "mask_rcnn_sepvit_t_fpn_3x_coco_swin_setting.py"

model = dict(backbone=_base_.sepvit_small)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
