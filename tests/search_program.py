"""Stands in for a `model_def.py` in the tests of a search: `train` has a curve that follows from the hyperparameters,
and `search` searches with itself.

    python search_program.py train CONFIG --output-dir RUN [--resume last]
    python search_program.py search CONFIG OUTPUT JOBS [STORAGE]
"""

import fcntl
import json
import logging
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))


RANGES = {
    "lr": {"type": "log", "base": 10, "minval": -6.0, "maxval": -1.0},
    "opt": {"type": "categorical", "vals": ["sgd", "adamw"]},
}


def value_of(hyperparameters: dict) -> float:
    """In [0, 1]: the greatest with lr 0.001 and adamw."""
    distance = math.log10(hyperparameters["lr"]) + 3
    return math.exp(-(distance**2)) * (1.0 if hyperparameters.get("opt", "adamw") == "adamw" else 0.9)


def value_after(share: float, hyperparameters: dict) -> float:
    """What a validation after this share of the training reports."""
    return value_of(hyperparameters) * (1 - math.exp(-4 * share))


def share_of_better_points(hyperparameters: dict) -> float:
    """Of all that RANGES has."""
    draws = random.Random(0)
    points = [{"lr": 10 ** draws.uniform(-6, -1), "opt": draws.choice(["sgd", "adamw"])} for _ in range(2000)]
    return sum(value_of(point) > value_of(hyperparameters) for point in points) / len(points)


def train(config: dict, run: Path, resume: bool) -> None:
    hyperparameters, searcher = config["hyperparameters"], config["searcher"]
    if hyperparameters.get("diverges"):
        print("a line of the log\nerror: the loss is not finite since batch 3")
        sys.exit(1)
    stops = []
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("a")
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a run does: two in one folder are an error
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
    last, total = run / "checkpoints/last", searcher["max_time"]
    (run / "length.json").write_text(json.dumps({"batches": total, "batches_per_epoch": 10}))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"cores": sorted(os.sched_getaffinity(0)), **os.environ}))
    batch = int((last / "batches").read_text()) if resume else 0
    with (run / "metrics.jsonl").open("a") as metrics, (run / "batches.log").open("a") as log:
        while batch < total and not stops:
            time.sleep(config["seconds_a_batch"])
            batch += 1
            log.write(f"{batch}\n")
            log.flush()
            if batch % config["min_validation_period"]["batches"] == 0:
                value = value_after(batch / total, hyperparameters)
                report = {"batches": batch, "split": "val", "metrics": {"bbox_mAP": value}}
                metrics.write(json.dumps(report) + "\n")
                metrics.flush()
    last.mkdir(parents=True, exist_ok=True)
    (last / "batches").write_text(str(batch))
    sys.exit(143 if batch < total else 0)


def search(config: dict, output: Path, jobs: int, storage: str | None) -> None:
    from shared.errors import UserError
    from shared.search import search as module
    from shared.search import study
    from shared.search.searcher import parse_searcher

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    module._POLL, study._BEAT, study.SECONDS_OF_SILENCE = 0.05, 0.2, 3
    try:
        module.run_search(config, parse_searcher(config), output, [sys.executable, __file__], storage, jobs)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    given = yaml.safe_load(Path(sys.argv[2]).read_text())
    if sys.argv[1] == "train":
        train(given, Path(sys.argv[sys.argv.index("--output-dir") + 1]), "--resume" in sys.argv)
    else:
        search(given, Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] if len(sys.argv) > 5 else None)
