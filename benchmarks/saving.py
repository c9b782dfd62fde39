"""How long a training stands still for a checkpoint: written beside it, against Determined's own way in line.

One run of EfficientDet at 128 pixels, on images that it makes itself, saves after every few batches, in turn by the
project's loop and by Determined's own `_checkpoint` with the same callbacks. Reported are the medians of how long the
training stands still for a save, and of how long the batches after it take. `--upload` adds a wait to each, as for a
store that is so far away.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "efficientdet")]

from determined import pytorch
from interleaved import call_at_batch_end

from model_def import EfficientDetTrial
from shared.training import loop
from shared.training.processes import local_processes


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


class Uploaded(pytorch.PyTorchCallback):
    """Waits as long as an upload takes, and removes the checkpoint."""

    def __init__(self, storage: Path, seconds: float):
        self.storage, self.seconds = storage, seconds

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        time.sleep(self.seconds)
        shutil.rmtree(self.storage / "determined" / uuid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientdet_d6")
    parser.add_argument("--saves", type=int, default=7, help="of each way; the first of each warms up")
    parser.add_argument("--period", type=int, default=6, help="batches between two saves")
    parser.add_argument("--upload", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args()
    logging.getLogger("determined").setLevel(logging.ERROR)
    storage, code = Path(tempfile.mkdtemp()), tempfile.mkdtemp()
    os.environ["XDG_DATA_HOME"] = str(storage)  # where Determined stores checkpoints
    os.chdir(code)  # which it copies into each
    ways = {"beside": loop._Loop._checkpoint, "in_line": pytorch._PyTorchTrialController._checkpoint}
    stood = {way: [] for way in ways}
    after = {way: [] for way in ways}
    saves = itertools.count()
    ended = 0.0

    def save(self: loop._Loop, already_exiting: bool) -> None:
        nonlocal ended
        number = next(saves)
        way, other = ("beside", "in_line") if number % 2 else ("in_line", "beside")
        self.trial.saving.wait()  # what is left of the last one
        started = time.perf_counter()
        if number:
            after[other].append(started - ended)
        ways[way](self, already_exiting)
        ended = time.perf_counter()
        stood[way].append(ended - started)

    config = experiment(arguments)
    with (
        mock.patch.object(loop._Loop, "_checkpoint", save),
        local_processes() as (distributed, device),
        loop.trial_context(config, distributed, device) as context,
    ):
        trial = EfficientDetTrial(context)
        call_at_batch_end(trial, lambda: None)
        trial.local_callbacks["uploaded"] = Uploaded(storage, arguments.upload)
        loop.fit(trial, None, "none")
    parameters = sum(parameter.numel() for parameter in trial.plain_model.parameters())
    figures = {"model": arguments.model, "parameters": parameters, "upload_s": arguments.upload}
    for way in ways:
        figures[f"{way}_stands_still_s"] = round(statistics.median(stood[way][1 : arguments.saves]), 3)
        figures[f"{way}_batches_after_s"] = round(statistics.median(after[way][1 : arguments.saves]), 3)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
