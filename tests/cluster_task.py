"""A cluster's task without a master: its information, and a core context that keeps reports."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import determined as det
from determined import core
from determined.common import storage
from determined_master import handed_over

from shared.config.file import fixed_hyperparameters
from shared.training import processes, run

TRIAL_ID = 7


@dataclass
class Master:
    """The master's side of a trial.

    Attributes:
        reports: group, batches and metrics of each report.
        uploads: the number of reports at each upload of TensorBoard's files.
        stops_at: the searcher stops the trial after a validation at this batch.
        on_upload: called with the folder of each checkpoint when it is written.
    """

    folder: Path
    reports: list[tuple[str, int, dict]] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    stops_at: int | None = None
    on_upload: Callable[[Path], None] = lambda folder: None

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    def of(self, group: str) -> dict[int, dict]:
        return {batches: metrics for kind, batches, metrics in self.reports if kind == group}

    @property
    def has_stopped(self) -> bool:
        return any(batches == self.stops_at for batches in self.of("validation"))


class _Train(core.DummyTrainContext):
    def __init__(self, master: Master):
        super().__init__(master.tensorboard)
        self.master, self._trial_id = master, TRIAL_ID

    def _report_trial_metrics(self, group: str, steps_completed: int, metrics: dict, batch_metrics: Any = None) -> None:
        self.master.reports.append((group, steps_completed, dict(metrics)))

    def report_progress(self, progress: float) -> None:
        self.master.progress.append(progress)

    def upload_tensorboard_files(self, *_: Any) -> None:
        self.master.uploads.append(len(self.master.reports))


class _Checkpoints(core.DummyCheckpointContext):
    def __init__(self, master: Master, distributed: core.DistributedContext):
        super().__init__(distributed, storage.SharedFSStorageManager(str(master.folder / "checkpoints")))
        self.master = master

    @contextlib.contextmanager
    def restore_path(self, storage_id: str, *_: Any, **__: Any):
        yield self.master.folder / "checkpoints" / storage_id

    @contextlib.contextmanager
    def store_path(self, *arguments: Any, **named: Any):
        with super().store_path(*arguments, **named) as (path, storage_id):
            yield path, storage_id
        self.master.on_upload(path)
        self.master.checkpoints.append(self.master.folder / "checkpoints" / storage_id)


def become_a_task(
    monkeypatch: Any,
    folder: Path,
    config: dict,
    latest_checkpoint: str | None = None,
    steps_completed: int = 0,
    gpu_uuids: tuple[str, ...] = (),
    **of_the_master: Any,
) -> Master:
    """Makes this process a task of a trial: `config` comes with the defaults that a master fills in.

    Args:
        of_the_master: `stops_at` and `on_upload` of the `Master`.
    """
    config = handed_over(config)
    trial = det.TrialInfo(
        trial_id=TRIAL_ID,
        experiment_id=3,
        trial_seed=5,
        hparams=fixed_hyperparameters(config),
        config=config,
        steps_completed=steps_completed,
        trial_run_id=1,
        debug=False,
        inter_node_network_interface=None,
    )
    info = det.ClusterInfo(
        master_url="http://127.0.0.1:1",
        cluster_id="cluster",
        agent_id="agent",
        slot_ids=[0],
        task_id=f"3.{uuid.uuid4()}",
        allocation_id="3.1",
        session_token="",
        task_type="TRIAL",
        latest_checkpoint=latest_checkpoint,
        trial_info=trial,
        resources_info=SimpleNamespace(gpu_uuids=list(gpu_uuids)),
    )
    master = Master(folder, **of_the_master)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(det, "get_cluster_info", lambda: info)

    def init(distributed: core.DistributedContext, **_: Any) -> core.Context:
        return core.Context(
            distributed=distributed,
            checkpoint=_Checkpoints(master, distributed),
            preempt=core.DummyPreemptContext(distributed, core.PreemptMode.WorkersAskChief),
            train=_Train(master),
            searcher=core.DummySearcherContext(distributed),
            profiler=core.DummyProfilerContext(),
        )

    monkeypatch.setattr(processes.core, "init", init)

    def get_trial(trial_id: int) -> SimpleNamespace:
        state = SimpleNamespace(name="STOPPING_COMPLETED" if master.has_stopped else "ACTIVE")
        validations = {"batches": {"last": max(master.of("validation"), default=-1)}}
        return SimpleNamespace(state=state, summary_metrics={"validation_metrics": validations})

    monkeypatch.setattr(run.client, "get_trial", get_trial)
    (folder / "model").mkdir(exist_ok=True)  # the code that was submitted, which each checkpoint holds
    monkeypatch.setattr(det.constants, "MANAGED_TRAINING_MODEL_COPY", str(folder / "model"))
    monkeypatch.setattr(run, "SECONDS_BETWEEN_UPLOADS", 0.0)
    return master
