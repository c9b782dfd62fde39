"""`export` of MMDetection's one-stage detectors: the file detects what the checkpoint detects."""

import pytest
from tiny_experiment import load_model_def
from tiny_mmdetection import DENSE_HEAD, SMALL_BACKBONE, mmdet_config

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")


_GROUPS = {"model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True}}
FAMILIES = {
    "retinanet/retinanet_r50_fpn_1x_coco.py": {},
    "fsaf/fsaf_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD},
    "free_anchor/retinanet_free_anchor_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD},
    "gfl/gfl_r50_fpn_1x_coco.py": {},
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD, **_GROUPS},
    "atss/atss_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD, **_GROUPS},
    "yolox/yolox_tiny_8x8_300e_coco.py": {
        "data.test.pipeline.1.img_scale": [128, 128],
        "data.val.pipeline.1.img_scale": [128, 128],
    },
}


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("mmdetection").MMDetectionTrial


@pytest.mark.slow
@pytest.mark.parametrize("config_file", FAMILIES)
def test_exported_file_detects_what_the_checkpoint_detects(config_file, shapes, differences_of_export, trial_class):
    class Bold(trial_class):
        """An untrained model with scores that are high enough to compare."""

        def build_model(self):
            model = super().build_model()
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and ("cls" in name or "conv_obj" in name):
                    parameter.data.zero_()
            return model

    Bold.__module__ = trial_class.__module__
    config = mmdet_config(shapes, config_file, **FAMILIES[config_file])
    found = differences_of_export(trial_class, Bold, config)
    assert found["matched"] >= 0.98 * found["detections"] > 0
    assert found["score"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_file", "changes", "reason"),
    [
        ("faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py", {}, "FasterRCNN cannot be exported: it is not a one-stage"),
        (
            "vfnet/vfnet_r50_fpn_1x_coco.py",
            {**SMALL_BACKBONE, **DENSE_HEAD, **_GROUPS},
            "VFNet cannot be exported: an exported file has no deformable convolution",
        ),
    ],
)
def test_export_refuses_what_it_cannot_do(config_file, changes, reason, shapes, command, trial_class, train):
    run = train(trial_class, mmdet_config(shapes, config_file, **changes), "run")
    with pytest.raises(SystemExit, match=reason):
        command(trial_class, "export", run / "config.yaml", "--checkpoint", run / "checkpoints/last")
