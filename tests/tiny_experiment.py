"""A small experiment and the trial, for each detector's tests."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_model_def(detector: str):
    """A detector's model_def.py under a module name of its own."""
    name = f"{detector}_model_def"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / detector / "model_def.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def experiment(shapes: Path, hyperparameters: dict) -> dict:
    """A run of 12 batches, validated and saved every 4, that takes seconds."""
    return {
        "name": "test",
        "data": {
            "train": {"annotations": str(shapes / "annotations/train.json"), "images": str(shapes / "train")},
            "val": {"annotations": str(shapes / "annotations/val.json"), "images": str(shapes / "val")},
            "workers": 0,
        },
        "hyperparameters": hyperparameters,
        "searcher": {
            "name": "single",
            "metric": "bbox_mAP",
            "smaller_is_better": False,
            "max_length": {"batches": 12},
        },
        "min_validation_period": {"batches": 4},
        "scheduling_unit": 2,
        "reproducibility": {"experiment_seed": 3},
        "entrypoint": "python3 model_def.py",
    }
