"""`export` of Detectron2's RetinaNet: the file detects what the checkpoint detects."""

import pytest
import torch
from tiny_detectron2 import detectron2_config
from tiny_experiment import load_model_def

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "box"), [({}, 0.001), ({"INPUT.MIN_SIZE_TEST": 100, "INPUT.FORMAT": "RGB"}, 3)])
def test_exported_file_detects_what_the_checkpoint_detects(changes, box, shapes, differences_of_export, trial_class):
    class Spread(trial_class):
        """An untrained model with many different scores between 0 and 1: equal scores have no order."""

        def build_model(self):
            model = super().build_model()
            torch.manual_seed(0)
            model.head.cls_score.bias.data.normal_(-2, 1)
            model.head.cls_score.weight.data.normal_(0, 0.02)
            model.head.bbox_pred.weight.data.normal_(0, 0.05)
            return model

    Spread.__module__ = trial_class.__module__
    config = detectron2_config(shapes, "COCO-Detection/retinanet_R_50_FPN_1x.yaml", **changes)
    found = differences_of_export(trial_class, Spread, config)
    assert found["detections"] > 50
    assert found["matched"] >= 0.98 * found["detections"]
    assert found["box"] < box
    assert found["score"] < 0.02


@pytest.mark.slow
def test_export_refuses_a_two_stage_detector_with_the_reason(shapes, command, trial_class, train):
    run = train(trial_class, detectron2_config(shapes), "run")
    with pytest.raises(SystemExit, match=r"GeneralizedRCNN cannot be exported: only RetinaNet can"):
        command(trial_class, "export", run / "config.yaml", "--checkpoint", run / "checkpoints/last")
