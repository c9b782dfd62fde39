"""Fixes of Determined's faults. tests/cluster shows them on a real master."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from shared.config.schema import SearcherMetric
from shared.training import run
from shared.training.run import trial_is_stopping
from shared.training.validation import Validation


def answer(state, validated_at=None):
    """The master's record of a trial; None without a validation."""
    validations = {} if validated_at is None else {"validation_metrics": {"batches": {"last": validated_at}}}
    return SimpleNamespace(state=SimpleNamespace(name=state), summary_metrics=validations)


@pytest.mark.parametrize(("state", "stops"), [("STOPPING_COMPLETED", True), ("ACTIVE", False)])
def test_the_master_is_asked_whether_the_searcher_has_stopped_the_trial(monkeypatch, state, stops):
    monkeypatch.setattr(run.client, "get_trial", lambda trial_id: answer(state, 20))
    assert trial_is_stopping(7, validated_at=20) is stops


@pytest.mark.parametrize("before", [None, 20])
def test_the_master_s_answer_counts_when_it_has_the_last_validation(monkeypatch, before):
    answers = [answer("ACTIVE", before), answer("ACTIVE", before), answer("STOPPING_COMPLETED", 40)]
    monkeypatch.setattr(run.client, "get_trial", lambda trial_id: answers.pop(0))
    assert trial_is_stopping(7, validated_at=40) is True


def test_the_wait_for_the_master_to_have_a_report_is_short(monkeypatch):
    monkeypatch.setattr(run, "SECONDS_FOR_A_REPORT", 0.1)
    monkeypatch.setattr(run.client, "get_trial", lambda trial_id: answer("ACTIVE", 20))
    assert trial_is_stopping(7, validated_at=40) is False


def test_a_master_that_does_not_answer_ends_nothing(monkeypatch, caplog):
    def unreachable(trial_id):
        raise ConnectionError("no route")

    monkeypatch.setattr(run.client, "get_trial", unreachable)
    assert trial_is_stopping(7, validated_at=-1) is False
    assert "no route" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_an_undefined_searcher_metric_is_reported_as_its_worst_value(value):
    validation = Validation(4, {"bbox_mAP": value, "bbox_mAP_50": 0.5, "bbox_mAP_l": math.nan}, {}, [])
    reported = validation.for_master(SearcherMetric("bbox_mAP", smaller_is_better=False))
    assert reported == {"bbox_mAP": 0.0, "bbox_mAP_50": 0.5}


def test_a_defined_metric_is_left_alone():
    validation = Validation(4, {"bbox_mAP": 0.25}, {}, [])
    assert validation.for_master(SearcherMetric("bbox_mAP", smaller_is_better=False)) == {"bbox_mAP": 0.25}
