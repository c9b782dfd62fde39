"""`python3 -m detr_files.export CHECKPOINT FOLDER`: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor

from detr_files.model import build_detector
from detr_files.weights import PREFIX
from shared.launch import exit_on_errors
from shared.training.checkpoints import CATEGORIES_FILE, load_weights, read_checkpoint
from shared.training.downloads import find_checkpoint


def export(checkpoint: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json.

    Args:
        checkpoint: the folder of a checkpoint of this project. Averaged weights are taken if it has them.

    Raises:
        UserError: the checkpoint is not whole, or is another detector's.
    """
    weights = read_checkpoint(checkpoint).weights
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    detector = build_detector(config, json.loads((checkpoint / CATEGORIES_FILE).read_text()))
    load_weights(detector, {name.removeprefix(PREFIX): value for name, value in weights.items()}, checkpoint)
    detector.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m detr_files.export", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder or UUID")
    parser.add_argument("folder", type=Path, help="what to write")
    arguments = parser.parse_args()
    with exit_on_errors():
        export(find_checkpoint(arguments.checkpoint), arguments.folder)


if __name__ == "__main__":
    main()
