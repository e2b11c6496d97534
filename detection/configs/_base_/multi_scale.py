# Augmentation of the 3x schedules, after loading. A random flip is followed, at random, by (a) a multi-scale resize, or
# (b) a resize at smaller scales, a crop, and the multi-scale resize of (a).
scales = [(side, 1333) for side in range(480, 801, 32)]
multi_scale = [
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=scales, keep_ratio=True)],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                dict(type="RandomChoiceResize", scales=scales, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
