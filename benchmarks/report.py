"""How long a report takes, and a comparison, and how much memory: of made-up detections on data of COCO's size.

    python benchmarks/report.py --images 5000 --detections 60 --categories 80

Each runs in a process of its own, whose greatest resident memory is said.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.report.report import report

OBJECTS = 7  # an image, as in COCO


def data_set(folder: Path, images: int, categories: int, rng: np.random.Generator) -> Path:
    """Made-up annotations, of images that are not there."""
    rows, annotations = [], []
    for image_id in range(1, images + 1):
        rows.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 640, "height": 480})
        for _ in range(rng.poisson(OBJECTS)):
            w, h = rng.uniform(10, 200, 2)
            x, y = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, categories + 1)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    names = [{"id": i, "name": f"category {i}"} for i in range(1, categories + 1)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": names}))
    return path


def detections_of(annotations: CocoAnnotations, count: int, rng: np.random.Generator) -> list[Detections]:
    """`count` an image: the truth, somewhat off, some of another category, and inventions of low score."""
    categories, found = len(annotations.categories), []
    for record in annotations:
        kept = rng.random(len(record.boxes)) < 0.85
        sizes = np.tile(record.boxes[kept, 2:] - record.boxes[kept, :2], 2)
        boxes = record.boxes[kept] + rng.normal(0, 0.06, (kept.sum(), 4)) * sizes
        labels = np.where(rng.random(kept.sum()) < 0.1, rng.integers(0, categories, kept.sum()), record.labels[kept])
        more = max(count - len(boxes), 0)
        corners = rng.uniform(0, 400, (more, 2))
        invented = np.concatenate([corners, corners + rng.uniform(10, 200, (more, 2))], axis=1)
        found.append(
            Detections(
                record.image_id,
                np.concatenate([boxes, invented]),
                np.concatenate([rng.beta(5, 2, len(boxes)), rng.beta(1, 8, more)]),
                np.concatenate([labels, rng.integers(0, categories, more)]),
            )
        )
    return found


def measure(path: Path, count: int, resamples: int, output: Path, what: str) -> None:
    annotations = CocoAnnotations.open(path)
    detections = detections_of(annotations, count, np.random.default_rng(1))
    started = time.perf_counter()
    report(annotations, detections, output, resamples=resamples)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{what}: {seconds:.1f} s, at most {peak:.0f} MiB, page of {output.stat().st_size / 2**20:.2f} MiB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=60, help="an image")
    parser.add_argument("--categories", type=int, default=80)
    parser.add_argument("--resamples", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = data_set(Path(folder), given.images, given.categories, np.random.default_rng(0))
        CocoAnnotations.open(path)
        for resamples, what in ((0, "without intervals"), (given.resamples, f"with {given.resamples} resamples")):
            arguments = (path, given.detections, resamples, Path(folder) / "report.html", what)
            process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
