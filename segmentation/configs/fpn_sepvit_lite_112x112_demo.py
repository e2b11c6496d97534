# The demo: training on scenes of digits from tools/make_demo_data.py, from random weights, on a CPU.
_base_ = "fpn_sepvit_t_512x512_80k_ade20k.py"

data_root = "../demo/ade/ADEChallengeData2016"
colours = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c 008080 282828"
metainfo = dict(
    classes=(*"0123456789", "background"), palette=[list(bytes.fromhex(colour)) for colour in colours.split()]
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(160, 128), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(112, 112)),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=scale, keep_ratio=True) for scale in ((128, 102), (160, 128), (192, 154))],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
dataset = dict(type="BaseSegDataset", data_root=data_root, reduce_zero_label=True, metainfo=metainfo)
train_dataloader = dict(batch_size=16, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(size=(112, 112)),
    backbone=dict(_delete_=True, type="SepViT_Lite"),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=11,
        loss_decode=dict(class_weight=[1.0] * 10 + [0.1]),  # nine of ten pixels are background
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=50, by_epoch=False),
    dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=50, end=1200, by_epoch=False),
]
train_cfg = dict(max_iters=1200, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
