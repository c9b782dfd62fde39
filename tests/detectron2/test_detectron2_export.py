"""`export` of Detectron2's detectors: the file detects what the checkpoint detects."""

import json

import pytest
import torch
from tiny_detectron2 import detectron2_config
from tiny_experiment import load_model_def
from tiny_models import with_keypoints

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


RETINANET, COMMON = "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-InstanceSegmentation"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_file", "changes", "box"),
    [
        (RETINANET, {}, 0.01),
        (RETINANET, {"INPUT.MIN_SIZE_TEST": 100, "INPUT.FORMAT": "RGB"}, 1),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", {}, 0.01),
        (f"{COMMON}/mask_rcnn_R_50_FPN_1x.yaml", {}, 0.01),
        (f"{COMMON}/mask_rcnn_R_50_C4_1x.yaml", {}, 0.01),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", {}, 0.01),
    ],
)
def test_exported_file_detects_what_the_checkpoint_detects(
    config_file, changes, box, shapes, differences_of_export, trial_class
):
    class Spread(trial_class):
        """An untrained model with many different scores between 0 and 1: equal scores have no order."""

        def build_model(self):
            model = super().build_model()
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if name == "head.cls_score.bias":
                    parameter.data.normal_(-2, 1)
                elif name == "head.cls_score.weight":
                    parameter.data.normal_(0, 0.02)
                elif name.endswith(("cls_score.weight", "objectness_logits.weight")):
                    parameter.data.normal_(0, 0.03)
                elif name.endswith("mask_head.predictor.weight"):
                    parameter.data.normal_(0, 0.5)
                elif name.endswith(("bbox_pred.weight", "anchor_deltas.weight")):
                    parameter.data.normal_(0, 0.05)
            return model

    Spread.__module__ = trial_class.__module__
    config = detectron2_config(shapes, config_file, **changes)
    found = differences_of_export(trial_class, Spread, config)
    assert found["detections"] > 20
    assert found["matched"] == found["detections"]
    assert found["box"] < box
    assert found["score"] < 0.001
    assert (found["mask"] is None) == ("mask" not in config_file)
    assert found["mask"] is None or found["mask"] > 0.999


@pytest.mark.slow
def test_export_refuses_keypoints_before_it_detects(shapes, tmp_path, command, trial_class, train, capsys):
    config = detectron2_config(
        shapes, "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", **{"MODEL.ROI_HEADS.NUM_CLASSES": 3}
    )
    for split in ("train", "val"):
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        (tmp_path / f"{split}.json").write_text(json.dumps(with_keypoints(coco)))
        config["data"][split]["annotations"] = str(tmp_path / f"{split}.json")
    run = train(trial_class, config, "run")
    with pytest.raises(SystemExit, match="it cannot be exported: an exported file has no keypoints"):
        command(trial_class, "export", run / "config.yaml", "--checkpoint", run / "checkpoints/last")
    assert "detecting with the checkpoint" not in capsys.readouterr().out
