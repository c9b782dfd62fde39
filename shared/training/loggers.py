"""Sends each line of metrics.jsonl to W&B and MLflow."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.config.file import flattened
from shared.durable import locked, write_file
from shared.errors import UserError
from shared.log import redacted, without_secrets
from shared.training.run_folder import RunFolder

# unless a variable is set; finish_timeout in seconds: the run's folder keeps what is not sent by then
_SETTINGS = {"silent": True, "console": "off", "finish_timeout": 120.0}


def check_login() -> None:
    """Raises UserError if wandb would ask for an API key."""
    import wandb

    if wandb.setup(settings=_settings()).settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "hyperparameters.loggers: wandb has no API key. Fix: run `wandb login`, or set WANDB_API_KEY, or "
            "WANDB_MODE=offline"
        )


def project_name(name: str) -> str:
    """The name without the characters that W&B forbids in a project's name."""
    return re.sub(r"[/\\#?%:]", "-", name)[:128]


class WandbRun:
    """A run of W&B. It has the name of the folder.

    Args:
        kept: the id of the run to continue; None for a new one.

    Attributes:
        id: None if W&B does not keep the run.
        place: where its numbers are, for a human.
    """

    def __init__(self, config: dict[str, Any], project: str, folder: Path, kept: str | None):
        import wandb

        ours = {
            "WANDB_PROJECT": ("project", project_name(project)),
            "WANDB_DIR": ("dir", str(folder)),
            "WANDB_NAME": ("name", folder.name),
            "WANDB_RUN_ID": ("id", kept),
            "WANDB_RESUME": ("resume", "allow"),
        }
        self.run = wandb.init(
            **{key: os.environ.get(variable) or value for variable, (key, value) in ours.items()},
            config=config,
            allow_val_change=True,  # a continued run may have a greater length
            reinit="create_new",  # a program's own run is left alone
            settings=_settings(),
        )
        # W&B's own step only grows: what a killed run has trained after its checkpoint would be refused
        self.run.define_metric("*", step_metric="batches")
        self.id = None if self.run.disabled else self.run.id
        self.place = self.run.url or str(Path(self.run.dir).parent)  # offline, what `wandb sync` takes

    def report(self, batches: int, values: dict[str, float]) -> None:
        self.run.log({**values, "batches": batches})

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        """The best validation's numbers, and the picture of the last one, after `batches`."""
        import wandb

        self.run.summary.update(best)
        if picture is not None:
            self.run.log({picture.stem: wandb.Image(str(picture)), "batches": batches})

    def finish(self, code: int) -> None:
        """The program exits with the status `code`."""
        self.run.finish(exit_code=code)


def _settings() -> Any:
    import wandb

    ours = {key: value for key, value in _SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ}
    if any(redacted(argument) != argument for argument in sys.argv):
        ours["x_disable_meta"] = True  # the command line is a part of it
    return wandb.Settings(**ours)


# MLflow's limits
_OF_A_NAME, _OF_A_VALUE, _PARAMS, _METRICS = 250, 6000, 100, 1000


