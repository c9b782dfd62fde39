"""A validation between the data and the metrics: `masks` or `batches`.

masks: CPU milliseconds an image for the RLE of 100 masks, by `encode_masks`, by hotcoco of each whole mask and by
pycocotools; what Detectron2 takes to paste them is beside it. The sides take turns; median of the turns.
batches: images a CPU second of a library's Mask R-CNN R50-FPN or RetinaNet R50-FPN, not trained, on images of one size,
one image a batch and several, which take turns; and how far their scores are from each other. On a GPU by the clock.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

HYPERPARAMETERS = {
    "detectron2": {"config_file": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "weights": ""},
    "mmdetection": {
        "config_file": "retinanet/retinanet_r50_fpn_1x_coco.py",
        "config_overrides": {"model.backbone.init_cfg": None, "model.test_cfg.score_thr": 0.001},
    },
}


def seconds() -> float:
    """The CPU's, or the clock's where a GPU computes."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(sides: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each side in each turn; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns + 1):
        for name, run in sides.items():
            started = seconds()
            run()
            taken[name].append(seconds() - started)
    return {name: of_turns[1:] for name, of_turns in taken.items()}


# --- masks ------------------------------------------------------------------------------------------


def masks(arguments: argparse.Namespace) -> dict:
    import hotcoco
    from detectron2.layers.mask_ops import paste_masks_in_image
    from pycocotools import mask as coco_mask

    from shared.evaluation.detections import encode_masks

    generator, measured = torch.Generator().manual_seed(0), {}
    for height, width in ((480, 640), (800, 1333)):
        size = torch.tensor([width, height])
        # sides of 3 to 50 % of the image's, some partly outside of it
        sides = torch.exp(torch.empty(100, 2).uniform_(np.log(0.03), np.log(0.5), generator=generator)) * size
        centers = torch.rand(100, 2, generator=generator) * size
        boxes = torch.cat([(centers - sides / 2).clamp(min=0), torch.minimum(centers + sides / 2, size)], dim=1)
        blobs = torch.rand(100, 1, 7, 7, generator=generator)
        blobs = torch.nn.functional.interpolate(blobs, size=(28, 28), mode="bilinear")[:, 0]
        pasted = paste_masks_in_image(blobs, boxes, (height, width)).numpy()

        def by_pycocotools(pasted: np.ndarray = pasted) -> list[dict]:
            return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in pasted]

        assert encode_masks(pasted) == by_pycocotools()
        taken = in_turns(
            {
                "paste": lambda b=blobs, at=boxes, s=(height, width): paste_masks_in_image(b, at, s),
                "ours": lambda p=pasted: encode_masks(p),
                "hotcoco, whole": lambda p=pasted: [hotcoco.mask.encode(mask) for mask in p],
                "pycocotools": by_pycocotools,
            },
            arguments.turns,
        )
        measured[f"{width}x{height}, ms"] = {name: round(1000 * statistics.median(t), 1) for name, t in taken.items()}
    return measured


# --- batches ----------------------------------------------------------------------------------------


def batches(arguments: argparse.Namespace) -> dict:
    from local_context import device_name, local_context

    from shared.data import synthetic

    detector = arguments.detector
    sys.path.insert(0, str(ROOT / detector))
    import model_def

    trial_class = {"detectron2": "Detectron2Trial", "mmdetection": "MMDetectionTrial"}[detector]
    folder = Path(tempfile.mkdtemp())
    synthetic.write(folder, train=1, val=arguments.batch_size, size=arguments.pixels)
    config = {
        "data": {
            **{
                s: {"annotations": str(folder / f"annotations/{s}.json"), "images": str(folder / s)}
                for s in ("train", "val")
            },
            "workers": 0,
            "fast_images": True,
        },
        "hyperparameters": {"global_batch_size": arguments.batch_size, **HYPERPARAMETERS[detector]},
        "searcher": {"max_length": {"batches": 1}, "metric": "bbox_mAP", "smaller_is_better": False},
    }
    with local_context(config) as context:
        trial = getattr(model_def, trial_class)(context, for_training=False)
        type(trial).batches_evaluations = True  # on a CPU too
        data, found = trial.open_val(), {}

        def detect_on(size: int) -> Callable[[], None]:
            trial.per_slot_batch_size = size
            loaded = list(trial.evaluation_loader(data))
            assert {len(batch) for batch in loaded} == {size}

            def run() -> None:
                found[size] = {d.image_id: d for batch in loaded for d in trial.detect_on_host_batch(batch)}

            return run

        sides = {size: detect_on(size) for size in (1, arguments.batch_size)}
        taken = in_turns(sides, arguments.turns)
    one, several = taken.values()
    ratios = [a / b for a, b in zip(one, several, strict=True)]
    alone, together = found.values()
    same = [i for i in alone if np.array_equal(alone[i].labels, together[i].labels)]
    return {
        "device": device_name(context.device),
        "images_a_second": {size: round(len(alone) / statistics.median(t), 2) for size, t in taken.items()},
        "times_as_many": round(statistics.median(ratios), 3),
        "least_and_greatest": [round(min(ratios), 3), round(max(ratios), 3)],
        "detections": sum(map(len, alone.values())),
        "images_with_the_same_labels": f"{len(same)} of {len(alone)}",
        "largest_difference_of_a_score": max(
            (float(abs(alone[i].scores - together[i].scores).max(initial=0)) for i in same), default=None
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("masks", "batches"))
    parser.add_argument("--detector", choices=tuple(HYPERPARAMETERS), default="mmdetection")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=320, help="a side of the images before the test's resize")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps({"masks": masks, "batches": batches}[arguments.what](arguments), indent=1))


if __name__ == "__main__":
    main()
