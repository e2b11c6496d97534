_base_ = "mmseg::_base_/datasets/ade20k.py"

train_dataloader = dict(batch_size=2)

# Multi-scale evaluation at 0.5 to 1.75 times the test scale of 2048 × 512, as for the published results. mmseg's base
# config multiplies the size of each image instead.
tta_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=scale, keep_ratio=True)
                for scale in ((1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896))
            ],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
