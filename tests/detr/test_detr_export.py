"""`export` of the DETR family: the file detects what the checkpoint detects."""

import json

import pytest
import torch
import yaml
from conftest import run_command
from tiny_models import DETR_TYPES, detr_config, trial_classes

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")

from shared.commands.train import train_locally

ANY_SHAPE = {"shortest_edge": 96, "longest_edge": 160}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "processor"),
    [*((model_type, None) for model_type in DETR_TYPES), ("detr", {"size": ANY_SHAPE})],
)
def test_exported_file_detects_what_the_checkpoint_detects(model_type, processor, shapes, tmp_path, command):
    trial_class = trial_classes()["detr"]

    class Spread(trial_class):
        """Random weights whose scores differ: equal ones would be in any order."""

        def build_model(self):
            model = super().build_model()
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if name.endswith(".class_embed.bias"):  # of LW-DETR and RF-DETR: no score would be worth comparing
                    parameter.data.zero_()
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            return model

    Spread.__module__ = trial_class.__module__
    config = detr_config(shapes, model_type)
    if processor is not None:
        config["hyperparameters"]["processor"] = processor
    config["searcher"]["max_length"] = {"batches": 1}
    config["scheduling_unit"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run_command(train_locally, Spread, path, output_dir=tmp_path / "run", resume=None)
    checkpoint = ["--checkpoint", tmp_path / "run/checkpoints/last"]
    command(trial_class, "export", path, *checkpoint, "--images", 4, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out/export.json").read_text())["differences"]
    assert found["matched"] == found["detections"] > 0
    assert found["box"] < 0.01
    assert found["score"] < 1e-4
