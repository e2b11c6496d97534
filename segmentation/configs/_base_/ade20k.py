_base_ = "mmseg::_base_/datasets/ade20k.py"

train_dataloader = dict(batch_size=2)

# Multi-scale evaluation. As in the published results, the ratios refer to the single scale, 2048 × 512. In mmseg's own
# base they refer to each image's size.
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
