# The paper's result: 46.8 box AP, 243 GFLOPs at 800 × 1280.
_base_ = ["_base_/retinanet.py", "_base_/multi_scale.py", "_base_/schedule_3x.py"]

annotations = dict(type="LoadAnnotations", with_bbox=True)
train_dataloader = dict(dataset=dict(pipeline=[dict(type="LoadImageFromFile"), annotations, *_base_.multi_scale]))
optim_wrapper = dict(paramwise_cfg=_base_.no_weight_decay)
