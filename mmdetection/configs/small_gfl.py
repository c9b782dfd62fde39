# Merged over gfl/gfl_r50_fpn_1x_coco.py: small enough to learn a small data set from scratch on a CPU.
mean_and_std = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", img_scale=(320, 240), keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=0.5),
    dict(type="Normalize", **mean_and_std),
    dict(type="Pad", size_divisor=32),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=(320, 240),
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="Normalize", **mean_and_std),
            dict(type="Pad", size_divisor=32),
            dict(type="DefaultFormatBundle"),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(
    train=dict(pipeline=train_pipeline),
    val=dict(pipeline=test_pipeline, samples_per_gpu=8),
    test=dict(pipeline=test_pipeline),
)
model = dict(
    # a ResNet-18, half as wide as the published one: a quarter of its time
    backbone=dict(depth=18, base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=4),  # half as large as on COCO: images have 320 pixels here
    ),
    test_cfg=dict(score_thr=0.001),  # mAP counts faint detections too, and a short run gives many
)
optimizer = dict(_delete_=True, type="AdamW", lr=1.5e-3, weight_decay=0.01)
optimizer_config = dict(grad_clip=dict(max_norm=10, norm_type=2))
lr_config = dict(
    _delete_=True, policy="CosineAnnealing", by_epoch=False, min_lr_ratio=0.01, warmup="linear", warmup_iters=50
)
custom_hooks = [dict(type="ExpMomentumEMAHook", momentum=0.01, total_iter=200, priority=49)]
