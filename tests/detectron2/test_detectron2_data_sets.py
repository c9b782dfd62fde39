"""Data sets by name, of Detectron2 and of the user, with Detectron2's own evaluators."""

import json
import pickle
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import reports, run_model_def
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import AugmentationList, RandomFlip
from detectron2.structures import Boxes, BoxMode, Instances
from panoptic_shapes import REGISTER_PANOPTIC, write_panoptic_shapes
from PIL import Image
from tiny_detectron2 import DETECTRON2, detectron2_config, detectron2_config_by_name
from tiny_experiment import load_model_def

from detectron2_files.data import MapperTransform, read_proposals
from detectron2_files.evaluation import own_evaluator
from detectron2_files.keypoints import check_keypoint_flips, describe
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError

FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"


@pytest.fixture(scope="module")
def trial_class():
    return load_model_def("detectron2").Detectron2Trial


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the user's Python file beside the YAML file, under a name of the test's own."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))
        return [f"{name}.py"]

    return write


def test_pascal_voc_is_evaluated_as_pascal_voc(train, trial_class, voc, module):
    imports = module(
        "register_cells",
        f"""
        from detectron2.data import MetadataCatalog
        from detectron2.data.datasets import register_pascal_voc
        register_pascal_voc("cells", {str(voc)!r}, "some", 2007, ["RBC", "WBC", "Platelets"])
        MetadataCatalog.get("cells").evaluator_type = "pascal_voc"
        """,
    )
    config = detectron2_config_by_name(FASTER_RCNN, "cells", "cells", "bbox_AP50")
    config["hyperparameters"]["custom_imports"] = imports
    run = train(trial_class, config)
    metrics = reports(run, "val")[-1]["metrics"]
    assert {"bbox_AP", "bbox_AP50", "bbox_AP75"} <= metrics.keys()
    assert "data set" not in (run / "config.yaml").read_text()

    config["searcher"]["metric"] = "bbox_mAP"
    with pytest.raises(UserError, match=r"searcher.metric: 'bbox_mAP' is not among the metrics .*'bbox_AP50'"):
        train(trial_class, config, "second")


def test_a_registered_data_set_is_trained_by_its_name(shapes, train, trial_class, module):
    imports = module(
        "register_mine",
        f"""
        import json
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.structures import BoxMode

        def load():
            coco = json.load(open({str(shapes / "annotations/train.json")!r}))
            of_image = {{}}
            for a in coco["annotations"]:
                of_image.setdefault(a["image_id"], []).append(
                    {{"bbox": a["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": a["category_id"] - 1}}
                )
            return [
                {{"file_name": {str(shapes / "train")!r} + "/" + i["file_name"], "image_id": i["id"],
                  "height": i["height"], "width": i["width"], "annotations": of_image.get(i["id"], [])}}
                for i in coco["images"]
            ]

        DatasetCatalog.register("mine", load)
        MetadataCatalog.get("mine").thing_classes = ["rectangle", "circle", "triangle"]
        """,
    )
    config = detectron2_config_by_name(FASTER_RCNN, "mine", "mine", "bbox_AP")
    config["hyperparameters"]["custom_imports"] = imports
    config["hyperparameters"]["config_overrides"]["DATALOADER.SAMPLER_TRAIN"] = "RepeatFactorTrainingSampler"
    config["hyperparameters"]["config_overrides"]["DATALOADER.REPEAT_THRESHOLD"] = 0.9
    run = train(trial_class, config)
    metrics = reports(run, "val")[-1]["metrics"]
    assert {"bbox_AP", "bbox_APl", "bbox_AP/circle"} <= metrics.keys() or {"bbox_AP"} <= metrics.keys()


def test_coco_data_by_name_goes_through_the_shared_loader_and_evaluator(shapes, train, trial_class, module):
    imports = module(
        "register_coco",
        f"""
        from detectron2.data.datasets import register_coco_instances
        for split in ("train", "val"):
            folder = {str(shapes)!r}
            register_coco_instances(f"shapes_{{split}}", {{}}, f"{{folder}}/annotations/{{split}}.json",
                                    f"{{folder}}/{{split}}")
        """,
    )
    config = detectron2_config_by_name(FASTER_RCNN, "shapes_train", "shapes_val", "bbox_mAP")
    config["hyperparameters"]["custom_imports"] = imports
    run = train(trial_class, config, report=True)
    assert "bbox_AR_100" in reports(run, "val")[-1]["metrics"]
    assert (run / "predictions.png").exists()


