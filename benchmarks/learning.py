"""How well a detector learns small data sets from scratch, beside Ultralytics' YOLO11n in the same CPU seconds.

    python3 benchmarks/learning.py --data ~/sets/* --output runs/learning --only mmdetection yolo11n --seeds 3 \\
        --set "searcher.max_length={batches: 400}" --ultralytics ~/ultra/bin/python

Each training runs by the command that its user types, with its detector's `bccd.yaml` and the set's paths. The best
validation counts, as Ultralytics keeps its `best.pt`. Its detections are scored by pycocotools, ours by the evaluator
that gives pycocotools' numbers. Seconds are the user CPU seconds of all the command's processes, validations and report
included.

Each side runs with OMP_NUM_THREADS=1, which Ultralytics sets itself. A run that is finished in the output folder
is not repeated.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import DETECTORS, ROOT, main
from commits import on_bccd
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

YOLO = "yolo11n"
YOLO_PIXELS = 320  # per side

# Runs in the interpreter that has Ultralytics' package, which is no part of this project.
YOLO_TRAIN = """
import json, sys
from ultralytics import YOLO
YOLO("yolo11n.yaml").train(**json.loads(sys.argv[1]))
"""
YOLO_VAL = """
import json, sys
from ultralytics import YOLO
YOLO(sys.argv[1]).val(**json.loads(sys.argv[2]))
"""


@dataclass
class Learned:
    """The cost and the result of a training run.

    Attributes:
        seconds: user CPU seconds.
        mAP, AP50: metrics of its best validation.
    """

    seconds: float
    mAP: float
    AP50: float


def learning(
    data: list[Path],
    output: Path = Path("runs/learning"),
    only: list[str] = [*DETECTORS, YOLO],  # noqa: B006
    seeds: int = 1,
    set_: list[str] = [],  # noqa: B006
    ultralytics: str = "",
    yolo_images: int = 1500,
    yolo: dict = {},  # noqa: B006
) -> None:
    """
    data: folders with annotations/train.json, annotations/val.json and images/
    only: detectors and yolo11n; default all
    seeds: training runs of each, with the seeds 0, 1, 2, …
    set_: as train's, such as hyperparameters.amp=bf16
    ultralytics: a Python that imports ultralytics
    yolo_images: how many images YOLO sees, which decides its epochs
    yolo: more of YOLO's settings, such as lr0=0.002
    """
    sides = list(only)
    if YOLO in sides and not imports_ultralytics(ultralytics):
        print(f"{YOLO} is skipped: `--ultralytics` names no Python that imports ultralytics", file=sys.stderr)
        sides.remove(YOLO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    table = []
    for seed in range(seeds):  # a seed of every side, then the next: a run that is stopped has whole rows
        for folder in data:
            for side in sides:
                run = output.absolute() / folder.name / f"{side}-{seed}"
                found = run.with_suffix(".json")
                if found.exists():
                    continue
                shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped
                run.parent.mkdir(parents=True, exist_ok=True)
                if side == YOLO:
                    learned = train_yolo(
                        ultralytics, folder.absolute(), run, seed, yolo_images, dict(yolo), environment
                    )
                else:
                    learned = train(side, folder.absolute(), run, seed, set_, environment)
                found.write_text(json.dumps(asdict(learned)))
    for folder in data:
        for side in sides:
            files = [output / folder.name / f"{side}-{seed}.json" for seed in range(seeds)]
            runs = [Learned(**json.loads(file.read_text())) for file in files]
            table.append([folder.name, side, *(spread(runs, name) for name in ("seconds", "mAP", "AP50"))])
    print(tabulate(table, headers=["data", "", "CPU seconds", "mAP", "AP50"]))


def train(detector: str, data: Path, run: Path, seed: int, changes: list[str], environment: dict[str, str]) -> Learned:
    """Trains as its user does, with changes to its config."""
    command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(run), *on_bccd(data)]
    for change in (f"reproducibility.experiment_seed={seed}", *changes):
        command += ["--set", change]
    seconds = user_seconds(command, ROOT / detector, environment, run.with_suffix(".log"))
    rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if "bbox_mAP" in row), key=lambda row: row["bbox_mAP"])
    return Learned(seconds, best["bbox_mAP"], best["bbox_mAP_50"])


def train_yolo(
    python: str, data: Path, run: Path, seed: int, images: int, settings: dict, environment: dict[str, str]
) -> Learned:
    """Trains from scratch, and scores the detections of its best weights on `val`."""
    environment = {**environment, "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(run.parent)}
    with tempfile.TemporaryDirectory() as scratch:
        file, ids = write_yolo(data, Path(scratch))
        epochs = round(images / len(list((Path(scratch) / "images" / "train").iterdir())))
        common = {"data": str(file), "imgsz": YOLO_PIXELS, "device": "cpu", "exist_ok": True, "plots": False}
        common |= {"project": str(run.parent), "workers": 1}
        arguments = {**common, "name": run.name, "epochs": epochs, "optimizer": "AdamW", "pretrained": False}
        arguments |= {"seed": seed, **settings}
        command = [python, "-c", YOLO_TRAIN, json.dumps(arguments)]
        seconds = user_seconds(command, Path(scratch), environment, run.with_suffix(".log"))
        arguments = {**common, "conf": 0.001, "max_det": 300, "save_json": True, "name": f"{run.name}-val"}
        command = [python, "-c", YOLO_VAL, str(run / "weights" / "best.pt"), json.dumps(arguments)]
        user_seconds(command, Path(scratch), environment, run.parent / f"{run.name}-val.log")
    results = json.loads((run.parent / f"{run.name}-val" / "predictions.json").read_text())
    if not results:
        return Learned(seconds, 0.0, 0.0)
    for row in results:
        row["category_id"] = ids[row["category_id"] - 1]  # its own count from 1
    truth = COCO(str(data / "annotations" / "val.json"))
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return Learned(seconds, float(evaluation.stats[0]), float(evaluation.stats[1]))


def write_yolo(data: Path, folder: Path) -> tuple[Path, list[int]]:
    """YOLO's layout of COCO files, images linked; returns its data file, and the categories' ids in their order."""
    for split in ("train", "val"):
        coco = json.loads((data / "annotations" / f"{split}.json").read_text())
        ids = [category["id"] for category in coco["categories"]]
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        lines = {image["id"]: [] for image in coco["images"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        for one in coco["annotations"]:
            x, y, w, h = one["bbox"]
            width, height = sizes[one["image_id"]]
            if w > 0 and h > 0 and not one.get("iscrowd"):
                box = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                numbers = " ".join(f"{number:.6f}" for number in box)
                lines[one["image_id"]].append(f"{ids.index(one['category_id'])} {numbers}\n")
        for image in coco["images"]:  # by id, which its results name images by
            source = data / "images" / image["file_name"]
            (images / f"{image['id']}{source.suffix}").symlink_to(source)
            (labels / f"{image['id']}.txt").write_text("".join(lines[image["id"]]))
        names = [category["name"] for category in coco["categories"]]
    file = folder / "data.yaml"  # JSON is YAML
    file.write_text(json.dumps({"path": str(folder), "train": "images/train", "val": "images/val", "names": names}))
    return file, ids


def user_seconds(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> float:
    """User CPU seconds of the command and all processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with log.open("w") as file:
        ended = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        sys.exit(f"{' '.join(command[:3])}: exit status {ended.returncode}\n{log.read_text()[-2000:]}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def imports_ultralytics(python: str) -> bool:
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ultralytics') is None)"
    return bool(python) and subprocess.run([python, "-c", found]).returncode == 0


def spread(runs: list[Learned], name: str) -> str:
    """The mean, and the lowest and highest."""
    values = [getattr(run, name) for run in runs]
    digits = 0 if name == "seconds" else 3
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main(__doc__, learning)
