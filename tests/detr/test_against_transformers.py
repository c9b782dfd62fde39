"""Losses, gradients, detections and resumed runs of each model type, beside transformers' own."""

import copy
import json

import pytest
import torch
import yaml
from conftest import reports, run_command, stop_workers
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_resume import assert_same_bits, final_state
from tiny_detr import DETR_TYPES, detr_config
from tiny_models import trial_classes
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from without_figures import leave_out_figures

from shared.commands.train import train_locally

each_type = pytest.mark.parametrize("model_type", DETR_TYPES)


def small(shapes, model_type="rt_detr_v2", batches=2, **changes):
    """The config of a few batches without workers, validated at the end."""
    config = detr_config(shapes, model_type, **changes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": batches}
    config["scheduling_unit"] = 1
    return config


@pytest.fixture(scope="module")
def trial_class():
    return trial_classes()["detr"]


def watching(trial_class, steps, detected):
    """A trial that records its detections and each step: model, batch, random state, losses, gradients."""

    class Watched(trial_class):
        def losses(self, model, batch):
            step = {"trial": self, "model": copy.deepcopy(self.plain_model), "batch": batch}
            steps.append({**step, "random": torch.random.get_rng_state()})
            steps[-1]["losses"] = super().losses(model, batch)
            return steps[-1]["losses"]

        def clip_gradients(self):
            parameters = self.plain_model.detector.named_parameters()
            steps[-1]["gradients"] = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
            return super().clip_gradients()

        def detect(self, model, batch):
            detected.extend(found := super().detect(model, batch))
            return found

    Watched.__module__ = trial_class.__module__
    return Watched


def watched_run(trial_class, config, folder):
    """A run in a new folder: its folder, its steps and its detections."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    steps, detected = [], []
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch.setattr)
        watched = watching(trial_class, steps, detected)
        run_command(train_locally, watched, folder / "config.yaml", output_dir=folder / "run", resume=None)
    stop_workers()
    return folder / "run", steps, detected


@pytest.fixture(scope="module")
def trained(shapes, trial_class, tmp_path_factory):
    """Per model type, a run of two batches: its folder, its steps, and its detections."""
    runs = {}

    def of(model_type):
        if model_type not in runs:
            config = small(shapes, model_type)
            config["hyperparameters"]["horizontal_flip"] = 0.0
            runs[model_type] = watched_run(trial_class, config, tmp_path_factory.mktemp(model_type))
        return runs[model_type]

    return of


@each_type
def test_a_step_has_the_losses_and_gradients_of_transformers(model_type, shapes, trained):
    _, steps, _ = trained(model_type)
    step, trial = steps[-1], steps[-1]["trial"]
    data = trial.train_data.annotations
    records = {record.image_id: record for record in map(data.__getitem__, range(len(data)))}
    images, annotations = [], []
    for image_id in step["batch"].image_ids:
        record = records[image_id]
        images.append(Image.open(shapes / "train" / record.file_name).convert("RGB"))
        columns = (record.file_boxes.tolist(), record.labels.tolist(), record.areas.tolist(), record.iscrowd.tolist())
        objects = [
            {"bbox": box, "category_id": label, "area": area, "iscrowd": int(crowd)}
            for box, label, area, crowd in zip(*columns, strict=True)
        ]
        annotations.append({"image_id": image_id, "annotations": objects})
    inputs = trial.processor(images=images, annotations=annotations, return_tensors="pt")
    torch.testing.assert_close(step["batch"].images, inputs["pixel_values"], rtol=0, atol=0)

    detector = step["model"].detector.train()
    torch.random.set_rng_state(step["random"])
    outputs = detector(pixel_values=inputs["pixel_values"], labels=inputs["labels"])
    outputs.loss.backward()
    assert step["losses"]["loss"].item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    assert step["gradients"].keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(step["gradients"][name] / largest, gradient / largest, rtol=0, atol=1e-6)


def assert_reports_pycocotools_numbers(run, coco, results, iou_type):
    """The run's only validation reports the numbers that pycocotools computes from `results`."""
    evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    (reported,) = reports(run, "val")
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m")
    found = [reported["metrics"][f"{iou_type}_{name}"] for name in names]
    assert found == pytest.approx(evaluation.stats[:5].tolist(), abs=1e-6)


@each_type
def test_detections_are_those_of_the_exported_model_in_plain_transformers(
    model_type, shapes, trained, tmp_path, command, trial_class
):
    run, _, detected = trained(model_type)
    of_checkpoint = ["--checkpoint", run / "checkpoints/last", "--format", "transformers", "--output", tmp_path]
    command(trial_class, "export", run / "config.yaml", *of_checkpoint)
    assert (tmp_path / "model.safetensors").is_file()
    model = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    coco = COCO(str(shapes / "annotations/val.json"))
    category_ids, results = sorted(coco.cats), []
    assert list(model.config.id2label.values()) == [coco.cats[i]["name"] for i in category_ids]
    of_image = {found.image_id: found for found in detected}
    assert of_image.keys() == coco.imgs.keys()
    for image in coco.imgs.values():
        pixels = processor(images=Image.open(shapes / "val" / image["file_name"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**pixels)
        sizes = torch.tensor([[image["height"], image["width"]]])
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        scores, ours = found["scores"].sort(descending=True).values, of_image[image["id"]]
        assert len(scores) > 10
        torch.testing.assert_close(torch.tensor(ours.scores).sort(descending=True).values, scores, rtol=0, atol=1e-6)
        boxes = torch.tensor(ours.boxes).sort(dim=0).values
        torch.testing.assert_close(boxes, found["boxes"].sort(dim=0).values, rtol=1e-5, atol=1e-4)
        for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            one = {"image_id": image["id"], "category_id": category_ids[label], "bbox": bbox, "score": score}
            results.append(one)
    assert_reports_pycocotools_numbers(run, coco, results, "bbox")


@pytest.mark.parametrize(
    "model_type",
    [name if name == "rt_detr_v2" else pytest.param(name, marks=pytest.mark.slow) for name in DETR_TYPES],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model_type, shapes, trial_class, train, crash_and_resume, without_figures
):
    config = small(shapes, model_type, batches=4)
    config["hyperparameters"]["model_ema_decay"] = 0.9
    config["min_checkpoint_period"] = {"batches": 2}
    whole = train(trial_class, config, "whole")
    resumed = crash_and_resume(trial_class, config, 2)
    assert_same_bits(final_state(resumed), final_state(whole))
    batches = [report["batches"] for report in reports(resumed, "train")]
    assert sorted(set(batches)) == [1, 2, 3, 4]


def test_images_without_objects_and_of_several_sizes_train(shapes, trial_class, train, without_figures, tmp_path):
    config = small(shapes, "detr", batches=2)
    config["hyperparameters"]["processor"] = {"size": {"shortest_edge": 64, "longest_edge": 160}}
    for split in ("train", "val"):
        path = shapes / f"annotations/{split}.json"
        coco = json.loads(path.read_text())
        of_first = {image["id"] for image in coco["images"][::2]}
        coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] in of_first]
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
        config["data"][split]["annotations"] = str(tmp_path / f"{split}.json")
    assert reports(train(trial_class, config), "val")