@pytest.fixture(scope="module")
def panoptic_shapes(tmp_path_factory):
    pytest.importorskip("panopticapi")
    return write_panoptic_shapes(tmp_path_factory.mktemp("panoptic"))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_panoptic_evaluation_is_the_same_on_any_number_of_slots(panoptic_shapes, tmp_path, processes):
    pytest.importorskip("panopticapi")
    (tmp_path / "register_panoptic.py").write_text(REGISTER_PANOPTIC.format(folder=str(panoptic_shapes)))
    config = detectron2_config_by_name(PANOPTIC, "pan_train_separated", "pan_val_separated", "panoptic_seg_PQ")
    config["hyperparameters"]["custom_imports"] = ["register_panoptic"]
    path, run = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config))
    environment = {"PYTHONPATH": str(tmp_path)}
    train = ("train", path, "--output-dir", run)
    run_model_def(*train, cwd=DETECTRON2, env=environment, processes=processes)
    metrics = reports(run, "val")[-1]["metrics"]
    assert {"panoptic_seg_PQ", "sem_seg_mIoU", "bbox_AP", "segm_AP"} <= metrics.keys()

    # the other number of processes
    evaluate = ("evaluate", path, "--checkpoint", run / "checkpoints/last", "--output", tmp_path / "again")
    run_model_def(*evaluate, cwd=DETECTRON2, env=environment, processes=3 - processes)
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics


def test_semantic_segmentation_trains_and_is_drawn(panoptic_shapes, train, command, trial_class, module, tmp_path):
    imports = module("register_semantic", REGISTER_PANOPTIC.format(folder=str(panoptic_shapes)))
    names = ("pan_train_stuffonly", "pan_val_stuffonly")
    from detectron2.data import MetadataCatalog

    config = detectron2_config_by_name(SEMANTIC, *names, "sem_seg_mIoU")
    config["hyperparameters"]["custom_imports"] = imports
    run = train(trial_class, config)
    assert 0 < reports(run, "val")[-1]["metrics"]["sem_seg_mIoU"] <= 100
    assert MetadataCatalog.get(names[0]).stuff_classes == ["things", "background"]

    path, out = tmp_path / "c.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    images = panoptic_shapes / "val"
    predict = ("predict", path, "--checkpoint", run / "checkpoints/last", "--images", images, "--output", out)
    command(trial_class, *predict, "--format", "png")
    results = json.loads((out / "results.json").read_text())
    assert {result["category_id"] for result in results} <= {0, 4}
    assert Image.open(out / "000000.jpg.png").size == (128, 128)


def test_semantic_segmentation_cannot_be_trained_on_boxes(shapes, train, trial_class):
    config = detectron2_config(shapes, SEMANTIC)
    with pytest.raises(UserError, match=r"SEM_SEG_HEAD.NUM_CLASSES is 54, and the data has no stuff: .*stuff_classes"):
        train(trial_class, config)


def test_proposals_made_before_are_trained_and_validated_with(shapes, train, trial_class, tmp_path):
    proposals, seen = {}, []
    for split in ("train", "val"):
        images = json.loads((shapes / f"annotations/{split}.json").read_text())["images"]
        boxes = [np.array([[8, 8, 40, 40], [0, 0, 128, 128]], np.float32)] * len(images)
        proposals[split] = tmp_path / f"{split}.pkl"
        logits = [np.array([0.5, 2.0], np.float32)] * len(images)
        of_split = {"boxes": boxes, "objectness_logits": logits, "ids": [image["id"] for image in images]}
        proposals[split].write_bytes(pickle.dumps(of_split))
    config = detectron2_config(shapes, "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml")
    overrides = config["hyperparameters"]["config_overrides"]
    for kind, split in (("TRAIN", "train"), ("TEST", "val")):
        overrides[f"DATASETS.PROPOSAL_FILES_{kind}"] = [str(proposals[split])]
    config["searcher"]["max_length"], config["data"]["workers"] = {"batches": 2}, 0

    class Watched(trial_class):
        def losses(self, model, batch):
            seen.extend(target["proposals"] for target in batch.targets)
            return super().losses(model, batch)

    run = train(Watched, config)
    assert "bbox_mAP" in reports(run, "val")[-1]["metrics"]
    assert len(seen) == 8
    for of_image in seen:  # the better one first
        assert of_image.objectness_logits.tolist() == [2.0, 0.5]
        assert of_image.proposal_boxes.tensor.shape == (2, 4)


