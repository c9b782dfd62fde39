"""MMDetection's models over the operations in PyTorch, against the same over compiled mmcv-full.

`make test-compiled` makes the environment for it, `.venv-compiled/bin/python`. A training step is the model's loss, its
derivatives and the optimizer's step. The detections of one batch follow. Blocks of both sides alternate in one process,
on images of noise with 8 boxes and masks each.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from command_line import ROOT, main
from side_by_side import in_turns, trial_class_of
from tabulate import tabulate

trial_class_of("mmdetection")  # before mmcv.ops

# isort: split
from mmdet.core import BitmapMasks

from mmdetection_files import operations
from mmdetection_files.config import load_mmdet_config
from mmdetection_files.model import build_model, build_optimizer, without_pretrained_backbone
from mmdetection_hyperparameters import MMDetectionHyperparameters

CONFIGS = {
    "Mask R-CNN": "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py",
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "Faster R-CNN, DCNv2": "dcnv2/faster_rcnn_r50_fpn_mdconv_c3-c5_1x_coco.py",
}


def compare(
    pairs: int = 9,
    block: int = 2,
    images: int = 2,
    height: int = 320,
    width: int = 416,
    only: list[str] = [*CONFIGS],  # noqa: B006
) -> None:
    """
    pairs: of blocks
    block: steps per block
    images: per batch
    only: models; default all
    """
    if not operations.are_compiled():
        sys.exit("error: mmcv has no compiled operations. Fix: run `make test-compiled`, and use .venv-compiled")
    rows = []
    for name in only:
        for what, run in steps(CONFIGS[name], images, (height, width)).items():
            rows.append([name, what, *ratios_of(run, pairs, block)])
            print(*rows[-1], file=sys.stderr, flush=True)
    headers = ["model", "what", "PyTorch's, of the compiled one's time", "smallest to largest", "ms compiled"]
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers=headers, tablefmt="github"))


def steps(config_file: str, images: int, size: tuple[int, int]) -> dict[str, Callable[[], None]]:
    """A training step and a batch's detection of a model with the weights that it starts from."""
    torch.manual_seed(0)
    config = load_mmdet_config(MMDetectionHyperparameters(global_batch_size=images, config_file=config_file), ROOT)
    without_pretrained_backbone(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, initialize=True).to(device)
    optimizer = build_optimizer(model, config)
    batch = noise(images, size, device)
    if not getattr(model, "with_mask", False):
        del batch["gt_masks"]

    def train() -> None:
        model.train()
        losses = model(return_loss=True, **batch)
        total = sum(
            sum(value) if isinstance(value, list) else value for name, value in losses.items() if "loss" in name
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    def detect() -> None:
        model.eval()
        with torch.no_grad():
            model(return_loss=False, rescale=True, img=[batch["img"]], img_metas=[batch["img_metas"]])

    return {"training step": train, "detection": detect}


def noise(images: int, size: tuple[int, int], device: torch.device) -> dict:
    generator = np.random.default_rng(0)
    height, width = size
    metas, boxes, labels, masks = [], [], [], []
    for _ in range(images):
        corner = generator.uniform(0, [width * 0.6, height * 0.6], (8, 2))
        box = np.concatenate([corner, corner + generator.uniform(16, [width * 0.4, height * 0.4], (8, 2))], 1)
        mask = np.zeros((8, height, width), np.uint8)
        for place, (x1, y1, x2, y2) in zip(mask, box.astype(int), strict=True):
            place[y1:y2, x1:x2] = 1
        shape = (height, width, 3)
        meta = {"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "scale_factor": np.ones(4, np.float32)}
        metas.append({**meta, "flip": False, "filename": "noise", "batch_input_shape": size})
        boxes.append(torch.from_numpy(box).float().to(device))
        labels.append(torch.from_numpy(generator.integers(0, 80, 8)).to(device))
        masks.append(BitmapMasks(mask, height, width))
    image = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    return {"img": image, "img_metas": metas, "gt_bboxes": boxes, "gt_labels": labels, "gt_masks": masks}


def ratios_of(run: Callable[[], None], pairs: int, block: int) -> tuple[str, str, str]:
    """The seconds over PyTorch's operations divided by those over the compiled ones."""

    def over(in_pytorch: bool) -> None:
        with operations_in_use(in_pytorch):
            for _ in range(block):
                run()

    taken = in_turns({in_pytorch: lambda given=in_pytorch: over(given) for in_pytorch in (True, False)}, pairs)
    ratios = [ours / compiled for ours, compiled in zip(taken[True], taken[False], strict=True)]
    return (
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{1000 * statistics.median(taken[False]) / block:.0f}",
    )


@contextmanager
def operations_in_use(in_pytorch: bool) -> Iterator[None]:
    """mmcv.ops over the operations in PyTorch, or over the compiled ones."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mmcv.ops.")]
    kept = {module: module.ext_module for module in modules if hasattr(module, "ext_module")}
    for module in kept if in_pytorch else ():
        module.ext_module = operations.InPyTorch()
    try:
        yield
    finally:
        for module, compiled in kept.items():
            module.ext_module = compiled


if __name__ == "__main__":
    main(__doc__, compare)
