"""Training runs by the command that a user types, with a detector's `bccd.yaml`, and their CPU seconds."""

import os
import resource
import subprocess
import sys
from pathlib import Path


def train_command(data: Path, run: Path, *changes: str) -> list[str]:
    """The command, for a detector's folder.

    Args:
        data: BCCD's folder, or one like it: annotations/ and images/, or a folder per split.
        run: the folder of the run.
        changes: changes to the config, KEY=VALUE.
    """
    folder, of_data = data.absolute(), []
    for split in ("train", "val"):
        images = folder / ("images" if (folder / "images").exists() else split)
        of_data.append(f"data.{split}={{annotations: {folder / 'annotations' / split}.json, images: {images}}}")
    command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(run)]
    return command + [argument for change in (*of_data, *changes) for argument in ("--set", change)]


def user_seconds(command: list[str], folder: Path, log: Path, **environment: str) -> float:
    """User CPU seconds of the command and all processes that it waited for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with log.open("w") as file:
        ended = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        sys.exit(f"{' '.join(command[:3])}: exit status {ended.returncode}\n{log.read_text()[-2000:]}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
