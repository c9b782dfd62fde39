"""Where the numbers of a report come from: the software, the speed, the config, how the training went."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.redaction import redacted, without_secrets

if TYPE_CHECKING:  # importing it takes half a second, and a training needs no figure to start
    from matplotlib.figure import Figure

_NOT_THERE = "–"


@dataclass
class About:
    """The run that a report describes.

    Attributes:
        title: of the page.
        facts: name and value, the first table.
        changed: keys of the config that differ from the shipped file: key, the file's value, this one's.
        shipped: the name of that file.
        curves: learning curves by title.
    """

    title: str = "Detections"
    facts: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[tuple[str, Any, Any]] = ()
    shipped: str = ""
    curves: Mapping[str, Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.title = redacted(self.title)
        self.facts = {name: redacted(value) if isinstance(value, str) else value for name, value in self.facts.items()}


def software(code: Path) -> dict[str, str]:
    """The versions of the packages, and the git commit if the folder is part of a repository.

    Args:
        code: the detector's folder, whose requirements.txt names the packages of the detector.
    """
    requirements = code / "requirements.txt"
    own = re.findall(r"^[\w.-]+", requirements.read_text(), re.MULTILINE) if requirements.is_file() else []
    found = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "torchvision", "determined", "hotcoco", *own):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # not installed, or without metadata
            continue
    facts = {"versions": ", ".join(found)}
    if commit := _git(code, "rev-parse", "--short=12", "HEAD"):
        changed = _git(code, "status", "--porcelain", "--untracked-files=no")
        facts["git commit"] = f"{commit}{', with changes' if changed else ''}"
    return facts


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def speed(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Images per second, and the share of the time that the training waited for data: the medians of the reports."""

    def median(name: str) -> float | None:
        values = [report["metrics"].get(name) for report in reports if report["split"] == "train"]
        values = [value for value in values if value is not None]
        return float(np.median(values)) if values else None

    facts = {}
    if (images := median("images_per_second")) is not None:
        facts["images/s in training"] = f"{images:.1f}"
    if (waiting := median("data_wait")) is not None:
        facts["waiting for data"] = f"{100 * waiting:.1f} % of the time"
    return facts


def changed_keys(config: Mapping[str, Any], original: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two resolved configs: the key, the original's value, this one's."""
    there, here = dict(_flat(without_secrets(original))), dict(_flat(without_secrets(config)))
    rows = [(key, there.get(key, _NOT_THERE), here.get(key, _NOT_THERE)) for key in sorted(there.keys() | here.keys())]
    return [row for row in rows if row[1] != row[2]]


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