class MlflowRun:
    """A run of MLflow, see `WandbRun`."""

    def __init__(self, config: dict[str, Any], project: str, folder: Path, kept: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or None
        with _few_retries(), contextlib.ExitStack() as stack:
            if uri is None:
                # MLflow's own default is SQLite, for which mlflow-skinny has no package
                uri = (folder.parent / "mlruns").as_uri()
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                stack.enter_context(locked(folder.parent / ".mlruns.lock"))  # trials that begin at once
            self.client = MlflowClient(uri)
            run = self._kept(os.environ.get("MLFLOW_RUN_ID") or kept)
            if run is None:
                run = self.client.create_run(self._experiment(project), run_name=folder.name)
            self.id = run.info.run_id
            self.place = f"{redacted(uri)}, experiment {run.info.experiment_id}, run {self.id}"
            # MLflow lets no parameter change: what the run began with stays
            params = [Param(key, value) for key, value in _flat(config).items() if key not in run.data.params]
            for begin in range(0, len(params), _PARAMS):
                self.client.log_batch(self.id, params=params[begin : begin + _PARAMS])

    def report(self, batches: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(name), value, now, batches) for name, value in values.items()]
        for begin in range(0, len(metrics), _METRICS):
            self.client.log_batch(self.id, metrics=metrics[begin : begin + _METRICS])

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        self.report(batches, best)
        if picture is not None:
            self.client.log_artifact(self.id, str(picture))

    def finish(self, code: int) -> None:
        # above 128 a signal stopped it
        self.client.set_terminated(self.id, "FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED")

    def _kept(self, run_id: str | None) -> Any:
        """The run of that id, to continue; None if it no longer exists."""
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


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """`{"searcher.metric": "bbox_mAP", …}`: the leaves of the config as text."""
    leaves = {}
    for name, value in flattened(config).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        leaves[_allowed(name.replace("/", "_"))] = text[:_OF_A_VALUE]
    return leaves


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Fails within seconds if a server does not answer: by default MLflow retries for minutes."""
    key = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if key in os.environ:
        yield
        return
    os.environ[key] = "2"
    try:
        yield
    finally:
        del os.environ[key]


logger = logging.getLogger(__name__)

_RUNS: dict[str, type] = {"wandb": WandbRun, "mlflow": MlflowRun}
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_SECONDS_AT_END = 150  # to send the rest
_OF_A_MASTER = ("environment", "checkpoint_storage")  # sections that have no effect off a cluster


def check_loggers(names: Iterable[str]) -> None:
    """Raises UserError if the package or the login of a logger is missing. Does not import torch."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # the latter for a folder named wandb
            raise UserError(
                f"hyperparameters.loggers: {name} is not installed. Fix: python3 -m pip install {_PACKAGES[name]}, or "
                "remove it"
            )
    if "wandb" in names and int(os.environ.get("RANK", 0)) == 0:
        check_login()


class Loggers:
    """The loggers of a run; only the chief opens any.

    Each has its own thread. The training neither waits for a server nor stops at its errors: the first error is a
    warning."""

    def __init__(self) -> None:
        self._opened: list[tuple[str, Any, Any]] = []  # names, runs and threads
        self._warned: set[str] = set()

    def open(self, names: Iterable[str], config: dict[str, Any], folder: RunFolder, resumes: bool) -> None:
        """Begins a run in each, or continues the one that the folder names. A run that resumes omits a logger that
        cannot be opened.

        Raises:
            UserError: a package or a login is missing, or a run cannot begin.
        """
        from shared.training.saving import Background  # the command line is checked without torch

        if not names:
            return
        check_loggers(names)
        project = str(config.get("name") or folder.path.parent.name or "runs")
        shown = without_secrets({key: value for key, value in config.items() if key not in _OF_A_MASTER})
        ids = json.loads(folder.loggers.read_text()) if folder.loggers.exists() else {}
        for name in dict.fromkeys(names):
            try:
                run = _RUNS[name](shown, project, folder.path, ids.get(name))
            except Exception as error:  # of the network, of the server, of a file system
                if not resumes:
                    self.finish(1)
                    raise UserError(
                        f"hyperparameters.loggers: {name} cannot begin a run ({_in_a_line(error)}). Fix: remove it"
                        f"{', or set WANDB_MODE=offline' if name == 'wandb' else ''}"
                    ) from error
                logger.warning("%s does not continue its run: %s", name, _in_a_line(error))
                continue
            self._opened.append((name, run, Background(f"logger {name}", functools.partial(self._warn, name))))
            ids[name] = run.id
            logger.info("%s: %s", name, run.place)
        write_file(folder.loggers, json.dumps(ids))

    def report(self, batches: int, split: str, metrics: dict[str, float | None]) -> None:
        """Sends a line of metrics.jsonl, with its names below `train/` or `val/` and without null values."""
        values = {f"{split}/{name}": value for name, value in metrics.items() if value is not None}
        self._do(lambda run: run.report(batches, values))

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        """Sends the results of a whole training: numbers of the best validation, and the picture of the last one."""
        self._do(lambda run: run.conclude(batches, best, picture))

    def finish(self, code: int) -> None:
        """Ends the runs with the program's exit status."""
        self._do(lambda run: run.finish(code))
        for name, _, background in self._opened:
            if not background.wait(_SECONDS_AT_END):
                logger.warning("%s has not sent everything after %d s, and is stopped", name, _SECONDS_AT_END)
        self._opened = []

    def _do(self, call: Callable[[Any], None]) -> None:
        for _, run, background in self._opened:
            background.begin(functools.partial(call, run))

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._warned:  # metrics.jsonl has the numbers
            logger.warning("%s fails, and the training continues: %s", name, _in_a_line(error))
        self._warned.add(name)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        self.finish(code)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
