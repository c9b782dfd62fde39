"""What Determined 0.38.1 does not do by itself, made good; what its training loop lacks is in loop.py.

Each says what goes wrong without it. The README's section "On a cluster" tells users;
tests/test_determined_fixes.py fails where one is taken away.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from typing import Any

import numpy as np
import torch
from determined.experimental import client
from determined.pytorch import PyTorchCallback, PyTorchTrialContext
from torch import nn

from shared.config.schema import SearcherMetric

logger = logging.getLogger(__name__)

SECONDS_FOR_A_REPORT = 10  # in which the master has what the trial reported
_BETWEEN_QUESTIONS = 0.05


def wrap_model(context: PyTorchTrialContext, model: nn.Module, find_unused_parameters: bool) -> nn.Module:
    """`context.wrap_model`, with DDP's `find_unused_parameters`.

    Determined passes no option on to DDP, and a model that leaves parameters unused in some steps then ends in
    "Expected to have finished reduction in the prior iteration".
    """
    if find_unused_parameters:
        ddp = context._PyTorchDistributedDataParallel  # no public name reaches DDP's arguments
        context._PyTorchDistributedDataParallel = functools.partial(ddp, find_unused_parameters=True)
    return context.wrap_model(model)


class PlainRandomState(PyTorchCallback):
    """A checkpoint that torch ≥ 2.6 can read back.

    Determined saves NumPy's random state as an array, and `torch.load` with its default `weights_only=True`
    refuses to unpickle one: every restart, and every pause and activation, ends in UnpicklingError. Here the
    state is saved as a tensor and numbers.
    """

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        algorithm, keys, position, has_gauss, gauss = checkpoint["rng_state"]["np_rng_state"]
        keys = torch.from_numpy(keys.astype(np.int64))
        checkpoint["rng_state"]["np_rng_state"] = [algorithm, keys, int(position), int(has_gauss), float(gauss)]

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        algorithm, keys, position, has_gauss, gauss = checkpoint["rng_state"]["np_rng_state"]
        keys = torch.as_tensor(keys).numpy().astype(np.uint32)
        checkpoint["rng_state"]["np_rng_state"] = (algorithm, keys, position, has_gauss, gauss)


def trial_is_stopping(trial_id: int, validated_at: int) -> bool:
    """Whether the searcher has decided that the trial shall end.

    `adaptive_asha` marks a trial as stopping in the master, and nothing tells the trial: without asking, all trials of
    a search train to the end. Determined sends a report on a thread of its own: one who asks before the master has it
    hears of the decision at the next one. If that is a validation, the master counts it as one more trial's, and begins
    another trial for it, beyond max_concurrent_trials.

    Args:
        validated_at: batches that were trained until the last validation, which the master is to know; -1 before the
            first.
    """
    until = time.monotonic() + SECONDS_FOR_A_REPORT
    try:
        while True:
            trial = client.get_trial(trial_id)
            if trial.state is not None and trial.state.name.startswith("STOPPING"):
                return True
            if _last_validation(trial) >= validated_at or time.monotonic() > until:
                return False
            time.sleep(_BETWEEN_QUESTIONS)
    except Exception as error:  # whatever the network does, it must not end the training
        logger.warning("the master could not be asked whether trial %d shall stop: %s", trial_id, error)
        return False


def _last_validation(trial: client.Trial) -> float:
    """The batches trained until the last validation that the master knows; -1 where it knows none."""
    reported = (trial.summary_metrics or {}).get("validation_metrics")
    return reported.get("batches", {}).get("last", math.inf) if reported else -1


class FiniteSearcherMetric(PyTorchCallback):
    """Keeps an undefined searcher metric from ending the whole search.

    One NaN or infinity as the searcher's metric puts an adaptive search, with all its trials, into ERROR. The
    master gets the metric's worst value instead. Must be the last callback that sees the metrics.
    """

    def __init__(self, metric: SearcherMetric):
        self.metric = metric

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        value = metrics.get(self.metric.name)
        if value is not None and not math.isfinite(float(value)):
            logger.warning("%s is %s; the searcher is told %s", self.metric.name, value, self.metric.worst)
            metrics[self.metric.name] = self.metric.worst
