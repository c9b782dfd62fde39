"""A run in MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.redaction import redacted

# MLflow's limits
_OF_A_NAME, _OF_A_VALUE, _PARAMS, _METRICS = 250, 6000, 100, 1000


class MlflowRun:
    """
    Args:
        folder: of the run; its name is the run's.
        kept: the id of the run to go on with; None for a new one.

    Attributes:
        place: where its numbers are, for a human.
    """

    def __init__(self, config: dict[str, Any], project: str, folder: Path, kept: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or None
        with _few_retries(), contextlib.ExitStack() as stack:
            if uri is None:
                # MLflow's own default is SQLite, for which mlflow-skinny has no package
                uri = (folder.parent / "mlruns").as_uri()
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                stack.enter_context(_alone(folder.parent / ".mlruns.lock"))
            self.client = MlflowClient(uri)
            run = self._kept(os.environ.get("MLFLOW_RUN_ID") or kept)
            if run is None:
                run = self.client.create_run(self._experiment(project), run_name=folder.name)
            self.id = run.info.run_id
            self.place = f"{redacted(uri)}, experiment {run.info.experiment_id}, run {self.id}"
            # MLflow lets no parameter change: what the run began with stays
            params = [Param(key, value) for key, value in _flat(config).items() if key not in run.data.params]
            for some in _chunks(params, _PARAMS):
                self.client.log_batch(self.id, params=some)

    def report(self, batches: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(name), value, now, batches) for name, value in values.items()]
        for some in _chunks(metrics, _METRICS):
            self.client.log_batch(self.id, metrics=some)

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        """The best validation's numbers, and the picture of the last one, after `batches`."""
        self.report(batches, best)
        if picture is not None:
            self.client.log_artifact(self.id, str(picture))

    def finish(self, code: int) -> None:
        """
        Args:
            code: the program's exit status; above 128 by a signal.
        """
        self.client.set_terminated(self.id, "FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED")

    def _kept(self, run_id: str | None) -> Any:
        """The run of that id, going on; None where it is no longer there."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage == "deleted":
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run

    def _experiment(self, name: str) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
        experiment = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name) if experiment is None else experiment.experiment_id


def metric_name(name: str) -> str:
    """A name of metrics.jsonl with its group, `val/bbox_AP/a cup & a spoon`, without what MLflow allows in none."""
    group, _, rest = name.partition("/")
    kind, slash, category = rest.partition("/")
    category = category.replace("/", "_")  # to MLflow a name is a path
    return _allowed(f"{group}/{kind}{slash}{'_' if category in ('.', '..') else category}")


def _allowed(name: str) -> str:
    return re.sub(r"[^/\w.\- :]", "_", name)[:_OF_A_NAME]


def _flat(config: dict[str, Any], before: str = "") -> dict[str, str]:
    """`{"searcher.metric": "bbox_mAP", …}`: the leaves of the config as text."""
    leaves: dict[str, str] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            leaves.update(_flat(value, f"{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            leaves[_allowed(name.replace("/", "_"))] = text[:_OF_A_VALUE]
    return leaves


def _chunks(items: list, size: int) -> Iterator[list]:
    rest = iter(items)
    while some := list(itertools.islice(rest, size)):
        yield some


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """A server that does not answer is said within seconds: MLflow asks it for minutes."""
    key = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if key in os.environ:
        yield
        return
    os.environ[key] = "2"
    try:
        yield
    finally:
        del os.environ[key]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Trials that begin at once would each make the experiment."""
    with lock.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
