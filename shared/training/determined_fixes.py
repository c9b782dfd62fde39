"""Corrections for what a Determined 0.38.1 master does not do by itself. tests/test_determined_fixes.py shows each."""

from __future__ import annotations

import logging
import math
import time

from determined.experimental import client

logger = logging.getLogger(__name__)

SECONDS_FOR_A_REPORT = 10  # in which the master has what the trial reported
_BETWEEN_QUESTIONS = 0.05


def trial_is_stopping(trial_id: int, validated_at: int) -> bool:
    """Whether the searcher stopped the trial.

    `adaptive_asha` marks a trial as stopping in the master, and nothing signals the trial: without this question, all
    trials of a search train to the end. Determined sends a report in a thread of its own. If the question comes before
    the report, the answer comes with the next one. If that is a validation, the master counts it as another trial's,
    and begins one more trial for it, beyond max_concurrent_trials.

    Args:
        validated_at: batches of the last validation, which the master should know; -1 before the first.
    """
    until = time.monotonic() + SECONDS_FOR_A_REPORT
    try:
        while True:
            trial = client.get_trial(trial_id)
            if trial.state is not None and trial.state.name.startswith("STOPPING"):
                return True
            if _last_validation_of(trial) >= validated_at or time.monotonic() > until:
                return False
            time.sleep(_BETWEEN_QUESTIONS)
    except Exception as error:  # whatever the network does, it must not end the training
        logger.warning("the master could not be asked whether trial %d shall stop: %s", trial_id, error)
        return False


def last_validation(trial_id: int) -> int | None:
    """The batches of the last validation that the master knows of a trial; None without one.

    `det.get_cluster_info()` has no public name for it.
    """
    try:
        batches = _last_validation_of(client.get_trial(trial_id))
    except Exception as error:  # then a validation is repeated
        logger.warning("the master could not be asked for the validations of trial %d: %s", trial_id, error)
        return None
    return int(batches) if 0 <= batches < math.inf else None


def _last_validation_of(trial: client.Trial) -> float:
    """-1 without a validation."""
    reported = (trial.summary_metrics or {}).get("validation_metrics")
    return reported.get("batches", {}).get("last", math.inf) if reported else -1
