"""Stands in for a `model_def.py` in the tests of a search: `train` has a curve that follows from the hyperparameters,
and `search` searches with itself.

    python search_program.py train CONFIG --output-dir RUN --resume auto
    python search_program.py search CONFIG OUTPUT JOBS [STORAGE]
"""

import argparse
import dataclasses
import errno
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

from shared.training.run_folder import RunFolder

RANGES = {
    "lr": {"type": "log", "base": 10, "minval": -6.0, "maxval": -1.0},
    "opt": {"type": "categorical", "vals": ["sgd", "adamw"]},
}


def value_of(hyperparameters: dict) -> float:
    """In [0, 1], greatest at lr 0.001 with adamw."""
    distance = math.log10(hyperparameters["lr"]) + 3
    return math.exp(-(distance**2)) * (1.0 if hyperparameters.get("opt", "adamw") == "adamw" else 0.9)


def value_after(share: float, hyperparameters: dict) -> float:
    """The validation metric after this share of the training."""
    return value_of(hyperparameters) * (1 - math.exp(-4 * share))


def share_of_better_points(hyperparameters: dict) -> float:
    """The share of all points in RANGES that are better."""
    draws = random.Random(0)
    points = [{"lr": 10 ** draws.uniform(-6, -1), "opt": draws.choice(["sgd", "adamw"])} for _ in range(2000)]
    return sum(value_of(point) > value_of(hyperparameters) for point in points) / len(points)


def train(config: dict, run: Path) -> None:
    """A run whose curve is a formula. The config may hold besides:

    full_disk: fail as a run does on a full disk.
    checkpoint_at: save a checkpoint at this batch.
    hold_at: wait there at the first start, for a signal or until the file `held` is deleted.
    in_step: wait for the search after each validation.
    """
    hyperparameters, searcher = config["hyperparameters"], config["searcher"]
    if hyperparameters.get("diverges"):
        print("a line of the log\nerror: the loss is not finite since batch 3")
        sys.exit(1)
    if config.get("full_disk"):
        print(f"error: {run} cannot be written ({os.strerror(errno.ENOSPC)}; 0 MiB are free there)")
        sys.exit(1)
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
    folder = RunFolder(run)
    folder.take()
    last, total = folder.checkpoints / "last", searcher["max_time"]
    batch = int((last / "batches").read_text()) if last.exists() else 0
    folder.forget_metrics_after(batch or -1)
    folder.write_config(config)
    folder.write_length(total, 10)
    (run / "environment.json").write_text(json.dumps({"cores": sorted(os.sched_getaffinity(0)), **os.environ}))

    def save() -> None:
        new = folder.saving / "last"
        new.mkdir(parents=True)
        (new / "batches").write_text(str(batch))
        folder.keep(new, is_best=False)

    with (run / "batches.log").open("a") as log:
        while batch < total and not stops:
            time.sleep(config["seconds_a_batch"])
            batch += 1
            log.write(f"{batch}\n")
            log.flush()
            if batch % config["min_validation_period"]["batches"] == 0:
                folder.append_report(batch, "val", {"bbox_mAP": value_after(batch / total, hyperparameters)})
                while config.get("in_step") and not stops and not is_recorded(run, batch, total):
                    time.sleep(0.01)
            if batch == config.get("checkpoint_at"):
                save()
            if batch == config.get("hold_at") and not (run / "held").exists():
                (run / "held").touch()
                while not stops and (run / "held").exists():
                    time.sleep(0.01)
    save()
    sys.exit(143 if batch < total else 0)


def is_recorded(run: Path, batch: int, total: int) -> bool:
    """Whether the search has read the validation of a batch. Its journal has Optuna's numbers, which are the folders'
    names as long as no trial is taken over."""
    journal = (run.parent.parent / "search.journal").read_text()
    return f'"trial_id":{run.name},"step":{batch * 10**6 // total},' in journal


def experiment_from(config: dict):
    """The experiment of a config with keys for this program, which experiment files cannot have."""
    from shared.config.experiment import Sections, experiment_of

    return dataclasses.replace(experiment_of(config, {}, Sections()), config=config)


def search(config: dict, output: Path, jobs: int, storage: str | None) -> None:
    from shared.errors import UserError
    from shared.search import search as module
    from shared.search import study

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    module.SECONDS_BETWEEN_LOOKS, study.SECONDS_BETWEEN_HEARTBEATS, study.SECONDS_OF_SILENCE = 0.05, 0.2, 3
    arguments = argparse.Namespace(config="config.yaml", output_dir=output, storage=storage, jobs=jobs, status=False)
    try:
        module.search(None, experiment_from(config), arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    given = yaml.safe_load(Path(sys.argv[2]).read_text())
    if sys.argv[1] == "train":
        assert sys.argv[-2:] == ["--resume", "auto"]
        train(given, Path(sys.argv[sys.argv.index("--output-dir") + 1]))
    else:
        search(given, Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] if len(sys.argv) > 5 else None)
