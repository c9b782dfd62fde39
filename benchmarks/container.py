"""How long a container takes from its start to the first batch of `const_fake.yaml`.

`python3 benchmarks/container.py [DETECTOR …]`: in an environment with Python, torch, torchvision and determined alone
(made for it, of the versions in constraints.txt), by the detector's startup-hook.sh and training, as a task's container
starts. `--compiled` compiles the operations as COMPILED_OPERATIONS=1 does, with an empty PIP_CACHE_DIR, then once more
with what pip kept there.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
DETECTORS = ("efficientdet", "mmdetection", "detectron2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detectors", nargs="*", metavar="DETECTOR", help=", ".join(DETECTORS))
    parser.add_argument("--compiled", action="store_true", help="minutes for each")
    parser.add_argument("--folder", type=Path, help="where the environments are made, for a time (11 GB)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        image = make_image(folder / "image")
        rows = []
        for detector in arguments.detectors or DETECTORS:
            kept = {"COMPILED_OPERATIONS": "1", "PIP_CACHE_DIR": str(folder / f"{detector}-cache")}
            ways = {"compiled": kept, "compiled, from pip's cache": kept} if arguments.compiled else {"": {}}
            for way, environment in ways.items():
                rows.append([detector, way, *start(detector, image, environment)])
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    headers = ["detector", "operations", "startup-hook.sh, s", "CPU s", "until the first batch, s", "in all, s"]
    print(tabulate(rows, headers=headers, tablefmt="github"))


def make_image(home: Path) -> Path:
    """An environment of torch, torchvision and determined, in a place that its copies are moved to."""
    subprocess.run(["python3", "-m", "venv", "--copies", home], check=True)
    pip = [home / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch", "torchvision", "determined", "numpy"], check=True)
    return home


def start(detector: str, image: Path, environment: dict[str, str]) -> tuple[str, str, str, str]:
    """Seconds of the hook, of its CPU, of the training until it says that its first batch is done, and of both."""
    kept = image.with_name("image-as-it-was")
    shutil.copytree(image, kept, symlinks=True)
    task = {**os.environ, **environment, "PATH": f"{image / 'bin'}:{os.environ['PATH']}"}
    run = Path(tempfile.mkdtemp(dir=image.parent)) / "run"
    try:
        began, used = time.perf_counter(), os.times()
        subprocess.run(["bash", "-ec", ". ./startup-hook.sh"], cwd=ROOT / detector, env=task, check=True)
        ready, since = time.perf_counter(), os.times()
        # a report a batch: the first line of metrics.jsonl is the first batch's
        subprocess.run(
            [
                *("python3", "model_def.py", "train", "const_fake.yaml", "--output-dir", run),
                *("--set", "searcher.max_length.batches=1", "--set", "min_validation_period.batches=0"),
            ],
            cwd=ROOT / detector,
            env=task,
            check=True,
            capture_output=True,
        )
        first = time.perf_counter()
    finally:
        shutil.rmtree(image)
        kept.rename(image)
    cpu = sum(getattr(since, of) - getattr(used, of) for of in ("children_user", "children_system"))
    return f"{ready - began:.0f}", f"{cpu:.0f}", f"{first - ready:.0f}", f"{first - began:.0f}"


if __name__ == "__main__":
    main()
