"""The way of an evaluation's results to the process that computes: 5,000 images with 100 masks each, 8 processes.

Beside it what `CocoEvaluator` did at first: rows and a dict a mask, by Determined's allgather to every process. Both
run over Determined's own `DistributedContext`, each in 8 fresh processes of this machine, from the detections in memory
to what hotcoco takes (metrics are not computed). Bytes are those that all sockets send, a broadcast once for each
receiver; seconds are the chief's, from a common start until every process may go on; memory is what a process adds at
its peak.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import zmq
from determined.core import DistributedContext
from pycocotools import mask as coco_mask
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.evaluation.gathered import merge

HEIGHT, WIDTH, CATEGORIES = 480, 640, 80
PORTS = {"to all": (29_420, 29_421), "to the chief": (29_422, 29_423)}


class Exchange(CocoEvaluator):
    """The evaluator up to what hotcoco takes."""

    def metrics_of(self, shares: list) -> dict[str, float]:
        found = merge(shares)
        return {"detections": len(found.rows()), "masks": len(found.rles())}


def at_first(evaluator: CocoEvaluator, distributed: DistributedContext) -> dict[str, float]:
    """Rows and masks to every process, merged on the chief."""
    collected = [evaluator._detections[image_id] for image_id in sorted(evaluator._detections)]
    counts = [len(detections) for detections in collected]
    boxes = np.concatenate([detections.boxes for detections in collected]).astype(np.float64)
    rows = np.empty((sum(counts), 7))
    rows[:, 0] = np.repeat([detections.image_id for detections in collected], counts)
    rows[:, 1:3] = boxes[:, :2]
    rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
    rows[:, 5] = np.concatenate([detections.scores for detections in collected])
    rows[:, 6] = np.concatenate([detections.labels for detections in collected]) + 1
    slots = distributed.allgather((rows, [mask for detections in collected for mask in detections.masks]))
    if distributed.rank > 0:
        return {}
    merged = np.concatenate([rows for rows, _ in slots])
    masks = [mask for _, masks in slots for mask in masks]
    order = np.argsort(merged[:, 0], kind="stable")
    merged, masks = merged[order], [masks[i] for i in order.tolist()]
    return {"detections": len(merged), "masks": len(masks)}


def make_masks() -> list[bytes]:
    """RLE of ellipses with a rough edge."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for radius in np.exp(rng.uniform(np.log(8), np.log(70), 100)):
        center_y, center_x = rng.uniform(radius, HEIGHT - radius), rng.uniform(radius, WIDTH - radius)
        angle = np.arctan2(y - center_y, x - center_x)
        rough = 1 + 0.15 * np.sin(5 * angle + rng.uniform(0, 6))
        inside = np.hypot(y - center_y, (x - center_x) * rng.uniform(0.8, 1.4)) < radius * rough
        masks.append(coco_mask.encode(np.asfortranarray(inside, dtype=np.uint8))["counts"])
    return masks


def make_detections(images: range, count: int, rank: int, masks: list[bytes]) -> list[Detections]:
    rng = np.random.default_rng(rank)
    detections = []
    for image in images:
        boxes = np.sort(rng.uniform(0, 400, (count, 2, 2)), axis=1).reshape(count, 4)
        # bytes of their own, as a detector's are: pickle sends what it has seen once more as a number
        counts = [bytes(bytearray(masks[i])) for i in rng.integers(len(masks), size=count)]
        rles = [{"size": [HEIGHT, WIDTH], "counts": piece} for piece in counts]
        labels = rng.integers(CATEGORIES, size=count)
        detections.append(Detections(image + 1, boxes, rng.uniform(size=count), labels, masks=rles))
    return detections


def process(way: str, rank: int, arguments: argparse.Namespace, path: Path, masks: list[bytes], queue) -> None:
    size = arguments.processes
    distributed = DistributedContext(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        cross_rank=0,
        cross_size=1,
        pub_port=PORTS[way][0],
        pull_port=PORTS[way][1],
    )
    annotations = CocoAnnotations.open(path)
    evaluator = Exchange(annotations, ("segm",), gather=distributed.gather)
    evaluator.update(make_detections(range(rank, arguments.images, size), arguments.detections, rank, masks))

    sent, send = [0], zmq.Socket.send

    def counting(socket, data, *rest, **options):
        sent[0] += len(data) * (size - 1 if socket.type == zmq.PUB else 1)
        return send(socket, data, *rest, **options)

    distributed.allgather(None)
    zmq.Socket.send = counting
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    if way == "to all":
        metrics = at_first(evaluator, distributed)
    else:
        metrics = evaluator.cross_slot_reduce(distributed.allgather(evaluator.per_slot_reduce()))
    sent_bytes = sent[0]
    distributed.allgather(None)
    seconds = time.perf_counter() - started
    evaluator.raise_if_failed()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    queue.put((rank, metrics, sent_bytes, seconds, (peak - before) / 2**20))
    distributed.close()


def measure(way: str, arguments: argparse.Namespace, path: Path, masks: list[bytes]) -> list:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=process, args=(way, rank, arguments, path, masks, queue))
        for rank in range(arguments.processes)
    ]
    for one in processes:
        one.start()
    results = sorted((queue.get() for _ in processes), key=lambda result: result[0])
    for one in processes:
        one.join()
    (_, metrics, _, seconds, chief), *others = results
    assert metrics["masks"] == metrics["detections"] == arguments.images * arguments.detections
    sent = sum(result[2] for result in results) / 2**20
    return [way, sent, seconds, chief, max(other[-1] for other in others)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--processes", type=int, default=8)
    arguments = parser.parse_args()
    masks = make_masks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "val.json"
        images = ",".join(
            f'{{"id": {i + 1}, "file_name": "{i}.jpg", "height": {HEIGHT}, "width": {WIDTH}}}'
            for i in range(arguments.images)
        )
        categories = ",".join(f'{{"id": {i + 1}, "name": "category {i + 1}"}}' for i in range(CATEGORIES))
        path.write_text(f'{{"images": [{images}], "annotations": [], "categories": [{categories}]}}')
        CocoAnnotations.open(path)
        rows = [measure(way, arguments, path, masks) for way in PORTS]
    lengths = [len(mask) for mask in masks]
    print(f"masks of {min(lengths)} to {max(lengths)} bytes, {np.mean(lengths):.0f} on average")
    print(
        tabulate(
            rows,
            headers=["results", "MiB sent", "seconds", "MiB of the chief", "MiB of another process"],
            floatfmt=("", ".1f", ".2f", ".0f", ".0f"),
        )
    )


if __name__ == "__main__":
    main()
