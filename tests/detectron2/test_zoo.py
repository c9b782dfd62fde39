"""Configs of each kind in the model zoo train two batches and validate."""

import json

import pytest
from conftest import reports
from panoptic_shapes import REGISTER_PANOPTIC, write_panoptic_shapes
from tiny_detectron2 import SMALL_YAML, detectron2_config, detectron2_config_by_name
from tiny_experiment import load_model_def
from tiny_models import with_keypoints

pytestmark = pytest.mark.slow


# of 32 groups
GROUP_NORM = {
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
}
CLASSES = {"MODEL.ROI_HEADS.NUM_CLASSES": 3}
ZOO = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": {},
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml": {},
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": {},
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml": {},
    "COCO-Detection/fcos_R_50_FPN_1x.py": {},
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": {},
    "COCO-Detection/retinanet_R_50_FPN_1x.py": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou.yaml": {},
    "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py": {},
    "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py": {},
    "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x.yaml": {},
    "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": CLASSES,
    "Cityscapes/mask_rcnn_R_50_FPN.yaml": CLASSES,
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": {},
    "Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml": {},
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml": {},
    "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml": GROUP_NORM,
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml": GROUP_NORM,
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml": {"MODEL.RESNETS.NORM": "SyncBN", "TEST.PRECISE_BN.NUM_ITER": 2},
    "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml": CLASSES,
    "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml": CLASSES,
    "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py": {"train.amp.enabled": False, "model.backbone.square_pad": 0},
}
KEYPOINTS = {
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": CLASSES,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py": {"model.roi_heads.num_classes": 3},
}
PROPOSALS = ["COCO-Detection/rpn_R_50_C4_1x.yaml", "COCO-Detection/rpn_R_50_FPN_1x.yaml"]
PANOPTIC = ["COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py"]


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


def two_batches(config, metric="bbox_mAP"):
    config["searcher"].update(metric=metric, max_length={"batches": 2})
    config["data"]["workers"] = 0
    return config


@pytest.mark.parametrize("config_file", ZOO)
def test_a_config_trains_and_validates(shapes, train, trial_class, config_file):
    from detectron2_files import COMPILED

    if "dconv" in config_file and COMPILED:
        pytest.skip("the compiled Detectron2's deformable convolutions work on GPUs only")
    run = train(trial_class, two_batches(detectron2_config(shapes, config_file, **ZOO[config_file])))
    assert "bbox_mAP" in reports(run, "val")[-1]["metrics"]


@pytest.mark.parametrize("config_file", KEYPOINTS)
def test_a_config_of_keypoints_trains_and_validates(shapes, train, trial_class, config_file, tmp_path):
    config = two_batches(detectron2_config(shapes, config_file, **KEYPOINTS[config_file]), "keypoints_mAP")
    for split in ("train", "val"):
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        (tmp_path / f"{split}.json").write_text(json.dumps(with_keypoints(coco)))
        config["data"][split]["annotations"] = str(tmp_path / f"{split}.json")
    assert "keypoints_mAP" in reports(train(trial_class, config), "val")[-1]["metrics"]


@pytest.mark.parametrize("config_file", PROPOSALS)
def test_a_config_of_proposals_is_evaluated_by_their_recall(shapes, train, trial_class, config_file):
    config = two_batches(detectron2_config(shapes, config_file), "box_proposals_AR@100")
    assert "box_proposals_ARs@1000" in reports(train(trial_class, config), "val")[-1]["metrics"]


@pytest.mark.parametrize("config_file", PANOPTIC)
def test_a_panoptic_config_is_evaluated_by_panoptic_quality(
    tmp_path_factory, train, trial_class, config_file, monkeypatch
):
    pytest.importorskip("panopticapi")
    folder = write_panoptic_shapes(tmp_path_factory.mktemp("panoptic"))
    names = ["pan_train_separated", "pan_val_separated"]
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in (*names, *(n.replace("separated", "stuffonly") for n in names), *(n[:-10] for n in names)):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
    exec(REGISTER_PANOPTIC.format(folder=str(folder)))
    config = detectron2_config_by_name(config_file, *names, "panoptic_seg_PQ")
    if config_file.endswith(".py"):
        overrides = config["hyperparameters"]["config_overrides"]
        for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            del overrides[key]
        overrides.update({"dataloader.train.dataset.names": names[0], "dataloader.test.dataset.names": names[1]})
    metrics = reports(train(trial_class, two_batches(config, "panoptic_seg_PQ")), "val")[-1]["metrics"]
    assert {"panoptic_seg_PQ", "sem_seg_mIoU"} <= metrics.keys()


def test_the_keys_that_tests_make_small_exist_in_the_zoo_s_configs():
    from detectron2.config import get_cfg

    known = get_cfg().dump()
    assert all(key.split(".")[-1] in known for key in SMALL_YAML)
