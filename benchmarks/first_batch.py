"""From the command to the first trained batch, with a warm cache: what a user waits for at each start.

    python3 benchmarks/first_batch.py --data /data/bccd

Each detector's `bccd.yaml` on 2 cores, its report of the first batch awaited, in several turns; the first one, which
parses the annotations, is left out. Wall seconds, and those that the CPU was busy with the command's processes (user
and system), which say more on a busy machine.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
DETECTORS = ("efficientdet", "mmdetection", "detectron2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/data/bccd"), help="default /data/bccd")
    parser.add_argument("--only", choices=DETECTORS, nargs="+", default=DETECTORS, help="default all")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    rows = []
    for detector in given.only:
        first_batch(detector, given.data.absolute())
        turns = [first_batch(detector, given.data.absolute()) for _ in range(given.turns)]
        rows.append([detector, *(statistics.median(column) for column in zip(*turns, strict=True))])
    print(tabulate(rows, headers=["", "wall s", "CPU s"], floatfmt=".1f"))


def first_batch(detector: str, data: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one start, which is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(run)]
        command += ["--set", "scheduling_unit=1"]
        for split in ("train", "val"):
            paths = f"{{annotations: {data / 'annotations' / split}.json, images: {data / 'images'}}}"
            command += ["--set", f"data.{split}={paths}"]
        with Path(folder, "log").open("w+") as log:
            started = time.monotonic()
            process = psutil.Popen(command, cwd=ROOT / detector, stdout=log, stderr=subprocess.STDOUT)
            while not (run / "metrics.jsonl").exists():
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{' '.join(command[:3])}: exit status {process.returncode}\n{log.read()[-2000:]}")
                time.sleep(0.02)
            seconds = time.monotonic() - started
            family = [process, *process.children(recursive=True)]
            busy = sum(sum(each.cpu_times()[:2]) for each in family)
            for each in family:
                each.kill()
            process.wait()
    return seconds, busy


if __name__ == "__main__":
    main()
