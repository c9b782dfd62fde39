"""A RetinaNet small enough to learn a small data set from scratch on a CPU."""

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

model = model_zoo.get_config("common/models/retinanet.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
train = model_zoo.get_config("common/train.py").train
optimizer = model_zoo.get_config("common/optim.py").AdamW

# a ResNet-18 of half the width: a quarter of its time
widths = [32, 64, 128, 256]
model.backbone.bottom_up.stem = L(BasicStem)(in_channels=3, out_channels=widths[0], norm="BN")
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=2,
        stride_per_block=[1 if i == 0 else 2, 1],
        in_channels=widths[max(i - 1, 0)],
        out_channels=width,
        norm="BN",
    )
    for i, width in enumerate(widths)
]
model.backbone.out_channels = 64
model.backbone.top_block.in_channels = widths[-1]
model.head.input_shape = [ShapeSpec(channels=64)] * 5
model.head.conv_dims = [64, 64]
# from 16 pixels of the input: a platelet has 20
model.anchor_generator.sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (16, 32, 64, 128, 256)]

resize = L(T.ResizeShortestEdge)(short_edge_length=240, max_size=320)
dataloader.train.mapper.augmentations = [
    resize,
    L(T.RandomFlip)(horizontal=True),
    L(T.RandomFlip)(horizontal=False, vertical=True),
]
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 4
dataloader.test.mapper.augmentations = [resize]

optimizer.lr = 1.5e-3
optimizer.weight_decay = 0.01
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_factor=0.01,
)
train.max_iter = 1040
train.eval_period = 520
