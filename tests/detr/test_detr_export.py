"""`export` of the DETR family: the file detects what the checkpoint detects."""

import pytest
import torch
from tiny_detr import DETR_TYPES, detr_config
from tiny_models import trial_classes

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")


ANY_SHAPE = {"shortest_edge": 96, "longest_edge": 160}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes", "options"),
    [
        *((model_type, {}, []) for model_type in DETR_TYPES),
        ("detr", {"processor": {"size": ANY_SHAPE}}, []),
        ("rf_detr", {"masks": True}, []),
        *((model_type, {}, ["--raw"]) for model_type in ("rt_detr_v2", "detr")),
        *((model_type, {}, ["--format", "torch"]) for model_type in ("rt_detr_v2", "rf_detr")),
    ],
)
def test_exported_file_detects_what_the_checkpoint_detects(model_type, changes, options, shapes, differences_of_export):
    trial_class = trial_classes()["detr"]

    class Spread(trial_class):
        """Random weights with different scores: equal scores have no order."""

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
    config["hyperparameters"].update(changes)
    found = differences_of_export(trial_class, Spread, config, *options)
    assert found["matched"] == found["detections"] > 0
    assert found["box"] < 0.01
    assert found["score"] < 1e-4
    assert (found["mask"] is not None) == changes.get("masks", False)
    assert found["mask"] is None or found["mask"] > 0.98
