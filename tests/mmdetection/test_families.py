"""Configs of MMDetection's families, as it ships them: each builds, trains two batches of tiny images and validates.

`pytest -m slow tests/mmdetection/test_families.py`: five minutes.
"""

import json

import numpy as np
import pytest
from conftest import reports
from mmcv import Config
from PIL import Image
from tiny_experiment import load_model_def
from tiny_mmdetection import mmdet_config

from mmdetection_files import operations
from mmdetection_files.config_keys import shipped_configs
from shared.data import synthetic

SIZE = 128
FAMILIES = [
    # two stages
    "faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py",
    "faster_rcnn/faster_rcnn_r50_caffe_c4_1x_coco.py",
    "mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py",
    "dcn/mask_rcnn_r50_fpn_dconv_c3-c5_1x_coco.py",
    "dcnv2/faster_rcnn_r50_fpn_mdconv_c3-c5_1x_coco.py",
    "double_heads/dh_faster_rcnn_r50_fpn_1x_coco.py",
    "dynamic_rcnn/dynamic_rcnn_r50_fpn_1x_coco.py",
    "grid_rcnn/grid_rcnn_r50_fpn_gn-head_1x_coco.py",
    "ms_rcnn/ms_rcnn_r50_fpn_1x_coco.py",
    "detectors/cascade_rcnn_r50_sac_1x_coco.py",
    "pisa/pisa_faster_rcnn_r50_fpn_1x_coco.py",
    "pafpn/faster_rcnn_r50_pafpn_1x_coco.py",
    "point_rend/point_rend_r50_caffe_fpn_mstrain_1x_coco.py",
    "swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco.py",
    # cascades
    "cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco.py",
    "htc/htc_without_semantic_r50_fpn_1x_coco.py",
    # one stage, with anchors
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "ssd/ssdlite_mobilenetv2_scratch_600e_coco.py",
    "yolo/yolov3_mobilenetv2_320_300e_coco.py",
    "yolof/yolof_r50_c5_8x8_1x_coco.py",
    "dyhead/atss_r50_fpn_dyhead_1x_coco.py",
    "atss/atss_r50_fpn_1x_coco.py",
    "gfl/gfl_r50_fpn_1x_coco.py",
    "tood/tood_r50_fpn_1x_coco.py",
    "free_anchor/retinanet_free_anchor_r50_fpn_1x_coco.py",
    # without anchors
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco.py",
    "foveabox/fovea_r50_fpn_4x4_1x_coco.py",
    "vfnet/vfnet_r50_fpn_1x_coco.py",
    "autoassign/autoassign_r50_fpn_8x2_1x_coco.py",
    "centernet/centernet_resnet18_140e_coco.py",
    "yolox/yolox_tiny_8x8_300e_coco.py",
    # DETR and its family
    "detr/detr_r50_8x2_150e_coco.py",
    "deformable_detr/deformable_detr_r50_16x2_50e_coco.py",
    "sparse_rcnn/sparse_rcnn_r50_fpn_1x_coco.py",
    # instances without boxes first
    "solo/solo_r50_fpn_1x_coco.py",
    "solov2/solov2_r50_fpn_1x_coco.py",
    "yolact/yolact_r50_1x8_coco.py",
    "mask2former/mask2former_r50_lsj_8x2_50e_coco.py",
]
# whose operations mmcv-full has for GPUs only
IN_PYTORCH = [
    "guided_anchoring/ga_retinanet_r50_fpn_1x_coco.py",
    "guided_anchoring/ga_faster_r50_fpn_1x_coco.py",
    "carafe/mask_rcnn_r50_fpn_carafe_1x_coco.py",
    "dcn/faster_rcnn_r50_fpn_dpool_1x_coco.py",
    "dcnv2/faster_rcnn_r50_fpn_mdpool_1x_coco.py",
]
PANOPTIC = [
    "panoptic_fpn/panoptic_fpn_r50_fpn_1x_coco.py",
    "maskformer/maskformer_r50_mstrain_16x1_75e_coco.py",
]
# beside the size of the images
PARTICULARS = {
    "ssd/ssdlite_mobilenetv2_scratch_600e_coco.py": {"optimizer.lr": 0.001},
    "mask2former/mask2former_r50_lsj_8x2_50e_coco.py": {
        "model.panoptic_head.num_things_classes": 3,
        "model.panoptic_fusion_head.num_things_classes": 3,
        "model.panoptic_head.loss_cls.class_weight": [1.0, 1.0, 1.0, 0.1],
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    synthetic.write(folder, train=8, val=2, size=SIZE)
    return folder


def made_small(section, path=""):
    """Overrides: `SIZE` pixels in all pipelines, few proposals, no weights to download."""
    if isinstance(section, (list, tuple)):
        return {k: v for i, part in enumerate(section) for k, v in made_small(part, f"{path}.{i}").items()}
    if not isinstance(section, dict):
        return {}
    overrides = {}
    for key, value in section.items():
        here = f"{path}.{key}" if path else key
        if (key == "init_cfg" and isinstance(value, dict) and value.get("type") == "Pretrained") or (
            key == "pretrained" and isinstance(value, str)
        ):
            overrides[here] = None
        elif key == "max_per_img" and ("rpn" in path):
            overrides[here] = 30  # proposals: most of the time goes into what is made of them
        elif path.startswith("data.") and key in ("img_scale", "scale", "size", "crop_size", "image_size"):
            many = isinstance(value, list) and isinstance(value[0], (list, tuple))
            overrides[here] = [[SIZE, SIZE]] * len(value) if many else [SIZE, SIZE]
        else:
            overrides.update(made_small(value, here))
    return overrides


def config_of(pictures, config_file):
    config = mmdet_config(pictures)
    shipped = Config.fromfile(shipped_configs() / config_file)
    parts = {"data": dict(shipped.data), "model": dict(shipped.model)}
    config["hyperparameters"] = {
        "global_batch_size": 2,
        "config_file": config_file,
        "config_overrides": {**made_small(parts), **PARTICULARS.get(config_file, {})},
    }
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 2}
    config["data"]["workers"] = 0
    return config


@pytest.mark.slow
@pytest.mark.parametrize("config_file", FAMILIES)
def test_a_config_trains_and_validates(pictures, train, config_file):
    run = train(load_model_def("mmdetection").MMDetectionTrial, config_of(pictures, config_file))
    assert np.isfinite(reports(run, "train")[-1]["metrics"]["loss"])
    metrics = reports(run, "val")[-1]["metrics"]
    assert "bbox_mAP" in metrics or "segm_mAP" in metrics


@pytest.mark.slow
@pytest.mark.skipif(operations.are_compiled(), reason="compiled mmcv-full has these operations for GPUs only")
@pytest.mark.parametrize("config_file", IN_PYTORCH)
def test_a_config_of_operations_for_gpus_trains_and_validates_on_a_cpu(pictures, train, config_file):
    test_a_config_trains_and_validates(pictures, train, config_file)


@pytest.mark.slow
@pytest.mark.parametrize("config_file", PANOPTIC)
def test_a_panoptic_config_trains_and_is_evaluated_by_panoptic_quality(pictures, train, tmp_path, config_file):
    pytest.importorskip("panopticapi", reason="MMDetection's panoptic data sets need panopticapi, from its repository")
    config = config_of(pictures, config_file)
    for split in ("train", "val"):
        annotations = write_panoptic(pictures, split, tmp_path)
        config["data"][split] = {"annotations": str(annotations), "images": str(pictures / split)}
        config["hyperparameters"]["config_overrides"][f"data.{split}.seg_prefix"] = str(annotations.with_suffix(""))
    config["searcher"]["metric"] = "PQ"
    run = train(load_model_def("mmdetection").MMDetectionTrial, config)
    assert {"PQ", "SQ", "RQ"} <= reports(run, "val")[-1]["metrics"].keys()


def write_panoptic(pictures, split, folder):
    """The shapes as COCO's panoptic format, with the 80 things and 53 stuff classes of COCO by their ids."""
    from mmdet.datasets import CocoPanopticDataset
    from panopticapi.utils import id2rgb
    from pycocotools import mask as coco_mask

    coco = json.loads((pictures / f"annotations/{split}.json").read_text())
    path = folder / f"{split}.json"
    path.with_suffix("").mkdir()
    annotations = []
    for image in coco["images"]:
        ids, segments = np.full((SIZE, SIZE), 1, np.uint32), [{"id": 1, "category_id": 81, "iscrowd": 0}]
        for number, annotation in enumerate(a for a in coco["annotations"] if a["image_id"] == image["id"]):
            if annotation["iscrowd"]:
                continue
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], SIZE, SIZE)))
            ids[mask.astype(bool)] = number + 2
            segments.append({"id": number + 2, "category_id": annotation["category_id"], "iscrowd": 0})
        kept = []
        for segment in segments:
            rows, columns = np.nonzero(ids == segment["id"])
            if len(rows):
                box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
                kept.append({**segment, "bbox": box, "area": len(rows)})
        name = image["file_name"].rsplit(".", 1)[0] + ".png"
        Image.fromarray(id2rgb(ids)).save(path.with_suffix("") / name)
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": kept})
    names = CocoPanopticDataset.CLASSES
    categories = [{"id": i + 1, "name": name, "isthing": int(i < 80)} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": coco["images"], "annotations": annotations, "categories": categories}))
    return path
