"""Stores that answer late.

`remote` is images from a web server beside the disk: how many images per second reach a training step. Steps of 8
images take 100 ms, with 4 loader workers and 20 ms added to each read. The limit is 80 % of the disk's.

`uploads` is a checkpoint to S3, whose files go one by one or several at once. Each request takes 50 ms longer.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from command_line import ROOT, main, scratch_folder
from turns import in_turns, ratio, seconds_of, spread

from coco_files import data_folder, paths_of
from shared.config.schema import StoreOptions
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import CocoDetection, SampleKey
from shared.data.remote import RemoteImages
from shared.data.storage import DiskImages, ImageStorage, open_place
from shared.training import run_store
from shared.training.run_folder import RunFolder
from shared.training.run_store import RunStore
from shared.training.saving import METADATA, write_manifest

sys.path.insert(0, str(ROOT / "tests"))
from stores import Faults, http_store, s3_store, with_faults


def remote(source: Path | None = None, steps: int = 60, repeats: int = 5) -> None:
    """
    source: a folder with COCO's train2017; default: synthetic images
    """
    with scratch_folder() as scratch:
        folder = scratch / "coco"
        data_folder(source, folder, train=400)
        path, on_disk = paths_of(folder, "train")
        annotations = CocoAnnotations.open(path)
        with http_store(folder, 0.02) as url:
            places = {"disk": DiskImages(on_disk), "web server": RemoteImages(f"{url}/{on_disk.name}")}
            sides = {
                place: lambda _, images=images: images_per_second(annotations, images, steps)
                for place, images in places.items()
            }
            speeds = in_turns(sides, repeats, warm_up=0)
    for place, values in speeds.items():
        print(f"{place}: {spread(values)} images/s")
    share = ratio(speeds["web server"], speeds["disk"])["ratio_median"]
    print(f"the web server's share of the disk's: {share} (limit 0.8)")


def uploads(files: int = 150, at_once: list[int] = (1, 8, 16), repeats: int = 5) -> None:
    """
    files: small ones in a checkpoint, beside 20 MB of weights
    at_once: uploads at the same time
    """
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")

    def upload(turn: int, count: int) -> float:
        folder = RunFolder(scratch / f"{turn}-{count}")
        store = RunStore(open_place(f"s3://pictures/{turn}-{count}", StoreOptions(endpoint)), folder)
        store.take(None)
        checkpoint = folder.checkpoints / "last"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state_dict.pth").write_bytes(bytes(20_000_000))
        for each in range(files):
            (checkpoint / f"{each}.py").write_bytes(bytes(8_000))
        (checkpoint / METADATA).write_text(json.dumps({"steps_completed": 1}))
        write_manifest(checkpoint, 1)

        def store_checkpoint() -> None:
            store.add_checkpoint(is_best=True)
            store.wait()

        with mock.patch.object(run_store, "UPLOADS_AT_ONCE", count):
            return seconds_of(store_checkpoint, clock=time.perf_counter)

    with scratch_folder() as scratch, served_s3(0.05) as endpoint:
        took = in_turns({count: partial(upload, count=count) for count in at_once}, repeats, warm_up=0)
    for count, values in took.items():
        print(f"{count} at once: {spread(values)} s")


@contextmanager
def served_s3(latency: float) -> Iterator[str]:
    """The endpoint of an empty S3, in a process of its own, that answers late."""
    endpoint = multiprocessing.Queue()

    def serve() -> None:
        late = Faults(lambda number: "late", late=latency, counted=lambda path, command: True)
        with scratch_folder() as empty, s3_store(empty) as s3, with_faults(s3, late) as proxy:
            endpoint.put(proxy)
            time.sleep(10**6)

    process = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    process.start()
    try:
        yield endpoint.get()
    finally:
        process.terminate()
        process.join()


def images_per_second(annotations: CocoAnnotations, images: ImageStorage, steps: int) -> float:
    """Of steps that only wait. The first ones, while the workers start, do not count."""
    images.look(annotations.file_names)
    data = CocoDetection(annotations, images, lambda image, record: np.asarray(image).mean(), seed=0, training=True)
    keys = [SampleKey(0, i % len(data)) for i in range(8 * (steps + 10))]
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=keys, num_workers=4)
    for number, _ in enumerate(loader):
        if number == 10:
            started = time.perf_counter()
        time.sleep(0.1)
    return 8 * (number - 9) / (time.perf_counter() - started)


if __name__ == "__main__":
    main(__doc__, remote, uploads)
