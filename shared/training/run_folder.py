"""The folder of a run off the cluster, which holds everything that the run writes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import IO, Any

import yaml

from shared import durable
from shared.errors import UserError, unwritable_as_error
from shared.log import redact_yaml_files, without_secrets

OF_THE_RUN = ("last", "best", "auto")  # what --resume may say of the folder's own checkpoints
_SOURCES = (".py", ".yaml", ".yml", ".sh", ".md", ".jinja")


class RunFolder:
    """The layout of `--output-dir`: metrics.jsonl, config.yaml, length.json (in batches), checkpoints/best and last,
    tensorboard/, code/, labels.png, predictions.png, report.html and .json. detections.npz is of the best validation.
    loggers.json has the ids of its runs in W&B and MLflow. `requeue` is there while a run that a signal stopped waits
    for its next start."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / "config.yaml"
        self.length = self.path / "length.json"
        self.tensorboard = self.path / "tensorboard"
        self.labels = self.path / "labels.png"
        self.predictions = self.path / "predictions.png"
        self.loggers = self.path / "loggers.json"
        self.detections = self.path / "detections.npz"
        self.report = self.path / "report.html"
        self.code = self.path / "code"
        self.checkpoints = self.path / "checkpoints"
        self.saving = self.checkpoints / ".saving"
        self.received = self.path / ".received"  # from another machine, or a store
        self.requeue = self.path / "requeue"  # a signal stopped the run: start it again
        self._lock = self.path / ".lock"
        self.of_one_machine = (self.code.name, self.saving.name, self.received.name, self._lock.name)
        self._locked: IO | None = None

    def take(self) -> None:
        """Locks the folder for this process, until `free` or its exit. Raises UserError if another process has it."""
        with unwritable_as_error(f"--output-dir: {self.path}", "give another folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = durable.try_lock(self._lock)
        if lock is None:
            raise UserError(
                f"--output-dir: another process uses {self.path}. Fix: wait for its run, or name another folder"
            )
        self._locked = lock

    def is_free(self) -> bool:
        """Whether no process has locked the folder."""
        return not durable.is_locked(self._lock)

    def total_batches(self) -> int:
        """The length of the whole training."""
        return json.loads(self.length.read_text())["batches"]

    def free(self) -> None:
        """Unlocks the folder."""
        if self._locked is not None:
            self._locked.close()

    def checkpoints_to_resume(self, which: str) -> list[Path]:
        """The run's checkpoints for `--resume last`, `best` or `auto`. The first complete one counts."""
        # a run killed in its first save may have `best` alone: `last` would be the same
        names = ("best",) if which == "best" else ("last", "best")
        found = [path for name in names if (path := self.checkpoints / name).exists()]
        if not found and which != "auto":
            raise UserError(
                f"--resume {which}: {self.path} has no checkpoint yet. Fix: run without --resume, or with --resume auto"
            )
        return found

    def prepare(self, source: Path) -> None:
        """Makes the folders, deletes what a killed run left unfinished, and copies the code in `source`."""
        durable.delete_unfinished(self.path)
        self.requeue.unlink(missing_ok=True)
        for leftover in (self.saving, self.code, self.received):
            shutil.rmtree(leftover, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _copy_sources(source, self.code)
        redact_yaml_files(self.code)  # each checkpoint has a copy of them

    def restore_interrupted_rename(self) -> None:
        """Restores a checkpoint that a run killed in `keep` left under another name."""
        for name in ("best", "last"):
            durable.restore_folder(self.checkpoints / name)

    def keep(self, new: Path, is_best: bool) -> None:
        """Makes the checkpoint folder `new` the last one, and a copy of it the best one, once all is on the disk."""
        if is_best:
            # before `last`: after a kill in between, the resumed run comes by here again
            copy = self.saving / "best"
            shutil.copytree(new, copy)  # no links: damage to one must leave the other
            durable.replace_folder(copy, self.checkpoints / "best")
        durable.replace_folder(new, self.checkpoints / "last")

    def adopt_received(self) -> None:
        """Replaces this machine's files of the run by those in `received`. `last` comes at the end: after a kill in
        between, the next start copies them again."""
        new = self.received / self.checkpoints.name
        for path in sorted(self.received.iterdir()):
            if path.is_dir() and path != new:
                durable.replace_folder(path, self.path / path.name)
            elif path.is_file():
                durable.write_file(self.path / path.name, path.read_bytes())
        self.checkpoints.mkdir(exist_ok=True)
        shutil.rmtree(self.checkpoints / "best", ignore_errors=True)
        for name in ("best", "last"):
            if (new / name).exists():
                durable.replace_folder(new / name, self.checkpoints / name)
        shutil.rmtree(self.received)

    def write_config(self, config: dict[str, Any]) -> None:
        durable.write_file(self.config, yaml.safe_dump(without_secrets(config), sort_keys=False))

    def write_length(self, batches: int, batches_per_epoch: int) -> None:
        durable.write_file(self.length, json.dumps({"batches": batches, "batches_per_epoch": batches_per_epoch}))

    def append_report(self, batches: int, split: str, metrics: dict[str, float | None]) -> None:
        """Appends a line to metrics.jsonl. `metrics` has None for nan."""
        durable.append_line(self.metrics, json.dumps({"batches": batches, "split": split, "metrics": metrics}))

    def reports(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to one that a kill cut off."""
        found = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in self.metrics.read_bytes().splitlines():
                found.append(json.loads(line))
        return found

    def validation_after(self, batches: int) -> dict[str, Any] | None:
        """The report of the validation after `batches`; None without one."""
        return next((r for r in self.reports() if (r["split"], r["batches"]) == ("val", batches)), None)

    def forget_metrics_after(self, batches: int) -> None:
        """Deletes the reports of batches that a resumed run trains again, and a line that is cut off."""
        if self.metrics.exists():
            kept = [report for report in self.reports() if report["batches"] <= batches]
            durable.write_file(self.metrics, "".join(json.dumps(report) + "\n" for report in kept))

    def mark_requeue(self, number: signal.Signals, batches: int | None) -> None:
        """Leaves the mark that a batch system's script looks for. `batches` are saved; None before the training."""
        self.path.mkdir(parents=True, exist_ok=True)
        durable.write_file(self.requeue, json.dumps({"signal": number.name, "batches": batches}))

    def refuse_other_run(self) -> None:
        # a folder that was made before the config was found wrong holds none
        if self.metrics.exists() or any((self.checkpoints / name).exists() for name in ("best", "last")):
            raise UserError(
                f"--output-dir: {self.path} holds a run already. Fix: add `--resume last` to continue it, or name "
                "another folder"
            )


def _copy_sources(source: Path, target: Path) -> None:
    """Copies the code and configs that a cluster would get. Each checkpoint holds a copy of them."""
    target.mkdir(parents=True, exist_ok=True)
    packages = [path for path in source.iterdir() if any(path.glob("*.py")) and not path.name.startswith(".")]
    for file in (*source.iterdir(), *(file for package in packages for file in package.rglob("*"))):
        if file.is_file() and file.suffix in _SOURCES:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
