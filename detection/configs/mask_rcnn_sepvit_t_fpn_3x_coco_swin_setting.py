# The paper's result: 48.0 box AP, 43.8 mask AP, 261 GFLOPs at 800 × 1280.
_base_ = [
    "../../sepvit_lib/mm/configs/sepvit.py",
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "_base_/multi_scale.py",
    "_base_/schedule_3x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.sepvit_tiny), neck=dict(in_channels=[96, 192, 384, 768]))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            *_base_.multi_scale,
            dict(type="PackDetInputs"),
        ]
    )
)
# Half precision in training and evaluation. The loss scale is static, since it is a number and not a dict.
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, paramwise_cfg=_base_.no_weight_decay)
val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
