# The paper's result: 44.8 box AP, 243 GFLOPs at 800 × 1280.
_base_ = ["_base_/retinanet.py", "mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-3))
