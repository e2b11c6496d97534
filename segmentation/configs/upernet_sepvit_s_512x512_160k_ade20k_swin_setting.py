# The paper's result: 48.6 mIoU (49.9 multi-scale), 1003 GFLOPs at 512 × 2048.
_base_ = "upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"

model = dict(backbone=_base_.sepvit_small)
