"""Images per second and core, from the file to the batch: each library's own loader, and ours with and without
`data.fast_images: true`.

It does what a loader worker does, in this process: samples by index, and their batch, to train and to test. The three
take turns batch by batch, with the same images and seeds. The result is images per CPU second and the ratio
to the library's. Then follows how much the switch changes the pixels, on the scale of 0 to 255.

`mosaic` compares `data.augment` with the loader of Ultralytics instead: mosaic in each sample, scale, color and flip.
"""

import collections
import contextlib
import copy
import io
import itertools
import json
import logging
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import main, trial_class_of
from side_by_side import config_of, local_context

from shared.data.dataset import SampleKey, seed_all

UNTRAINED = {
    "efficientdet": {"model": "tf_efficientdet_d0", "pretrained": "none"},
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


def ours(trial: Any) -> dict[str, Side]:
    train, test = trial.training_dataset(), trial.evaluation_dataset(trial.val_data)
    return {
        "train": Side(lambda i: train[SampleKey(0, i)], trial.collate(True), len(train)),
        "test": Side(lambda i: test[i], trial.collate(False), len(test)),
    }


def efficientdet_s(trial: Any, data: Path) -> dict[str, Side]:
    from effdet.anchors import AnchorLabeler, Anchors
    from effdet.data import DetectionDatset
    from effdet.data.loader import DetectionFastCollate
    from effdet.data.parsers import CocoParserCfg
    from effdet.data.transforms import transforms_coco_eval, transforms_coco_train

    config, sides = trial.model_config, {}
    for split, transforms in (("train", transforms_coco_train), ("test", transforms_coco_eval)):
        name = "train2017" if split == "train" else "val2017"
        parser = CocoParserCfg(ann_filename=str(data / f"annotations/instances_{name}.json"), has_labels=True)
        interpolation = trial.hparams.train_interpolation if split == "train" else trial.inputs["interpolation"]
        transform = transforms(config.image_size, interpolation=interpolation, use_prefetcher=True)
        dataset = DetectionDatset(data / name, parser="coco", parser_kwargs={"cfg": parser}, transform=transform)
        labeler = None
        if split == "train" and trial.hparams.labeler == "loader":
            labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes, match_threshold=0.5)
        sides[split] = Side(dataset.__getitem__, DetectionFastCollate(anchor_labeler=labeler), len(dataset))
    return sides


def detectron2_s(trial: Any, data: Path) -> dict[str, Side]:
    from detectron2.data import DatasetMapper, get_detection_dataset_dicts
    from detectron2.data.common import DatasetFromList, MapDataset
    from detectron2.data.datasets import register_coco_instances

    cfg, sides = trial.detectron2_config.cfg, {}
    for split in ("train", "test"):
        name = "train2017" if split == "train" else "val2017"
        register_coco_instances(f"benchmark_{split}", {}, str(data / f"annotations/instances_{name}.json"), data / name)
        dicts = get_detection_dataset_dicts([f"benchmark_{split}"], filter_empty=split == "train")
        dataset = MapDataset(DatasetFromList(dicts), DatasetMapper(cfg, split == "train"))
        sides[split] = Side(dataset.__getitem__, list, len(dataset))
    return sides


def mmdetection_s(trial: Any, data: Path) -> dict[str, Side]:
    from mmcv.parallel import collate
    from mmdet.datasets import build_dataset

    sides = {}
    for split, section in (("train", "train"), ("test", "val")):
        config = copy.deepcopy(trial.mmdet_config.data[section])
        config.classes = [category["name"] for category in trial.categories]
        dataset = build_dataset(config, {"test_mode": split == "test"})
        sides[split] = Side(dataset.__getitem__, lambda s: collate(s, samples_per_gpu=len(s)), len(dataset))
    return sides


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
    started = time.process_time()
    side.collate(samples)
    return taken + time.process_time() - started


