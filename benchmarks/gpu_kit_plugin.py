"""A plugin of pytest for `gpu_kit.sh run tests`: the most telling tests first, and a record of each as it ends.

GPU_KIT_RECORD is a file of JSON lines, one per test when the tests are collected (`not run`) and one when it ends.
After GPU_KIT_DEADLINE, in seconds since 1970, no test starts.
"""

import json
import os
import time
from pathlib import Path

import pytest

from shared.durable import append_line

RECORD, DEADLINE = Path(os.environ["GPU_KIT_RECORD"]), float(os.environ["GPU_KIT_DEADLINE"])
NO_TIME = "no time was left"
FIRST = ("copies", "operations", "half_precision", "steady", "arrive", "same_bits", "evaluates", "two_processes")


def note(test, outcome, seconds=0.0, measured=(), reason=None):
    line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "measured": dict(measured)}
    append_line(RECORD, json.dumps({**line, **({"reason": reason} if reason else {})}))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, word in enumerate(FIRST) if word in item.nodeid), len(FIRST)))
    for item in items:
        note(item.nodeid, "not run", reason=NO_TIME)


def pytest_runtest_setup(item):
    if time.time() > DEADLINE:
        pytest.skip(NO_TIME)


def pytest_runtest_logreport(report):
    if report.when != "call" and not (report.when == "setup" and not report.passed) and not report.failed:
        return
    reason = None
    if report.skipped:
        reason = report.longrepr[-1].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
    elif report.failed:
        reason = report.longreprtext[-2000:]
    outcome = "not run" if reason == NO_TIME else report.outcome
    note(report.nodeid, outcome, report.duration, report.user_properties, reason)
