"""How an evaluation's results reach the chief: 5,000 images with 100 masks each, from 8 processes.

The other side sends arrays and one dict per mask to every process, by Determined's allgather. Both run over Determined's
`DistributedContext`, from the detections in memory to what hotcoco takes. Metrics are not computed. Bytes are those that
all sockets send; a broadcast counts once per receiver. Seconds are the chief's, until every process may continue. Memory
is what a process adds at its peak.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import zmq
from command_line import main
from determined.core import DistributedContext
from memory import added_mib
from pycocotools import mask as coco_mask
from tabulate import tabulate

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


def to_all(collected: list[Detections], distributed: DistributedContext) -> dict[str, float]:
    """Rows and masks to every process, merged on the chief."""
    boxes = np.concatenate([detections.boxes for detections in collected]).astype(np.float64)
    rows = np.empty((len(boxes), 7))
    rows[:, 0] = np.repeat([d.image_id for d in collected], [len(d) for d in collected])
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
    return {"detections": len(merged[order]), "masks": len([masks[i] for i in order.tolist()])}


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


def make_detections(images: range, count: int, masks: list[bytes]) -> list[Detections]:
    rng = np.random.default_rng(images.start)
    detections = []
    for image in images:
        boxes = np.sort(rng.uniform(0, 400, (count, 2, 2)), axis=1).reshape(count, 4)
        # bytes of their own, as a detector's are: pickle sends the same object only once
        counts = [bytes(bytearray(masks[i])) for i in rng.integers(len(masks), size=count)]
        rles = [{"size": [HEIGHT, WIDTH], "counts": piece} for piece in counts]
        labels = rng.integers(CATEGORIES, size=count)
        detections.append(Detections(image + 1, boxes, rng.uniform(size=count), labels, masks=rles))
    return detections


def process(way: str, rank: int, size: int, path: Path, count: int, masks: list[bytes], queue) -> None:
    """One rank of a way."""
    alone = {"local_rank": rank, "local_size": size, "cross_rank": 0, "cross_size": 1}
    pub_port, pull_port = PORTS[way]
    distributed = DistributedContext(rank=rank, size=size, pub_port=pub_port, pull_port=pull_port, **alone)
    annotations = CocoAnnotations.open(path)
    detections = make_detections(range(rank, len(annotations), size), count, masks)
    evaluator = Exchange(annotations, ("segm",), gather=distributed.gather)
    evaluator.update(detections)
    sent, send = [0], zmq.Socket.send

    def counting(socket, data, *rest, **options):
        sent[0] += len(data) * (size - 1 if socket.type == zmq.PUB else 1)
        return send(socket, data, *rest, **options)

    distributed.allgather(None)
    zmq.Socket.send = counting
    with added_mib() as added:
        started = time.perf_counter()
        if way == "to all":
            metrics = to_all(detections, distributed)
        else:
            metrics = evaluator.cross_slot_reduce(distributed.allgather(evaluator.per_slot_reduce()))
        sent_bytes = sent[0]
        distributed.allgather(None)
        seconds = time.perf_counter() - started
    evaluator.raise_if_failed()
    queue.put((rank, metrics, sent_bytes, seconds, added[0]))
    distributed.close()


def gather(images: int = 5000, detections: int = 100, processes: int = 8) -> None:
    """
    detections: per image
    """
    masks, rows = make_masks(), []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "val.json"
        files = [{"id": i + 1, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)]
        categories = [{"id": i + 1, "name": f"category {i + 1}"} for i in range(CATEGORIES)]
        path.write_text(json.dumps({"images": files, "annotations": [], "categories": categories}))
        CocoAnnotations.open(path)
        for way in PORTS:
            queue = context.Queue()
            ranks = [
                context.Process(target=process, args=(way, rank, processes, path, detections, masks, queue))
                for rank in range(processes)
            ]
            for rank in ranks:
                rank.start()
            results = sorted((queue.get() for _ in ranks), key=lambda result: result[0])
            for rank in ranks:
                rank.join()
            (_, metrics, _, seconds, chief), *others = results
            assert metrics["masks"] == metrics["detections"] == images * detections
            sent = sum(result[2] for result in results) / 2**20
            rows.append([way, sent, seconds, chief, max(other[-1] for other in others)])
    headers = ["results", "MiB sent", "seconds", "MiB of the chief", "MiB of another process"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".2f", ".0f", ".0f")))


if __name__ == "__main__":
    main(__doc__, gather)
