_base_ = [
    "sepvit.py",
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.sepvit_tiny), neck=dict(in_channels=[96, 192, 384, 768]))
