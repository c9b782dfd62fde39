"""Under torchrun: compares each model type's losses and gradients, averaged over ranks, with those of one rank.

    torchrun --nproc-per-node 2 two_ranks.py

Prints a line per model type and batch: its name, and the largest differences of losses and of gradients.
"""

import functools
import os
import sys
from pathlib import Path

import torch
from torch import distributed

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "detr"), str(ROOT / "tests")]

from tiny_detr import DETR_TYPES
from torch.nn.parallel import DistributedDataParallel

from detr_files.denoising import Ranks
from detr_files.model import TrainedDetr, build_detector, model_config
from detr_hyperparameters import DetrHyperparameters

# the zeros of dropout differ between ranks
NO_DROPOUT = {"dropout": 0.0}
PLAIN = {
    "rt_detr_v2": {},
    "rt_detr": {},
    "d_fine": {},
    "deimv2": {},
    "detr": NO_DROPOUT,
    "conditional_detr": NO_DROPOUT,
    "dab-detr": NO_DROPOUT,
    "deformable_detr": NO_DROPOUT,
    "lw_detr": NO_DROPOUT,
    "rf_detr": NO_DROPOUT,
    "rf_detr masks": NO_DROPOUT,
    "yolos": {},
}
# its smallest gradients are sums that cancel, which float32 rounds by 1e-5
IN_DOUBLE = ("deformable_detr",)
# boxes per image, two images per rank
BATCHES = {"uneven": (1, 0, 3, 4), "one-rank": (0, 0, 2, 1), "none": (0, 0, 0, 0), "alike": (3, 0, 3, 2)}
SEED = 11


def batch(counts):
    torch.manual_seed(5)
    images = torch.randn(len(counts), 3, 128, 128)
    labels = []
    for count in counts:
        boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)], dim=1)
        labels.append({"class_labels": torch.randint(0, 3, (count,)), "boxes": boxes})
    return images, labels


def with_masks(labels):
    sizes = [(len(label["boxes"]), 128, 128) for label in labels]
    return [{**label, "masks": torch.rand(size) > 0.5} for label, size in zip(labels, sizes, strict=True)]


def in_double(images, labels):
    return images.double(), [{**label, "boxes": label["boxes"].double()} for label in labels]


def step(model, images, labels, ranks=None):
    torch.manual_seed(SEED if ranks is None else SEED + 1 + ranks.rank)
    losses = model(images, None, labels, ranks)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name.removeprefix("module."): gradient for name, gradient in gradients.items()}


def built(name):
    model_type, *masks = name.split()
    config = {"model_type": model_type, **DETR_TYPES[model_type], **PLAIN[name]}
    hparams = DetrHyperparameters(config=config, masks=bool(masks) or None)
    torch.manual_seed(0)
    detector = build_detector(model_config(hparams), [{"name": name} for name in "abc"])
    with torch.no_grad():
        for parameter in detector.parameters():  # as after some training: new layers all predict the same
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = TrainedDetr(detector).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model.double() if model_type in IN_DOUBLE else model


def difference(gradient, expected, least):
    """The largest difference, divided by the parameter's largest gradient or `least`."""
    return (gradient - expected).abs().max().item() / max(expected.abs().max().item(), least)


def reductions_alone(run):
    """The reductions of a single process. LW-DETR and RF-DETR ask torch.distributed."""
    asked = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        return run()
    finally:
        distributed.is_initialized = asked


def main():
    distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    of_one_rank = torch.manual_seed(SEED).get_state()
    for model_type in PLAIN:
        for name, counts in BATCHES.items():
            images, labels = batch(counts)
            if model_type.endswith("masks"):
                labels = with_masks(labels)
            if model_type in IN_DOUBLE:
                images, labels = in_double(images, labels)
            own = slice(2 * rank, 2 * rank + 2)
            parallel = DistributedDataParallel(built(model_type), find_unused_parameters=True)
            losses, gradients = step(parallel, images[own], labels[own], Ranks(rank, 2, of_one_rank))
            mean = {key: value.detach().clone() for key, value in losses.items()}
            for value in mean.values():
                distributed.all_reduce(value)
                value /= 2
            whole, expected = reductions_alone(functools.partial(step, built(model_type), images, labels))
            assert mean.keys() == whole.keys()
            of_losses = max((abs(mean[key] - whole[key]) / whole[key].abs().clamp(min=1)).item() for key in whole)
            zeros = {key: torch.zeros_like(value) for key, value in {**gradients, **expected}.items()}
            least = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
            of_gradients = max(
                difference(gradients.get(key, zero), expected.get(key, zero), least) for key, zero in zeros.items()
            )
            if rank == 0:
                print(model_type.replace(" ", "-"), name, f"{of_losses:.2e}", f"{of_gradients:.2e}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
