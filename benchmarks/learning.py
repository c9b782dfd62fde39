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
from pathlib import Path

from command_line import DETECTORS, ROOT, main, scratch_folder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from turns import spread

from coco_files import yolo_split

YOLO = "yolo11n"
YOLO_PIXELS = 320  # per side

# Runs in the interpreter that has Ultralytics' package, which is no part of this project.
RUN_YOLO = """
import json, sys
from ultralytics import YOLO
model, method, arguments = sys.argv[1:]
getattr(YOLO(model), method)(**json.loads(arguments))
"""
FIGURES = {"seconds": 0, "mAP": 3, "AP50": 3}
"""The figures of a training run and their digits: user CPU seconds, and the metrics of its best validation."""


def learning(
    data: list[Path],
    output: Path = Path("runs/learning"),
    only: list[str] = [*DETECTORS, YOLO],  # noqa: B006
    seeds: int = 1,
    set_: list[str] = [],  # noqa: B006
    ultralytics: str = "",
    yolo_images: int = 1500,
) -> None:
    """
    data: folders with annotations/train.json, annotations/val.json and images/
    only: detectors and yolo11n; default all
    seeds: training runs of each, with the seeds 0, 1, 2, …
    set_: as train's, such as hyperparameters.amp=bf16
    ultralytics: a Python that imports ultralytics
    yolo_images: how many images YOLO sees, which decides its epochs
    """
    sides = list(only)
    if YOLO in sides and not ultralytics:
        print(f"{YOLO} is skipped: it needs `--ultralytics`", file=sys.stderr)
        sides.remove(YOLO)
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
                    learned = train_yolo(ultralytics, folder.absolute(), run, seed, yolo_images)
                else:
                    learned = train(side, folder.absolute(), run, seed, set_)
                found.write_text(json.dumps(dict(zip(FIGURES, learned, strict=True))))
    table = []
    for folder in data:
        for side in sides:
            files = [output / folder.name / f"{side}-{seed}.json" for seed in range(seeds)]
            runs = [json.loads(file.read_text()) for file in files]
            figures = [spread([run[key] for run in runs], n, statistics.mean) for key, n in FIGURES.items()]
            table.append([folder.name, side, *figures])
    print(tabulate(table, headers=["data", "", "CPU seconds", "mAP", "AP50"]))


def train(detector: str, data: Path, run: Path, seed: int, changes: list[str]) -> tuple[float, float, float]:
    """Trains as its user does, with changes to its config. Returns the `FIGURES`."""
    command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(run)]
    annotations, images = data / "annotations", data / "images"
    splits = [f"data.{s}={{annotations: {annotations / s}.json, images: {images}}}" for s in ("train", "val")]
    for change in (*splits, f"reproducibility.experiment_seed={seed}", *changes):
        command += ["--set", change]
    seconds = user_seconds(command, ROOT / detector, run.with_suffix(".log"))
    rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if "bbox_mAP" in row), key=lambda row: row["bbox_mAP"])
    return seconds, best["bbox_mAP"], best["bbox_mAP_50"]


def train_yolo(python: str, data: Path, run: Path, seed: int, images: int) -> tuple[float, float, float]:
    """Trains from scratch, and scores the detections of its best weights on `val`. Returns the `FIGURES`."""
    truth = data / "annotations" / "val.json"
    with scratch_folder() as folder:

        def run_yolo(model: Path | str, method: str, name: str, **arguments: object) -> float:
            common = {"data": str(folder / "data.yaml"), "imgsz": YOLO_PIXELS, "device": "cpu", "workers": 1}
            common |= {"project": str(run.parent), "name": name, "exist_ok": True, "plots": False}
            command = [python, "-c", RUN_YOLO, str(model), method, json.dumps({**common, **arguments})]
            of_yolo = {"YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(run.parent)}
            return user_seconds(command, folder, run.parent / f"{name}.log", **of_yolo)

        yolo_split(data / "annotations" / "train.json", data / "images", folder, "train")
        categories = yolo_split(truth, data / "images", folder, "val")
        names = [category["name"] for category in categories]
        splits = {split: f"images/{split}" for split in ("train", "val")}
        (folder / "data.yaml").write_text(json.dumps({"path": str(folder), **splits, "names": names}))  # JSON is YAML
        epochs = round(images / len(list((folder / "images" / "train").iterdir())))
        settings = {"epochs": epochs, "optimizer": "AdamW", "pretrained": False, "seed": seed}
        seconds = run_yolo("yolo11n.yaml", "train", run.name, **settings)
        best, name = run / "weights" / "best.pt", f"{run.name}-val"
        run_yolo(best, "val", name, conf=0.001, max_det=300, save_json=True)
    results = json.loads((run.parent / name / "predictions.json").read_text())
    if not results:
        return seconds, 0.0, 0.0
    for row in results:
        row["category_id"] = categories[row["category_id"] - 1]["id"]  # its own count from 1
    coco = COCO(str(truth))
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return seconds, float(evaluation.stats[0]), float(evaluation.stats[1])


def user_seconds(command: list[str], folder: Path, log: Path, **environment: str) -> float:
    """User CPU seconds of the command and all processes that it waited for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with log.open("w") as file:
        ended = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        sys.exit(f"{' '.join(command[:3])}: exit status {ended.returncode}\n{log.read_text()[-2000:]}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


if __name__ == "__main__":
    main(__doc__, learning)
