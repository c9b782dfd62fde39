"""Images per second and core, from the file to the batch: each library's own loader, and ours with and without
`data.fast_images: true`.

It does what a loader worker does, in this process: samples by index, and their batch, to train and to test. The three
take turns batch by batch, with the same images and seeds. The result is images per CPU second and the ratio
to the library's. Then follows how much the switch changes the pixels, on the scale of 0 to 255.

`mosaic` compares `data.augment` with the loader of Ultralytics instead: mosaic in each sample, scale, color and flip.
"""

import copy
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import main, scratch_folder, silent, trial_class_of
from side_by_side import config_of, local_context
from turns import in_turns, ratio, seconds_of

from coco_files import data_folder, paths_of, yolo_split
from shared.data.dataset import SampleKey, seed_all

UNTRAINED = {
    "efficientdet": {"model": "tf_efficientdet_d0", "pretrained": "none", "labeler": "device"},
    "detectron2": {"config_file": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "weights": ""},
    "mmdetection": {
        "config_file": "retinanet/retinanet_r50_fpn_1x_coco.py",
        "config_overrides": {"model.backbone.init_cfg": None, "model.test_cfg.score_thr": 0.001},
    },
}
"""Hyperparameters of published models, with random weights."""


@dataclass
class Side:
    """A loader: what makes sample i, what makes a batch of samples, and how many samples there are."""

    sample: Callable[[int], Any]
    collate: Callable[[list], Any]
    count: int


# --- the sides --------------------------------------------------------------------------------------


def ours(trial: Any, training: bool) -> Side:
    if training:
        samples = trial.training_dataset()
        return Side(lambda i: samples[SampleKey(0, i)], trial.collate(True), len(samples))
    return side_of(trial.evaluation_dataset(trial.val_data), trial.collate(False))


def side_of(samples: Any, collate: Callable[[list], Any]) -> Side:
    return Side(samples.__getitem__, collate, len(samples))


def efficientdet_s(trial: Any, data: Path, training: bool) -> Side:
    from effdet.data import DetectionDatset
    from effdet.data.loader import DetectionFastCollate
    from effdet.data.parsers import CocoParserCfg
    from effdet.data.transforms import transforms_coco_eval, transforms_coco_train

    annotations, images = split_of(data, training)
    parser = {"cfg": CocoParserCfg(ann_filename=str(annotations), has_labels=True)}
    transforms = transforms_coco_train if training else transforms_coco_eval
    interpolation = trial.hparams.train_interpolation if training else trial.inputs["interpolation"]
    transform = transforms(trial.model_config.image_size, interpolation=interpolation, use_prefetcher=True)
    samples = DetectionDatset(images, parser="coco", parser_kwargs=parser, transform=transform)
    return side_of(samples, DetectionFastCollate(anchor_labeler=None))


def detectron2_s(trial: Any, data: Path, training: bool) -> Side:
    from detectron2.data import DatasetMapper, get_detection_dataset_dicts
    from detectron2.data.common import DatasetFromList, MapDataset
    from detectron2.data.datasets import register_coco_instances

    annotations, images = split_of(data, training)
    name = f"benchmark_{images.name}"
    register_coco_instances(name, {}, str(annotations), images)
    dicts = get_detection_dataset_dicts([name], filter_empty=training)
    mapper = DatasetMapper(trial.detectron2_config.cfg, training)
    return side_of(MapDataset(DatasetFromList(dicts), mapper), list)


def mmdetection_s(trial: Any, data: Path, training: bool) -> Side:
    from mmcv.parallel import collate
    from mmdet.datasets import build_dataset

    config = copy.deepcopy(trial.mmdet_config.data["train" if training else "val"])
    config.classes = [category["name"] for category in trial.categories]
    samples = build_dataset(config, {"test_mode": not training})
    return side_of(samples, lambda batch: collate(batch, samples_per_gpu=len(batch)))


def split_of(data: Path, training: bool) -> tuple[Path, Path]:
    return paths_of(data, "train" if training else "val")


UPSTREAM = {"efficientdet": efficientdet_s, "detectron2": detectron2_s, "mmdetection": mmdetection_s}


# --- measuring --------------------------------------------------------------------------------------


def seconds_a_batch(side: Side, images: list[int]) -> float:
    """CPU seconds."""
    samples, taken = [], 0.0
    for index in images:
        seed_all(0, 0, index)  # the same flip and scale for all; those here seed themselves again
        started = time.process_time()
        samples.append(side.sample(index))
        taken += time.process_time() - started
    return taken + seconds_of(side.collate, samples)


def speeds(sides: dict[str, Side], images: int, turns: int, batch: int) -> dict[str, Any]:
    """Images per CPU second of each side, and the ratios to upstream's. The sides take turns batch by batch."""
    count, batches = min(side.count for side in sides.values()), math.ceil(images / batch)

    def seconds(number: int, side: Side) -> float:
        return seconds_a_batch(side, [(number * batch + i) % count for i in range(batch)])

    taken = in_turns({name: partial(seconds, side=sides[name]) for name in sides}, turns * batches, warm_up=batches)
    measured: dict[str, Any] = {}
    for name, of_batches in taken.items():
        rates = batch / np.reshape(of_batches, (turns, batches)).mean(axis=1)
        measured[name] = {"images_per_second_and_core": round(float(np.median(rates)), 1)}
        if name == "upstream":
            upstream = rates
        else:
            measured[name] |= ratio(rates, upstream, digits=2)
    return measured


