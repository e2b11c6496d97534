# The paper's result: 47.6 mIoU, 367 GFLOPs at 512 × 2048.
_base_ = "fpn_sepvit_t_512x512_80k_ade20k.py"

model = dict(backbone=_base_.sepvit_base, neck=dict(in_channels=[128, 256, 512, 1024]))
