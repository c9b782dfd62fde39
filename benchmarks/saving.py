"""How long training waits for a checkpoint that the engine writes in the background, and for one in line.

EfficientDet trains at 128 pixels on synthetic images. In turns, the engine saves, and `torch.save` writes the same
state while the training waits. The wait of a batch without a save is subtracted.
"""

import contextlib
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from command_line import main, trial_class_of
from side_by_side import BenchmarkRun, config_of, local_context, train_in

from shared.training.saving import checkpoint_state

WAYS = ("background", "in_line")  # the engine saves after every second period


class _Measured(Exception):
    """Both ways have their saves."""


def saving(model: str = "tf_efficientdet_d6", saves: int = 7, period: int = 6, upload: float = 0.0) -> dict:
    """
    model: whose state is saved
    saves: of each way; the first of each warms up
    period: batches between two saves
    upload: seconds that each save takes longer, as for a store that is far away
    """
    logging.getLogger("determined").setLevel(logging.ERROR)
    waits = {way: [] for way in (*WAYS, "none")}
    batches = {way: [] for way in WAYS}  # seconds of the batches until the next save

    class Stored(BenchmarkRun):
        def store(self, *arguments) -> None:
            super().store(*arguments)
            time.sleep(upload)

    class Watched(trial_class_of("efficientdet")):
        __module__ = "model_def"  # whose folder a checkpoint copies
        ended, saved_at, way = time.perf_counter(), 0.0, "none"

        def before_batch(self, number: int) -> None:
            now = time.perf_counter()
            waits[self.way].append(now - self.ended)
            if self.way != "none":
                self.saved_at, self.way = now, "none"
            super().before_batch(number)

        def after_batch(self, number: int) -> None:
            super().after_batch(number)
            self.ended = time.perf_counter()
            turn, rest = divmod(number + 1, period)
            if rest:
                return
            if turn > 1:
                batches[WAYS[(turn - 1) % 2]].append(self.ended - self.saved_at)
            if turn > 2 * saves:
                raise _Measured
            self.way = WAYS[turn % 2]
            if self.way == "in_line":
                training = self.training_state()
                state = checkpoint_state(self.context, self.plain_model, self.scaler, training)
                torch.save(state, f"{folder}/in_line")
                time.sleep(upload)

    options = {"global_batch_size": 2, "model": model, "pretrained": "none", "input_size": 128, "opt": "adamw"}
    options |= {"lr": 0.0001, "model_ema_decay": 0.9998, "warmup_epochs": 0, "cooldown_epochs": 0}
    config = config_of(None, options) | {"min_checkpoint_period": {"batches": 2 * period}, "scheduling_unit": 10**6}
    with local_context(config) as context, tempfile.TemporaryDirectory() as folder:
        trial = Watched(context)
        with contextlib.suppress(_Measured):
            train_in(trial, Path(folder), Stored)
    without = statistics.median(waits["none"])
    figures = {"model": model, "parameters": sum(p.numel() for p in trial.plain_model.parameters()), "upload_s": upload}
    for way in WAYS:
        figures[f"{way}_waits_s"] = round(statistics.median(waits[way][1:]) - without, 3)
        figures[f"{way}_batches_after_s"] = round(statistics.median(batches[way][1:]), 3)
    return figures


if __name__ == "__main__":
    main(__doc__, saving)