def pixels_of(trial: Any, detector: str, side: Side, index: int) -> np.ndarray:
    """The pixels of a sample that the model sees, on the scale of 0 to 255."""
    batch = side.collate([side.sample(index)])
    if detector == "efficientdet":
        return batch.images.numpy().astype(np.float64)
    if detector == "detectron2":
        return batch.images[0].numpy().astype(np.float64)
    batch = trial.prepare(batch, None)
    images = batch.images if isinstance(batch.images, torch.Tensor) else batch.images[0]
    metas = batch.targets["img_metas"]
    while isinstance(metas, list):
        metas = metas[0]
    return images.double().numpy() * metas["img_norm_cfg"]["std"].astype(np.float64).reshape(-1, 1, 1)


def differences(trial: Any, detector: str, exact: Side, fast: Side, images: int) -> dict[str, float]:
    means, largest = [], 0.0
    for index in range(min(images, exact.count)):
        difference = np.abs(pixels_of(trial, detector, fast, index) - pixels_of(trial, detector, exact, index))
        means.append(difference.mean())
        largest = max(largest, float(difference.max()))
    return {"mean": round(float(np.mean(means)), 5), "largest": round(largest, 3)}


def pixels(
    data: Path,
    detector: str = "",
    turns: int = 9,
    images: int = 40,
    compared: int = 80,
    batch_size: int = 4,
) -> dict | None:
    """
    data: a COCO folder: annotations/, train2017/, val2017/
    detector: one only
    turns: ratios
    images: per ratio
    compared: images whose pixels are compared
    """
    if not detector:
        for name in UPSTREAM:  # each has a model_def of its own
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--detector", name], check=True)
        return None
    torch.set_num_threads(1)  # as in a loader's worker
    hyperparameters = {"global_batch_size": batch_size, **UNTRAINED[detector]}
    trials, trial_class = {}, trial_class_of(detector)
    with scratch_folder() as cache, silent():
        for fast in (False, True):
            config = config_of(data.absolute(), hyperparameters, cache_dir=str(cache), fast_images=fast)
            with local_context(config) as context:
                trials[fast] = trial_class(context)
        measured: dict[str, Any] = {"detector": detector}
        for split, training in (("train", True), ("test", False)):
            exact, fast = ours(trials[False], training), ours(trials[True], training)
            sides = {"upstream": UPSTREAM[detector](trials[False], data, training), "here": exact, "fast_images": fast}
            # MMDetection and Detectron2 test one image at a time
            batch = batch_size if training or detector == "efficientdet" else 1
            measured[split] = speeds(sides, images, turns, batch)
            measured[split]["difference_of_255"] = differences(trials[False], detector, exact, fast, compared)
    return measured


# --- mosaic -----------------------------------------------------------------------------------------


def ultralytics_s(folder: Path, names: list[str], input_size: int, batch: int) -> Side:
    import cv2
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    cv2.setNumThreads(1)  # as in a loader's worker
    data = {"names": dict(enumerate(names)), "nc": len(names), "channels": 3}
    images, settings = str(folder / "images/train"), get_cfg()  # mosaic 1, scale 0.5, HSV, flip 0.5
    dataset = YOLODataset(img_path=images, imgsz=input_size, augment=True, hyp=settings, data=data, batch_size=batch)
    return Side(dataset.__getitem__, dataset.collate_fn, len(dataset))


def mosaic(
    data: Path, turns: int = 9, images: int = 64, files: int = 800, input_size: int = 640, batch: int = 16
) -> dict:
    """
    data: a COCO folder: annotations/, train2017/, val2017/
    turns: ratios
    images: per ratio
    files: different names of images, which repeat those of `data`
    input_size: pixels per side
    batch: images per batch
    """
    torch.set_num_threads(1)
    augment = {"mosaic": 1.0, "flip": 0.5, "scale": [0.8, 1.25], "color": 0.5}
    hyperparameters = {"global_batch_size": batch, **UNTRAINED["efficientdet"], "input_size": input_size}
    with scratch_folder() as scratch, silent():
        folder, yolo = scratch / "coco", scratch / "yolo"
        data_folder(data, folder, files)
        categories = yolo_split(*paths_of(folder, "train"), yolo, "train")
        with local_context(config_of(folder, hyperparameters, augment=augment)) as context:
            trial = trial_class_of("efficientdet")(context)
        train = trial.training_dataset()
        keys = [key for keys in itertools.islice(trial.training_batches(), len(train) // batch) for key in keys]
        own = Side(lambda i: train[keys[i]], trial.collate(True), len(keys))
        names = [category["name"] for category in categories]
        sides = {"upstream": ultralytics_s(yolo, names, input_size, batch), "here": own}
        for side in sides.values():  # fills their caches of decoded images
            for index in range(-8 * batch, 0):
                side.sample(index % side.count)
        return speeds(sides, images, turns, batch)


if __name__ == "__main__":
    main(__doc__, pixels, mosaic)
