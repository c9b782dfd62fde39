"""EfficientDet's training step, in a Determined trial as users run it, against another loop over the same model.

Without `--upstream`: a plain PyTorch loop with the same loader, optimizer, clipping, schedule and EMA. With `--upstream
DIR`, a checkout of github.com/rwightman/efficientdet-pytorch: the `train_epoch` of its train.py, on its own loader.
Blocks of batches of the two sides alternate in one process; reported is the ratio of each pair of blocks.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "efficientdet")]

from interleaved import switch, time_against
from local_context import local_context
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

from coco_files import data_folder
from model_def import EfficientDetTrial
from shared.data.loading import PrefetchLoader

SMALL = {
    "model": "efficientdet_d0",
    "backbone": "mobilenetv3_small_050",
    "model_config": {"fpn_channels": 64, "fpn_cell_repeats": 2},
    "input_size": 256,
}
FULL = {"model": "tf_efficientdet_d0", "amp": "fp16"}


def experiment(arguments, folder: Path, annotations: dict[str, Path], batches: int) -> dict:
    return {
        "data": {
            **{s: {"annotations": str(p), "images": str(folder / f"{s}2017")} for s, p in annotations.items()},
            "cache_dir": str(folder / "cache"),
            "workers": arguments.workers,
        },
        "hyperparameters": {
            "global_batch_size": arguments.batch_size,
            "pretrained": "none",
            "lr": 0.001,
            "model_ema_decay": 0.9998,
            "warmup_epochs": 0,
            "cooldown_epochs": 0,
            **(FULL if arguments.full else SMALL),
            **dict(arguments.set),
        },
        "searcher": {"max_length": {"batches": batches}, "metric": "bbox_mAP", "smaller_is_better": False},
        "scheduling_unit": 100,
        "checkpoint_policy": "none",
    }


def plain_loop(trial: EfficientDetTrial, amp: str | None):
    """A loop without any framework, over a model like the trial's, but for its switches. Returns a function that trains
    `count` batches."""
    trial = copy.copy(trial)
    trial.hparams = replace(trial.hparams, amp=amp, channels_last=False, torch_compile=False)
    model = trial.build_model().to(trial.context.device).train()
    hparams, device = trial.hparams, trial.context.device
    optimizer = create_optimizer_v2(
        model, opt=hparams.opt, lr=hparams.lr, weight_decay=hparams.weight_decay, momentum=hparams.momentum
    )
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=10, warmup_epochs=0, cooldown_epochs=0)
    ema = ModelEmaV3(model, decay=hparams.model_ema_decay)
    scaler = torch.amp.GradScaler("cuda", enabled=hparams.amp == "fp16")
    loader = trial.training_batch_loader(0)
    batches = iter(PrefetchLoader(loader, device, lambda batch, number: trial.prepare(batch, number)))
    steps = itertools.count(1)

    def train(count: int) -> None:
        for batch in itertools.islice(batches, count):
            with trial.autocast():
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
    """`count` batches of an endless loader, with the length that upstream's loop asks for."""

    def __init__(self, batches, count: int):
        self.batches, self.count = batches, count

    def __iter__(self):
        return itertools.islice(self.batches, self.count)

    def __len__(self) -> int:
        return self.count


def upstream_loop(trial: EfficientDetTrial, checkout: Path, root: Path):
    """Upstream's train.py: its parser, loader and `train_epoch`, with the options that our trial has."""
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
    config = model.config
    optimizer = train_py.create_optimizer(args, model)
    scaler = train_py.utils.NativeScaler() if hparams.amp == "fp16" else None
    autocast = trial.autocast if hparams.amp else contextlib.nullcontext
    ema = train_py.utils.ModelEmaV2(model, decay=hparams.model_ema_decay)
    scheduler, _ = train_py.create_scheduler(args, optimizer)
    with contextlib.redirect_stdout(io.StringIO()):
        loader, _, _ = train_py.create_datasets_and_loaders(args, config)

    def endless():
        while True:
            yield from loader

    batches = endless()

    def train(count: int) -> None:
        train_py.train_epoch(
            0,
            model,
            _Limited(batches, count),
            optimizer,
            args,
            lr_scheduler=scheduler,
            amp_autocast=autocast,
            loss_scaler=scaler,
            model_ema=ema,
        )

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--set", type=switch, nargs="+", default=[], metavar="KEY=VALUE", help="of our side, such as amp=bf16"
    )
    parser.add_argument("--full", action="store_true", help="EfficientDet-D0 at 512 pixels with fp16, for a GPU")
    parser.add_argument("--upstream", type=Path, help="a checkout of upstream; with --full")
    parser.add_argument("--coco", type=Path, help="a COCO folder (annotations/, train2017/, val2017/) to read from")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--block", type=int, default=10, help="batches a block")
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    logging.getLogger("determined").setLevel(logging.ERROR)
    torch.backends.cudnn.benchmark = True  # as upstream's train.py
    batches = arguments.block * (arguments.blocks + 3)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "coco"
        annotations = data_folder(arguments.coco, arguments.images, folder)
        config = experiment(arguments, folder, annotations, batches)
        with local_context(config) as context:
            trial = EfficientDetTrial(context)
            other = (
                upstream_loop(trial, arguments.upstream, folder)
                if arguments.upstream
                else plain_loop(trial, FULL["amp"] if arguments.full else None)
            )
            against = "upstream" if arguments.upstream else "plain_loop"
            measured = time_against(trial, context, other, arguments.blocks, arguments.block, against, 10**8)
    print(json.dumps({**dict(arguments.set), **measured}, indent=1))


if __name__ == "__main__":
    main()
