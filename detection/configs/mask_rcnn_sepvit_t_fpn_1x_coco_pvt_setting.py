# The paper's result: 45.5 box AP, 41.9 mask AP, 261 GFLOPs at 800 × 1280.
_base_ = ["_base_/mask_rcnn.py", "mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-3))
