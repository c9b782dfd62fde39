"""What a report says of where its numbers come from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.redaction import redacted, without_secrets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("torch", "torchvision", "determined", "hotcoco", "effdet", "timm", "mmdet", "mmcv", "detectron2")
_NOT_THERE = "–"


@dataclass
class About:
    """What a report is of.

    Attributes:
        title: of the page.
        facts: name and value, the first table.
        changed: of the config, what differs from the shipped file: key, shipped, here.
        shipped: that file's name.
        curves: how the training went.
    """

    title: str = "Detections"
    facts: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[tuple[str, Any, Any]] = ()
    shipped: str = ""
    curves: Figure | None = None

    def __post_init__(self) -> None:
        self.title = redacted(self.title)
        self.facts = {name: redacted(value) if isinstance(value, str) else value for name, value in self.facts.items()}


def software(code: Path) -> dict[str, str]:
    """The versions of what runs, and the git commit of the folder `code`, where it is of a repository."""
    found = []
    for package in _PACKAGES:
        if package in sys.modules:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:  # installed in a way that leaves no trace
                found.append(package)
    facts = {"versions": f"Python {sys.version.split()[0]}, {', '.join(found)}"}
    commit = _git(code, "rev-parse", "--short=12", "HEAD")
    if commit:
        changed = _git(code, "status", "--porcelain", "--untracked-files=no")
        facts["git commit"] = f"{commit}{', with changes' if changed else ''}"
    return facts


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def speed(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Images a second, and the share of the time that the training waited for data: the median of the reports."""
    facts = {}
    for name, said, scale in (("images_per_second", "images/s in training", 1), ("data_wait", "waiting for data", 100)):
        values = [report["metrics"].get(name) for report in reports if report["split"] == "train"]
        if values := [value for value in values if value is not None]:
            facts[said] = f"{scale * np.median(values):.1f}{' % of the time' if name == 'data_wait' else ''}"
    return facts


def changed_keys(config: Mapping[str, Any], original: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two resolved configs: the key, the original's value, this one's."""
    there, here = dict(_flat(without_secrets(original))), dict(_flat(without_secrets(config)))
    return [
        (key, there.get(key, _NOT_THERE), here.get(key, _NOT_THERE))
        for key in sorted(there.keys() | here.keys())
        if there.get(key, _NOT_THERE) != here.get(key, _NOT_THERE)
    ]


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
