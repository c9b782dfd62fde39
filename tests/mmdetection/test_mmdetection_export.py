"""`export` of MMDetection's detectors: the file detects what the checkpoint detects."""

import pytest
from tiny_experiment import load_model_def
from tiny_mmdetection import DENSE_HEAD, MASK_HEAD, ROI_HEAD, SMALL_BACKBONE, mmdet_config

pytest.importorskip("onnxruntime", reason="export needs the packages of `pip install '.[export]'`")
pytest.importorskip("onnxscript", reason="export needs the packages of `pip install '.[export]'`")


_GROUPS = {"model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True}}
_TWO_STAGE = {key: value for key, value in ROI_HEAD.items() if "bbox_head" not in key and "train_cfg.rcnn" not in key}
CASCADE = {
    **SMALL_BACKBONE,
    **_TWO_STAGE,
    **MASK_HEAD,
    **{f"model.roi_head.bbox_head.{stage}.in_channels": 32 for stage in range(3)},
    **{f"model.roi_head.bbox_head.{stage}.fc_out_channels": 64 for stage in range(3)},
}
FAMILIES = {
    "retinanet/retinanet_r50_fpn_1x_coco.py": {},
    "fsaf/fsaf_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD},
    "free_anchor/retinanet_free_anchor_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD},
    "gfl/gfl_r50_fpn_1x_coco.py": {},
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD, **_GROUPS},
    "atss/atss_r50_fpn_1x_coco.py": {**SMALL_BACKBONE, **DENSE_HEAD, **_GROUPS},
    "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py": {},
    "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py": {},
    "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco.py": CASCADE,
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
                elif name.endswith(("rpn_cls.weight", "rpn_reg.weight", "fc_cls.weight", "fc_reg.weight")):
                    parameter.data.mul_(20)  # scores, and overlaps, that differ
            return model

    Bold.__module__ = trial_class.__module__
    config = mmdet_config(shapes, config_file, **FAMILIES[config_file])
    found = differences_of_export(trial_class, Bold, config)
    assert found["matched"] == found["detections"] > 0
    assert found["box"] < 0.01
    assert found["score"] < 0.001
    assert (found["mask"] is None) == ("mask" not in config_file)
    assert found["mask"] is None or found["mask"] > 0.999


@pytest.mark.slow
def test_a_torch_file_detects_outside_no_grad(shapes, differences_of_export, trial_class):
    """detect.py runs it as it is, and SSD's last operations keep gradients."""
    config = mmdet_config(shapes, "ssd/ssd300_coco.py", **{"model.backbone.init_cfg": None})
    found = differences_of_export(trial_class, trial_class, config, "--format", "torch", "--tolerance", "1")
    assert found["matched"] > 0.99 * found["detections"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_file", "changes", "reason"),
    [
        (
            "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py",
            {"model.test_cfg.rcnn.nms.type": "soft_nms"},
            "cannot be exported. Fix: use {type: nms, iou_threshold",
        ),
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
