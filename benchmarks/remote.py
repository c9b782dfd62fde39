"""Images from a web server that answers late, beside the disk: how many images per second reach a training step.

Steps of 8 images take 100 ms, with 4 loader workers and 20 ms added to each read. The limit is 80 % of the disk's.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from command_line import ROOT, main

sys.path.append(str(ROOT / "tests"))

from stores import http_store

from coco_files import data_folder
from shared.config.schema import StoreOptions
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import CocoDetection, SampleKey
from shared.data.storage import open_images


def remote(
    source: Path | None = None, latency: float = 0.02, step: float = 0.1, steps: int = 60, repeats: int = 5
) -> None:
    """
    source: a folder with COCO's train2017; default: synthetic images
    latency: seconds added to each read
    step: seconds of a step
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "coco"
        data_folder(source, folder, train=400)
        annotations = CocoAnnotations.open(folder / "annotations/instances_train2017.json")
        with http_store(folder, latency) as url:
            places = {"disk": str(folder / "train2017"), "web server": f"{url}/train2017"}
            speeds: dict[str, list[float]] = {place: [] for place in places}
            for _ in range(repeats):
                for place, images in places.items():
                    speeds[place].append(images_per_second(annotations, images, steps, step))
    for place, values in speeds.items():
        print(f"{place}: {statistics.median(values):.1f} images/s ({min(values):.1f} to {max(values):.1f})")
    shares = [late / disk for disk, late in zip(*speeds.values(), strict=True)]
    print(f"the web server's share of the disk's: {statistics.median(shares):.3f} (limit 0.8)")


def images_per_second(annotations: CocoAnnotations, images: str, steps: int, seconds: float) -> float:
    """Of steps that only wait. The first ones, while the workers start, do not count."""
    storage = open_images(images, "train", StoreOptions())
    storage.look(annotations.file_names)
    data = CocoDetection(annotations, storage, lambda image, record: np.asarray(image).mean(), seed=0, training=True)
    keys = [SampleKey(0, i % len(data)) for i in range(8 * (steps + 10))]
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=keys, num_workers=4)
    for number, _ in enumerate(loader):
        if number == 10:
            started = time.perf_counter()
        time.sleep(seconds)
    return 8 * (number - 9) / (time.perf_counter() - started)


if __name__ == "__main__":
    main(__doc__, remote)
