# The paper's result: 47.4 mIoU (48.3 multi-scale), 940 GFLOPs at 512 × 2048.
_base_ = [
    "_base_/sepvit.py",
    "mmseg::_base_/models/upernet_swin.py",
    "_base_/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, **_base_.sepvit_tiny),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=_base_.no_weight_decay,
)
# The warm-up and the polynomial decay both start at iteration 0, and their factors are multiplied. mmengine's schedules
# reach their last value one iteration before `end`; the published schedules reach it at iterations 1500 and 160000.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1501, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=160001, by_epoch=False),
]
