"""Annotations of COCO's size: 118,287 images with about 1.07 million annotations, which repeat a small COCO file."""

import json
import os
import time
from pathlib import Path

import numpy as np
from command_line import main, scratch_folder, silent
from memory import compare_memory, read_all, together
from tabulate import tabulate

from coco_files import IMAGES, make_file, read_source
from shared.commands import data_report
from shared.config.schema import DataConfig, Split
from shared.data.annotations import CocoAnnotations
from shared.data.open import open_split

BATCH = 16
BOXES = {  # without masks
    "images": [{"id": 1, "width": 640, "height": 480}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [i + 0.5, 20, 30.25, 40], "area": 1210.0, "iscrowd": 0}
        for i in range(10)
    ],
    "categories": [{"id": 1, "name": "thing"}],
}


def memory(source: Path | None = None, images: int = IMAGES) -> dict:
    """`CocoAnnotations` beside torchvision's `CocoDetection`: time to open, and memory.

    Memory is the sum of PSS over the process and its four loader workers. Each of them has read every record. The sum
    for the same processes without annotations is subtracted.

    source: a COCO file to repeat; default: the synthetic data set
    images: the number of images in the repeated file
    """
    from torchvision.datasets import CocoDetection

    def open_torchvision() -> CocoDetection:
        with silent():
            return CocoDetection(str(path.parent), str(path))

    def read_torchvision(dataset: CocoDetection) -> None:
        for image_id in dataset.ids:
            dataset.coco.loadAnns(dataset.coco.getAnnIds(image_id))

    with scratch_folder() as folder:
        path = folder / "instances.json"
        summary = dict(zip(("images", "annotations"), make_file(source, path, images), strict=True))
        summary["file_mb"] = round(path.stat().st_size / 1e6)
        started = time.perf_counter()
        ours = CocoAnnotations.open(path)
        summary["first_open_seconds"] = round(time.perf_counter() - started, 2)
        sides = {"ours": (lambda: CocoAnnotations.open(path), read_all)}
        sides["torchvision"] = (open_torchvision, read_torchvision)
        summary |= compare_memory(sides)
        order = np.random.default_rng(0).integers(len(ours), size=60_000).tolist()
        started = time.perf_counter()
        for index in order:
            ours[index]
        summary["random_records_per_second"] = round(len(order) / (time.perf_counter() - started))
    return summary


def ranks(images: int = IMAGES, boxes: int = 10_000_000) -> None:
    """1 and 16 processes open a new file at once: the first has masks, the second boxes only. The limit is 1.2 times
    the memory of one process.

    images: the number of images in the file with masks
    boxes: the number of boxes in the file with boxes
    """
    rows = []
    with scratch_folder() as folder:
        make_file(None, folder / "coco.json", images)
        make_file(BOXES, folder / "boxes.json", boxes // 10, 10)
        for path in (folder / "coco.json", folder / "boxes.json"):
            gib = {}
            for count in (1, 16):
                cache = folder / f"{path.stem}{count}"
                seconds, gib[count] = together(lambda path=path, cache=cache: CocoAnnotations.open(path, cache), count)
                annotations = len(CocoAnnotations.open(path, cache).columns["labels"])
                rows.append([f"{annotations:,}", count, seconds, gib[count], gib[count] / gib[1]])
    headers = ["annotations", "processes", "seconds", "GiB, all together", "times one process"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", "", ".1f", ".2f", ".2f")))


def check(source: Path | None = None, images: int = IMAGES) -> None:
    """The report of `python3 -m shared check`, without reading images; the limit is 15 s.

    source: a COCO file to repeat; default: the synthetic data set
    images: the number of images in the repeated file
    """
    with scratch_folder() as folder:
        counts = make_file(source, folder / "train.json", images)
        (folder / "val.json").write_text(json.dumps(read_source(source)))
        print("{:,} images, {:,} annotations".format(*counts))
        (folder / "images").mkdir()
        splits = {s: Split(str(folder / f"{s}.json"), str(folder / "images")) for s in ("train", "val")}
        data = DataConfig(**splits, check_images=False, cache_dir=str(folder / "cache"))
        for what in ("parsed", "from the cache"):
            started = time.perf_counter()
            report = data_report.Report()
            opened = {split: open_split(data, split) for split in splits}
            data_report.describe(opened, None, 0, False, report)
            print(f"annotations {what}: {time.perf_counter() - started:.1f} s, {len(report.remarks)} remarks")


def disk(images: int = 2_000_000) -> None:
    """From the start to the read files of a batch, by 1 and 8 processes, and their memory; `again`: at most 5 s.

    images: empty files; they need as many inodes
    """

    def open_and_read(data: DataConfig) -> object:
        split = open_split(data, "train")
        for index in range(0, len(split.annotations), len(split.annotations) // BATCH):
            split.images.read(split.annotations[index].file_name)
        return split

    rows = []
    with scratch_folder() as place:
        (place / "images").mkdir()
        for number in range(images):
            os.mknod(f"{place}/images/{number:012d}.jpg")
        make_file(BOXES, place / "train.json", images, 1)
        split = Split(f"{place}/train.json", f"{place}/images")
        for ranks in (1, 8):
            for start in ("first", "again", "check_images: false"):
                checks = start != "check_images: false"
                data = DataConfig(train=split, cache_dir=f"{place}/cache{ranks}", check_images=checks)
                rows.append([f"{images:,}", ranks, start, *together(lambda data=data: open_and_read(data), ranks)])
    headers = ["images", "processes", "start", "seconds", "GiB, all together"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", "", "", ".1f", ".2f")))


if __name__ == "__main__":
    main(__doc__, memory, ranks, check, disk)
