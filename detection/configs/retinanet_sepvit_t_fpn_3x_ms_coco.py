# The paper's result: 46.8 box AP, 243 GFLOPs at 800 × 1280.
_base_ = [
    "../../sepvit_lib/mm/configs/sepvit.py",
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "_base_/multi_scale.py",
    "_base_/schedule_3x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.sepvit_tiny), neck=dict(in_channels=[96, 192, 384, 768]))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            *_base_.multi_scale,
            dict(type="PackDetInputs"),
        ]
    )
)
optim_wrapper = dict(paramwise_cfg=_base_.no_weight_decay)
