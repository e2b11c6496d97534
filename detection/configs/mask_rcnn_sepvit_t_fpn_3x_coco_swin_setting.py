# The paper's result: 48.0 box AP, 43.8 mask AP, 261 GFLOPs at 800 × 1280.
_base_ = ["_base_/mask_rcnn.py", "_base_/multi_scale.py", "_base_/schedule_3x.py"]

annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
train_dataloader = dict(dataset=dict(pipeline=[dict(type="LoadImageFromFile"), annotations, *_base_.multi_scale]))
# Half precision in training and evaluation. The loss scale is static, because it is a float instead of
# "dynamic" or a dict.
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, paramwise_cfg=_base_.no_weight_decay)
val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