def test_a_package_that_augmentations_need_is_named(shapes):
    def mapper(dataset_dict):
        raise ModuleNotFoundError("No module named 'shapely'", name="shapely")

    record = CocoAnnotations.open(shapes / "annotations/train.json")[0]
    with pytest.raises(UserError, match=r"needs a package .*'shapely'. Fix: python3 -m pip install shapely"):
        MapperTransform(mapper, annotated=True)(b"", record)


def test_proposals_of_other_images_are_refused(tmp_path):
    boxes, logits = np.array([[8, 8, 40, 40]], np.float32), np.array([0.5], np.float32)
    file = tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps({"boxes": [boxes], "objectness_logits": [logits], "ids": [1]}))
    assert set(read_proposals([str(file)], [1])) == {1}
    with pytest.raises(UserError, match=r"proposals.pkl: there are none for image id '2'. Fix: compute them"):
        read_proposals([str(file)], [1, 2])
    with pytest.raises(UserError, match=r"none.pkl: they cannot be loaded: FileNotFoundError"):
        read_proposals([str(tmp_path / "none.pkl")], [1])


def test_rotated_boxes_train_and_are_evaluated_as_such(shapes, train, command, trial_class, tmp_path):
    config = detectron2_config(shapes, FASTER_RCNN)
    config["searcher"].update(metric="bbox_AP", max_length={"batches": 2})
    config["data"]["workers"] = 0
    for split in ("train", "val"):
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        for annotation in coco["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x + width / 2, y + height / 2, width, height, 30.0]
            del annotation["segmentation"]
        crowds = [annotation for annotation in coco["annotations"] if annotation["iscrowd"]]
        coco["annotations"] = [annotation for annotation in coco["annotations"] if not annotation["iscrowd"]]
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
        config["data"][split]["annotations"] = str(tmp_path / f"{split}.json")
    coco["annotations"] += crowds
    (tmp_path / "crowds.json").write_text(json.dumps(coco))
    config["hyperparameters"]["config_overrides"].update(
        {
            "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
            "MODEL.ANCHOR_GENERATOR.ANGLES": [[0, 30]],
            "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
            "MODEL.RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0, 1.0],
            "MODEL.RPN.HEAD_NAME": "StandardRPNHead",
            "MODEL.ROI_HEADS.NAME": "RROIHeads",
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0, 10.0],
        }
    )
    with_crowds = {**config["data"]["val"], "annotations": str(tmp_path / "crowds.json")}
    with_crowds = {**config, "data": {**config["data"], "val": with_crowds}}
    with pytest.raises(UserError, match=r"data.val: image id \d+ has a crowd"):
        train(trial_class, with_crowds, "refused")
    run = train(trial_class, config)
    assert {"bbox_AP", "bbox_AP50"} <= reports(run, "val")[-1]["metrics"].keys()

    path, out = tmp_path / "c.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    predict = ("predict", path, "--checkpoint", run / "checkpoints/last", "--images", shapes / "val", "--output", out)
    command(trial_class, *predict)
    assert json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_mapper_of_one_s_own_may_open_the_image_by_its_file_name(shapes, on_disk):
    def mapper(dataset_dict):
        with Image.open(dataset_dict["file_name"]) as image:
            return {"image": np.asarray(image), "opened": dataset_dict["file_name"]}

    record = CocoAnnotations.open(str(shapes / "annotations/val.json"))[0]
    path = shapes / "val" / record.file_name
    sample = MapperTransform(mapper, False, folder=shapes / "val" if on_disk else None)(path.read_bytes(), record)
    assert sample["image"].shape == (record.height, record.width, 3)
    assert sample["file_name"] == record.file_name
    assert (sample["opened"] == str(path)) == on_disk


