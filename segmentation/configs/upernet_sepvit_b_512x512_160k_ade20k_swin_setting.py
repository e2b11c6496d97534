# The paper's result: 49.6 mIoU (51.0 multi-scale), 1128 GFLOPs at 512 × 2048.
_base_ = "upernet_sepvit_t_512x512_160k_ade20k_swin_setting.py"

model = dict(
    backbone=_base_.sepvit_base,
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))