def in_turns(sides: dict[str, Side], images: int, turns: int, batch: int) -> dict[str, Any]:
    count = min(side.count for side in sides.values())
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):  # the first warms up
        seconds = dict.fromkeys(sides, 0.0)
        for start in range(0, images, batch):
            indices = [(turn * images + start + i) % count for i in range(batch)]
            for name in random.sample([*sides], len(sides)):  # the first one finds the file in no cache
                seconds[name] += seconds_a_batch(sides[name], indices)
        for name in sides if turn else ():
            taken[name].append(seconds[name] / (-(-images // batch) * batch))
    measured: dict[str, Any] = {}
    for name, seconds in taken.items():
        measured[name] = {"images_per_second_and_core": round(1 / statistics.median(seconds), 1)}
        if name != "upstream":
            ratios = [theirs / own for theirs, own in zip(taken["upstream"], seconds, strict=True)]
            measured[name]["times_upstream"] = round(statistics.median(ratios), 2)
            measured[name]["min_max"] = [round(min(ratios), 2), round(max(ratios), 2)]
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
    means, largest, differing = [], 0.0, []
    for index in range(min(images, exact.count)):
        difference = np.abs(pixels_of(trial, detector, fast, index) - pixels_of(trial, detector, exact, index))
        means.append(difference.mean())
        differing.append((difference > 0).mean())
        largest = max(largest, float(difference.max()))
    return {
        "mean": round(float(np.mean(means)), 5),
        "largest": round(largest, 3),
        "share_of_pixels": round(float(np.mean(differing)), 5),
    }


def pixels(
    data: Path,
    detector: str = "",
    turns: int = 9,
    images: int = 40,
    compared: int = 80,
    batch_size: int = 4,
    labeler: str = "device",
) -> dict | None:
    """
    data: a COCO folder: annotations/, train2017/, val2017/
    detector: one only
    turns: ratios
    images: per ratio
    compared: images whose pixels are compared
    labeler: where EfficientDet's anchors are labeled: device or loader
    """
    logging.getLogger("determined").setLevel(logging.ERROR)
    if not detector:
        for name in UPSTREAM:  # each has a model_def of its own
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--detector", name], check=True)
        return None
    torch.set_num_threads(1)  # as in a loader's worker
    hyperparameters = {"global_batch_size": batch_size, **UNTRAINED[detector]}
    if detector == "efficientdet":
        hyperparameters["labeler"] = labeler
    trials, trial_class = {}, trial_class_of(detector)
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        for fast in (False, True):
            config = config_of(data.absolute(), hyperparameters, cache_dir=cache, fast_images=fast)
            with local_context(config) as context:
                trials[fast] = trial_class(context)
        upstream, exact, fast = UPSTREAM[detector](trials[False], data), ours(trials[False]), ours(trials[True])
        measured: dict[str, Any] = {"detector": detector}
        for split in ("train", "test"):
            sides = {"upstream": upstream[split], "here": exact[split], "fast_images": fast[split]}
            # MMDetection and Detectron2 test one image at a time
            batch = 1 if split == "test" and detector != "efficientdet" else batch_size
            measured[split] = in_turns(sides, images, turns, batch)
            measured[split]["difference_of_255"] = differences(
                trials[False], detector, exact[split], fast[split], compared
            )
    return measured


# --- mosaic -----------------------------------------------------------------------------------------


def copied(data: Path, folder: Path, copies: int) -> Path:
    """A COCO folder and Ultralytics' labels. Each training image has several names, so that no cache holds all."""
    coco = json.loads((data / "annotations/instances_train2017.json").read_text())
    position = {category["id"]: i for i, category in enumerate(coco["categories"])}
    images, annotations, labels = [], [], collections.defaultdict(list)
    for part in ("images/train2017", "labels/train2017", "annotations"):
        (folder / part).mkdir(parents=True)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for each in coco["annotations"]:
        (x, y, w, h), (width, height) = each["bbox"], sizes[each["image_id"]]
        box = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        labels[each["image_id"]].append(" ".join(map(str, (position[each["category_id"]], *box))))
    for copy_ in range(copies):
        for image in coco["images"]:
            name, identity = f"{copy_}_{image['file_name']}", image["id"] + copy_ * 10**7
            shutil.copy(data / "train2017" / image["file_name"], folder / "images/train2017" / name)
            (folder / "labels/train2017" / name).with_suffix(".txt").write_text("\n".join(labels[image["id"]]))
            images.append({**image, "file_name": name, "id": identity})
        annotations += [
            {**each, "image_id": each["image_id"] + copy_ * 10**7, "id": each["id"] + copy_ * 10**9}
            for each in coco["annotations"]
        ]
    (folder / "annotations/instances_train2017.json").write_text(
        json.dumps({**coco, "images": images, "annotations": annotations})
    )
    for shared in ("val2017", "annotations/instances_val2017.json"):
        (folder / shared).symlink_to((data / shared).absolute())
    (folder / "train2017").symlink_to(folder / "images/train2017")
    return folder


def ultralytics_s(folder: Path, names: list[str], input_size: int, batch: int) -> Side:
    import cv2
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import YOLODataset

    cv2.setNumThreads(1)  # as in a loader's worker
    data = {"names": dict(enumerate(names)), "nc": len(names), "channels": 3}
    images, settings = str(folder / "images/train2017"), get_cfg()  # mosaic 1, scale 0.5, HSV, flip 0.5
    dataset = YOLODataset(img_path=images, imgsz=input_size, augment=True, hyp=settings, data=data, batch_size=batch)
    return Side(dataset.__getitem__, dataset.collate_fn, len(dataset))


def mosaic(
    data: Path, turns: int = 9, images: int = 64, copies: int = 10, input_size: int = 640, batch: int = 16
) -> dict:
    """
    data: a COCO folder: annotations/, train2017/, val2017/
    turns: ratios
    images: per ratio
    copies: names of each image
    input_size: pixels per side
    batch: images per batch
    """
    logging.getLogger("determined").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    augment = {"mosaic": 1.0, "flip": 0.5, "scale": [0.8, 1.25], "color": 0.5}
    hyperparameters = {"global_batch_size": batch, **UNTRAINED["efficientdet"], "input_size": input_size}
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        folder = copied(data.absolute(), Path(cache) / "data", copies)
        config = config_of(folder, {**hyperparameters, "labeler": "device"}, cache_dir=cache, augment=augment)
        with local_context(config) as context:
            trial = trial_class_of("efficientdet")(context)
        train = trial.training_dataset()
        keys = [key for keys in itertools.islice(trial.training_batches(), len(train) // batch) for key in keys]
        own = Side(lambda i: train[keys[i]], trial.collate(True), len(keys))
        names = [category["name"] for category in trial.categories]
        sides = {"upstream": ultralytics_s(folder, names, input_size, batch), "here": own}
        for side in sides.values():  # fills their caches of decoded images
            for index in range(-8 * batch, 0):
                side.sample(index % side.count)
        return in_turns(sides, images, turns, batch)


if __name__ == "__main__":
    main(__doc__, pixels, mosaic)
