"""EfficientDet's training step in our engine, against another loop over the same model.

The other loop is plain PyTorch with the same loader, optimizer, clipping, schedule and EMA. If EFFDET names a checkout
of github.com/rwightman/efficientdet-pytorch, it is the `train_epoch` of its train.py, on its own loader, with --full.
"""

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from against import run
from command_line import silent, trial_class_of
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

from shared.data.loading import PrefetchLoader, TrainingBatchSampler

UPSTREAM = os.environ.get("EFFDET")
NAME, TRIAL_CLASS = "upstream" if UPSTREAM else "plain_loop", trial_class_of("efficientdet")
COMMON = {"pretrained": "none", "lr": 0.001, "model_ema_decay": 0.9998, "warmup_epochs": 0, "cooldown_epochs": 0}
SMALL = {
    **COMMON,
    "model": "efficientdet_d0",
    "backbone": "mobilenetv3_small_050",
    "model_config": {"fpn_channels": 64, "fpn_cell_repeats": 2},
    "input_size": 256,
}
FULL = {**COMMON, "model": "tf_efficientdet_d0", "amp": "fp16"}


def plain_loop(trial, amp: str | None) -> Callable[[int], None]:
    """A loop without any framework, over a model like the trial's."""
    hparams, device = trial.hparams, trial.context.device
    model = trial.build_model().to(device).train()
    optimizer = create_optimizer_v2(
        model, opt=hparams.opt, lr=hparams.lr, weight_decay=hparams.weight_decay, momentum=hparams.momentum
    )
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=10, warmup_epochs=0, cooldown_epochs=0)
    ema = ModelEmaV3(model, decay=hparams.model_ema_decay)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
    sampler = TrainingBatchSampler(trial.training_groups(), trial.per_slot_batch_size, seed=0)
    collate = trial.collate(training=True)
    loader = torch.utils.data.DataLoader(
        trial.training_dataset(),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=trial.data.workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(PrefetchLoader(loader, device, trial.prepare))
    steps = itertools.count(1)

    def train(count: int) -> None:
        for batch in itertools.islice(batches, count):
            with torch.autocast("cuda", torch.float16, enabled=amp == "fp16"):
                loss = model(batch.images, batch.targets)["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            dispatch_clip_grad(model.parameters(), value=hparams.clip_grad, mode=hparams.clip_mode)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update(model)
            scheduler.step_update(next(steps))

    return train


class _Limited:
    """`count` batches of an endless loader, with the length that upstream's loop needs."""

    def __init__(self, batches, count: int):
        self.batches, self.count = batches, count

    def __iter__(self):
        return itertools.islice(self.batches, self.count)

    def __len__(self) -> int:
        return self.count


def upstream_loop(trial, checkout: Path, root: Path) -> Callable[[int], None]:
    """Upstream's train.py: its parser, loader and `train_epoch`, with the trial's options."""
    spec = importlib.util.spec_from_file_location("upstream_train", checkout / "train.py")
    train_py = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_py)
    hparams, device = trial.hparams, trial.context.device
    options = (
        f"--model {hparams.model} -b {trial.per_slot_batch_size} -j {trial.data.workers} --pin-mem "
        f"--opt {hparams.opt} --lr {hparams.lr} --log-interval 1000000"
    )
    args = train_py.parser.parse_args([str(root), *options.split()])
    args.prefetcher, args.distributed, args.local_rank, args.rank, args.world_size = True, False, 0, 0, 1
    args.device = str(device)
    model = train_py.create_model(
        args.model, bench_task="train", num_classes=90, pretrained_backbone=False, bench_labeler=False
    )
    model = model.to(device)
    optimizer = train_py.create_optimizer(args, model)
    scaler = train_py.utils.NativeScaler() if hparams.amp == "fp16" else None
    autocast = trial.autocast if hparams.amp else contextlib.nullcontext
    ema = train_py.utils.ModelEmaV2(model, decay=hparams.model_ema_decay)
    scheduler, _ = train_py.create_scheduler(args, optimizer)
    with silent():
        loader, _, _ = train_py.create_datasets_and_loaders(args, model.config)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    tools = {"lr_scheduler": scheduler, "amp_autocast": autocast, "loss_scaler": scaler, "model_ema": ema}
    return lambda count: train_py.train_epoch(0, model, _Limited(batches, count), optimizer, args, **tools)


def loop(trial, folder: Path, workers: int, given: dict) -> Callable[[int], None]:
    torch.backends.cudnn.benchmark = True  # as upstream's train.py
    return upstream_loop(trial, Path(UPSTREAM), folder) if UPSTREAM else plain_loop(trial, given.get("amp"))


if __name__ == "__main__":
    run(sys.modules["__main__"])
