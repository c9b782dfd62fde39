"""The lines of metrics.jsonl, as they are written, in W&B and MLflow too."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.durable import write_file
from shared.errors import UserError
from shared.redaction import without_secrets
from shared.training.mlflow_run import MlflowRun
from shared.training.run_folder import RunFolder
from shared.training.wandb_run import WandbRun, check_login

logger = logging.getLogger(__name__)

_RUNS: dict[str, type] = {"wandb": WandbRun, "mlflow": MlflowRun}
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_SECONDS_AT_END = 150  # that a logger has to send what is left
_OF_A_MASTER = ("environment", "checkpoint_storage")  # sections that mean nothing here


def check_loggers(names: Iterable[str]) -> None:
    """Raises UserError where the package or the login of a logger is missing. Loads no torch."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # the latter for a folder that W&B has written
            raise UserError(
                f"hyperparameters.loggers: {name} is not installed; python3 -m pip install {_PACKAGES[name]}, or take "
                "it out"
            )
    if "wandb" in names and int(os.environ.get("RANK", 0)) == 0:
        check_login()


def keep_places() -> None:
    """Makes absolute what the environment says of places, before the working directory changes."""
    if "WANDB_DIR" in os.environ:
        os.environ["WANDB_DIR"] = os.path.abspath(os.environ["WANDB_DIR"])
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("sqlite:///") and uri != "sqlite:///:memory:":
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    elif uri and ":" not in uri and uri not in ("databricks", "databricks-uc", "uc"):
        os.environ["MLFLOW_TRACKING_URI"] = os.path.abspath(uri)


class Loggers:
    """Those of a run, of which the chief alone opens any. What goes wrong with one after that is a warning."""

    def __init__(self) -> None:
        self._opened: list[_Background] = []

    def open(self, names: Iterable[str], config: dict[str, Any], folder: RunFolder, goes_on: bool) -> None:
        """Begins a run in each, or goes on with the one that the folder names.

        Args:
            goes_on: the training goes on from a checkpoint; then a logger that cannot be opened ends nothing.

        Raises:
            UserError: a package or a login is missing, or a run cannot be begun.
        """
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
                if not goes_on:
                    self.finish(1)
                    raise UserError(
                        f"hyperparameters.loggers: {name} cannot begin a run ({_in_a_line(error)}); take it out to "
                        f"train without{', or set WANDB_MODE=offline' if name == 'wandb' else ''}"
                    ) from error
                logger.warning("%s does not go on with its run: %s", name, _in_a_line(error))
                continue
            self._opened.append(_Background(name, run))
            ids[name] = run.id
            logger.info("%s: %s", name, run.place)
        write_file(folder.loggers, json.dumps(ids))

    def report(self, batches: int, split: str, metrics: dict[str, float | None]) -> None:
        """A line of metrics.jsonl: its names below `train/` or `val/`; what is null there is left out."""
        values = {f"{split}/{name}": value for name, value in metrics.items() if value is not None}
        for each in self._opened:
            each.do(lambda run: run.report(batches, values))

    def conclude(self, batches: int, best: dict[str, float], picture: Path | None) -> None:
        """The end of a whole training, after `batches`.

        Args:
            best: numbers of the best validation, by the names that they are to have.
            picture: of the last one; None where there is none.
        """
        for each in self._opened:
            each.do(lambda run: run.conclude(batches, best, picture))

    def finish(self, code: int) -> None:
        """Ends the runs with the program's exit status; once."""
        for each in self._opened:
            each.do(lambda run: run.finish(code))
        for each in self._opened:
            each.end()
        self._opened = []

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        self.finish(code)


class _Background:
    """A logger's run with a thread of its own: the training does not wait for a server, nor end by its errors."""

    def __init__(self, name: str, run: Any):
        self.name, self.run = name, run
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._has_warned = False
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[Any], None]) -> None:
        self._calls.put(call)

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join(_SECONDS_AT_END)
        if self._thread.is_alive():
            logger.warning("%s has not sent all after %d s; the rest is left", self.name, _SECONDS_AT_END)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call(self.run)
            except Exception as error:  # whatever it is, the training goes on, and metrics.jsonl has the numbers
                if not self._has_warned:
                    logger.warning("%s fails, and the training goes on: %s", self.name, _in_a_line(error))
                self._has_warned = True


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
