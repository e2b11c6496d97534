# The paper's result: 45.5 box AP, 41.9 mask AP, 261 GFLOPs at 800 × 1280.
_base_ = [
    "../../sepvit_lib/mm/configs/sepvit.py",
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(backbone=dict(_delete_=True, **_base_.sepvit_tiny), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-3))
