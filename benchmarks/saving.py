"""How long a training stands still for a checkpoint: written beside it, against in line.

One run of EfficientDet at 128 pixels, on images that it makes itself, saves after every few batches, in turn beside the
training and in line. It reports the medians of how long the training stands still for a save, and of how long the
batches after it take. `--upload` adds a wait to each, as for a remote store.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "efficientdet")]

from model_def import EfficientDetTrial
from shared.config.schema import SearcherMetric
from shared.training.background import Background
from shared.training.context import trial_context
from shared.training.engine import train
from shared.training.local_run import LocalRun
from shared.training.loggers import Loggers
from shared.training.processes import local_processes
from shared.training.run_folder import RunFolder


def experiment(arguments: argparse.Namespace) -> dict:
    return {
        "data": {"backend": "fake", "workers": 0},
        "hyperparameters": {
            "global_batch_size": 2,
            "model": arguments.model,
            "pretrained": "none",
            "input_size": 128,
            "opt": "adamw",
            "lr": 0.0001,
            "model_ema_decay": 0.9998,
            "warmup_epochs": 0,
            "cooldown_epochs": 0,
        },
        "searcher": {"max_length": {"batches": arguments.period * (2 * arguments.saves + 2)}, "metric": "bbox_mAP"},
        "min_checkpoint_period": {"batches": arguments.period},
        "scheduling_unit": 10**6,
        "checkpoint_policy": "none",
    }


class Timed(EfficientDetTrial):
    """Notes when batches begin and end."""

    def __init__(self, *arguments: Any, **named: Any):
        self.begun: list[float] = []
        self.ended: list[float] = []
        super().__init__(*arguments, **named)

    def before_batch(self, number: int) -> None:
        self.begun.append(time.perf_counter())
        super().before_batch(number)

    def after_batch(self, number: int) -> None:
        super().after_batch(number)
        self.ended.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientdet_d6")
    parser.add_argument("--saves", type=int, default=7, help="of each way; the first of each warms up")
    parser.add_argument("--period", type=int, default=6, help="batches between two saves")
    parser.add_argument("--upload", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args()
    begin, number = Background.begin, itertools.count()

    def save(background: Background, work: Callable[[], None]) -> None:
        begin(background, lambda: (work(), time.sleep(arguments.upload)))
        if next(number) % 2:
            background.wait()

    config, folder = experiment(arguments), RunFolder(Path(tempfile.mkdtemp()))
    with (
        mock.patch.object(Background, "begin", save),
        local_processes() as processes,
        trial_context(config, *processes) as context,
    ):
        trial = Timed(context)
        folder.prepare(ROOT / "efficientdet")
        train(trial, LocalRun(folder, Loggers(), SearcherMetric("bbox_mAP", False), "none", is_chief=True))
    shutil.rmtree(folder.path)
    parameters = sum(parameter.numel() for parameter in trial.plain_model.parameters())
    figures = {"model": arguments.model, "parameters": parameters, "upload_s": arguments.upload}
    saves = range(arguments.period, len(trial.begun), arguments.period)  # the last one is that of the end
    for way, first in (("beside", 0), ("in_line", 1)):
        stood = [trial.begun[at] - trial.ended[at - 1] for at in saves[first::2]][1:]
        after = [(trial.ended[at + arguments.period - 1] - trial.begun[at]) for at in saves[first::2]][1:-1]
        figures[f"{way}_stands_still_s"] = round(statistics.median(stood), 3)
        figures[f"{way}_batches_after_s"] = round(statistics.median(after), 3)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
