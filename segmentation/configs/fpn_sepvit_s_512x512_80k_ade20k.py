# The paper's result: 46.6 mIoU, 244 GFLOPs at 512 × 2048.
_base_ = "fpn_sepvit_t_512x512_80k_ade20k.py"

model = dict(backbone=_base_.sepvit_small)
