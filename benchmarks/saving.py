"""How long training waits for a checkpoint that the engine writes in the background, and for one in line.

EfficientDet trains at 128 pixels on synthetic images. In turns, the engine saves, and `torch.save` writes the same
state while the training waits. The wait of a batch without a save is subtracted.
"""

import statistics
import time

import torch
from command_line import main, scratch_folder, trial_class_of
from side_by_side import BenchmarkRun, Measured, config_of, local_context, train_until_measured

from shared.training.saving import checkpoint_state

WAYS = ("background", "in_line")  # the engine saves after every second period


def saving(model: str = "tf_efficientdet_d6", saves: int = 7, period: int = 6, upload: float = 0.0) -> dict:
    """
    model: whose state is saved
    saves: of each way; the first of each warms up
    period: batches between two saves
    upload: seconds that each save takes longer, as for a store that is far away
    """
    waits = {way: [] for way in (*WAYS, "none")}

    class Stored(BenchmarkRun):
        def store(self, *arguments) -> None:
            super().store(*arguments)
            time.sleep(upload)

    class Watched(trial_class_of("efficientdet")):
        __module__ = "model_def"  # whose folder a checkpoint copies
        ended, way = time.perf_counter(), "none"

        def before_batch(self, number: int) -> None:
            waits[self.way].append(time.perf_counter() - self.ended)
            self.way = "none"
            super().before_batch(number)

        def after_batch(self, number: int) -> None:
            super().after_batch(number)
            self.ended = time.perf_counter()
            turn, rest = divmod(number + 1, period)
            if rest:
                return
            if turn > 2 * saves:
                raise Measured
            self.way = WAYS[turn % 2]
            if self.way == "in_line":
                training = self.training_state()
                state = checkpoint_state(self.context, self.plain_model, self.scaler, training)
                torch.save(state, f"{folder}/in_line")
                time.sleep(upload)

    options = {"global_batch_size": 2, "model": model, "pretrained": "none", "input_size": 128, "opt": "adamw"}
    options |= {"lr": 0.0001, "model_ema_decay": 0.9998, "warmup_epochs": 0, "cooldown_epochs": 0}
    config = config_of(None, options) | {"min_checkpoint_period": {"batches": 2 * period}, "scheduling_unit": 10**6}
    with local_context(config) as context, scratch_folder() as folder:
        trial = Watched(context)
        train_until_measured(trial, folder, Stored)
    without = statistics.median(waits["none"])
    return {f"{way}_waits_s": round(statistics.median(waits[way][1:]) - without, 3) for way in WAYS}


if __name__ == "__main__":
    main(__doc__, saving)
