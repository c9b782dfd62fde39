"""`CocoAnnotations` on a file of COCO's size, beside torchvision's `CocoDetection`.

The file repeats a small COCO file (or the synthetic data set) until it has 118,287 images with about 1.07 million
annotations. Memory is the sum of PSS over the process and its four loader workers, each of which has read every record,
less what the same processes take without annotations.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from coco_files import make_file
from shared.data.annotations import CocoAnnotations

WORKERS = 4


def pss(processes) -> float:
    return sum(psutil.Process(pid).memory_full_info().pss for pid in processes) / 2**30


def _read_all(dataset, reader, ready, done) -> None:
    reader(dataset)
    ready.release()
    done.acquire()


def memory_with_workers(opener, reader, queue, ranks) -> None:
    """Opens, forks the workers as a DataLoader does, lets each read everything, measures them all, while the other
    ranks have theirs."""

    def measure(dataset, reader):
        context = multiprocessing.get_context("fork")
        ready, done = context.Semaphore(0), context.Semaphore(0)
        workers = [context.Process(target=_read_all, args=(dataset, reader, ready, done)) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        ranks.wait()
        total = pss([os.getpid(), *(worker.pid for worker in workers)])
        ranks.wait()
        for _ in workers:  # all of them first: it is not said which worker takes which release
            done.release()
        for worker in workers:
            worker.join()
        return total

    without = measure(None, lambda dataset: None)
    started = time.perf_counter()
    dataset = opener()
    opened = time.perf_counter() - started
    queue.put((opened, measure(dataset, reader) - without))


def in_new_process(opener, reader, ranks=1):
    """Seconds to open, and GiB that all ranks together add, each a process with workers of its own."""
    context = multiprocessing.get_context("fork")
    queue, together = context.Queue(), context.Barrier(ranks)
    arguments = (opener, reader, queue, together)
    processes = [context.Process(target=memory_with_workers, args=arguments) for _ in range(ranks)]
    for process in processes:
        process.start()
    seconds, added = zip(*(queue.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return max(seconds), sum(added)


def read_ours(annotations) -> None:
    for index in range(len(annotations)):
        annotations[index]


def read_torchvision(dataset) -> None:
    for image_id in dataset.ids:
        dataset._load_target(image_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="a COCO file to repeat; default: the synthetic data set")
    parser.add_argument("--without-torchvision", action="store_true", help="it takes 5 GB")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "instances.json"
        images, annotations = make_file(arguments.source, path)
        summary = {"images": images, "annotations": annotations, "file_mb": round(path.stat().st_size / 1e6)}

        started = time.perf_counter()
        CocoAnnotations.open(path)
        summary["first_open_seconds"] = round(time.perf_counter() - started, 2)
        opened, added = in_new_process(lambda: CocoAnnotations.open(path), read_ours)
        summary["later_open_seconds"] = round(opened, 3)
        summary["ours_added_gib"] = round(added, 3)

        ours = CocoAnnotations.open(path)
        order = np.random.default_rng(0).integers(len(ours), size=60_000).tolist()
        started = time.perf_counter()
        for index in order:
            ours[index]
        summary["random_records_per_second"] = round(len(order) / (time.perf_counter() - started))

        if not arguments.without_torchvision:
            import contextlib
            import io

            from torchvision.datasets import CocoDetection

            def open_torchvision():
                with contextlib.redirect_stdout(io.StringIO()):
                    return CocoDetection(str(folder), str(path))

            opened, added = in_new_process(open_torchvision, read_torchvision)
            summary["torchvision_open_seconds"] = round(opened, 1)
            summary["torchvision_added_gib"] = round(added, 2)
        print(json.dumps(summary, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