@pytest.mark.slow
def test_detectron2_knows_which_processes_share_a_machine(shapes, tmp_path):
    probe, config = tmp_path / "probe.py", tmp_path / "config.yaml"
    probe.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(DETECTRON2)!r})
import model_def
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import CityscapesSemSegEvaluator
from shared.launch import main

class Probe(model_def.Detectron2Trial):
    def read_own_config(self):
        super().read_own_config()
        MetadataCatalog.get("some")
        evaluator = CityscapesSemSegEvaluator("some")
        evaluator.reset()
        os.write(1, f"FOLDER {{evaluator._temp_dir}}\\n".encode())
        sys.exit()

main(Probe)
"""
    )
    config.write_text(yaml.safe_dump(detectron2_config(shapes)))
    done = run_model_def("train", config, "--output-dir", tmp_path / "run", processes=2, cwd=DETECTRON2, script=probe)
    folders = [line for line in done.stdout.splitlines() if line.startswith("FOLDER")]
    assert len(folders) == 2
    assert len(set(folders)) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_eye", "right_eye"),
        ("LEFT_EYE", "RIGHT_EYE"),
        ("L_eye", "R_eye"),
        ("eye_l", "eye_r"),
        ("lefteye", "righteye"),
        ("eyeleft", "eyeright"),
        ("EyeLeft", "EyeRight"),
        ("LEye", "REye"),
        ("Left-Eye 2", "Right-Eye 2"),
        ("l", "r"),
    ],
)
def test_keypoints_of_two_sides_are_swapped_by_a_flip(left, right):
    categories = [{"id": 1, "name": "face", "keypoints": ["nose", left, "bright", right, "tail_1"]}]
    metadata = MetadataCatalog.get(*describe(categories))
    assert metadata.keypoint_flip_map == [(left, right)]
    assert check_keypoint_flips(flipping(), categories) == f"{left} ↔ {right}; unchanged: nose, bright, tail_1"


@pytest.mark.parametrize("name", ["left_eye", "R_EYE", "wing.l", "rightwing"])
def test_a_keypoint_without_its_other_side_is_an_error(name):
    categories = [{"id": 1, "name": "face", "keypoints": ["nose", name]}]
    with pytest.raises(UserError, match=f"the keypoint '{name}' looks like a side"):
        check_keypoint_flips(flipping(), categories)
    assert check_keypoint_flips(SimpleNamespace(augmentations=AugmentationList([])), categories) == ""


def flipping():
    return SimpleNamespace(augmentations=AugmentationList([RandomFlip()]))


def test_detectron2_s_own_evaluator_scores_max_detections():
    boxes = [[i % 20 * 10, i // 20 * 10, 8, 8] for i in range(120)]
    rows = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0} for box in boxes]
    dicts = [{"file_name": "a.png", "image_id": 1, "height": 100, "width": 200, "annotations": rows}]
    DatasetCatalog.register("crowded", lambda: dicts)
    MetadataCatalog.get("crowded").thing_classes = ["pig"]
    try:
        found = Instances((100, 200), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
        found.pred_boxes.tensor[:, 2:] += found.pred_boxes.tensor[:, :2]
        found.scores, found.pred_classes = torch.linspace(1, 0.5, 120), torch.zeros(120, dtype=torch.int64)
        values = []
        for most in (None, 200):
            evaluator = own_evaluator("crowded", ("bbox",), rotated=False, max_detections=most)
            evaluator.reset()
            evaluator.process(dicts, [{"instances": found}])
            values.append(evaluator.evaluate()["bbox"]["AP"])
        assert values[0] < 90
        assert values[1] == pytest.approx(100)
        with pytest.raises(UserError, match=r"hyperparameters\.max_detections: .* of rotated boxes scores 100"):
            own_evaluator("crowded", ("bbox",), rotated=True, max_detections=200)
    finally:
        DatasetCatalog.remove("crowded")
        MetadataCatalog.remove("crowded")
