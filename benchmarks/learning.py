"""How well each detector learns from scratch in the same CPU seconds, and Ultralytics' YOLO11n if it is installed.

    python3 benchmarks/learning.py --data /data/bccd --output runs/learning --ultralytics ~/ultra/bin/python

Each training runs by the command that its user types, with its `bccd.yaml`. Its best validation on `val` counts, as
Ultralytics keeps its `best.pt`. Seconds are the user CPU seconds of all the command's processes, validations and report
included. `python3 -m shared compare` scores all of them into `compare.html` in the output folder.

Each side runs with OMP_NUM_THREADS=1, which Ultralytics sets itself. A training that is finished in the output folder
is not repeated.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import DETECTORS, ROOT, main
from commits import on_bccd
from tabulate import tabulate

YOLO = "yolo11n"

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


def learning(
    data: Path = Path("/data/bccd"),
    output: Path = Path("runs/learning"),
    only: list[str] = [*DETECTORS, YOLO],  # noqa: B006
    seconds: float = 677,
    set_: list[str] = [],  # noqa: B006
    ultralytics: str = "",
    epochs: int = 36,
    yolo: dict = {},  # noqa: B006
) -> None:
    """
    data: with annotations/train.json, annotations/val.json and images/; default /data/bccd
    only: detectors and yolo11n; default all
    seconds: the budget of each, user
    set_: as train's, such as hyperparameters.amp=bf16
    ultralytics: a Python that imports ultralytics
    epochs: of YOLO
    yolo: more of YOLO's settings, such as lr0=0.002
    """
    data, output = data.absolute(), output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    sides = list(only)
    if YOLO in sides and not imports_ultralytics(ultralytics):
        print(f"{YOLO} is skipped: `--ultralytics` names no Python that imports ultralytics", file=sys.stderr)
        sides.remove(YOLO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in sides:
        if seconds_of(output, name) is None:
            if name == YOLO:
                took = train_yolo(ultralytics, data, output, epochs, dict(yolo), environment)
            else:
                took = train(name, data, output, set_, environment)
            (output / f"{name}.seconds").write_text(f"{took:.1f}\n")
    print_table(output, sides, data, seconds)


def train(detector: str, data: Path, output: Path, changes: list[str], environment: dict[str, str]) -> float:
    """Trains as its user does, with changes to its config. Returns user seconds."""
    folder = output / detector
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was stopped
    command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(folder), *on_bccd(data)]
    for change in changes:
        command += ["--set", change]
    return user_seconds(command, ROOT / detector, environment, output / f"{detector}.log")


def train_yolo(
    python: str, data: Path, output: Path, epochs: int, settings: dict, environment: dict[str, str]
) -> float:
    """Trains from scratch, and writes the detections of its best weights on `val`; returns the training's seconds."""
    folder = output / YOLO
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**environment, "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(output)}
    with tempfile.TemporaryDirectory() as scratch:
        file, ids = write_yolo(data, Path(scratch))
        common = {
            "data": str(file),
            "imgsz": 320,
            "device": "cpu",
            "project": str(output),
            "exist_ok": True,
            "plots": False,
        }
        arguments = {**common, "name": YOLO, "epochs": epochs, "optimizer": "AdamW", "pretrained": False, **settings}
        command = [python, "-c", YOLO_TRAIN, json.dumps(arguments)]
        seconds = user_seconds(command, Path(scratch), environment, output / f"{YOLO}.log")
        arguments = {**common, "conf": 0.001, "max_det": 300, "save_json": True, "name": f"{YOLO}_val"}
        command = [python, "-c", YOLO_VAL, str(folder / "weights" / "best.pt"), json.dumps(arguments)]
        user_seconds(command, Path(scratch), environment, output / f"{YOLO}_val.log")
    results = json.loads((output / f"{YOLO}_val" / "predictions.json").read_text())
    for row in results:
        row["category_id"] = ids[row["category_id"] - 1]  # its own count from 1
    (output / f"{YOLO}.json").write_text(json.dumps(results))
    return seconds


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


def seconds_of(output: Path, name: str) -> float | None:
    file = output / f"{name}.seconds"
    return float(file.read_text()) if file.exists() else None


def print_table(output: Path, sides: list[str], data: Path, budget: float) -> None:
    """mAP and AP50 of each, as `compare` finds them, which also writes its page."""
    runs = [str(output / (f"{YOLO}.json" if name == YOLO else name)) for name in sides]
    numbers = {}
    if len(runs) > 1:
        page = output / "compare.html"
        command = [sys.executable, "-m", "shared", "compare", *runs, "--output", str(page)]
        command += ["--annotations", str(data / "annotations" / "val.json"), "--images", str(data / "images")]
        subprocess.run(command, cwd=ROOT, check=True)
        for one in json.loads(page.with_suffix(".json").read_text()):
            numbers |= {one[side]: {row["name"]: row[side] for row in one["metrics"]} for side in ("a", "b")}
    rows = []
    for name in sides:
        seconds, found = seconds_of(output, name), numbers.get(name, {})
        over = f"{seconds - budget:.0f} s over" if seconds > budget else ""
        rows.append([name, round(seconds), found.get("mAP"), found.get("mAP_50"), over])
    headers = ["", "user seconds", "mAP", "AP50", f"of {budget:.0f} s"]
    print(tabulate(rows, headers=headers, floatfmt=(".0f", ".0f", ".3f", ".3f")))


if __name__ == "__main__":
    main(__doc__, learning)
