"""Losses, gradients and detections beside transformers' own, of each model type."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import reports
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_models import DETR_TYPES, detr_config, trial_classes
from transformers import AutoImageProcessor, AutoModelForObjectDetection

pytestmark = pytest.mark.usefixtures("without_figures")
each_type = pytest.mark.parametrize("model_type", DETR_TYPES)


def small(shapes, model_type="rt_detr_v2", batches=2, **changes):
    """The config of a few batches without workers, validated at the end."""
    config = detr_config(shapes, model_type, **changes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": batches}
    config["scheduling_unit"] = 1
    return config


@pytest.fixture(scope="session")
def trial_class():
    return trial_classes()["detr"]


def watching(trial_class, seen):
    """A trial that notes itself, each batch, and the state before and the gradients after its step."""

    class Watched(trial_class):
        def losses(self, model, batch):
            seen.append({"trial": self, "model": copy.deepcopy(self.plain_model), "batch": batch})
            seen[-1]["random"] = torch.random.get_rng_state()
            seen[-1]["losses"] = super().losses(model, batch)
            return seen[-1]["losses"]

        def clip_gradients(self):
            parameters = self.plain_model.detector.named_parameters()
            seen[-1]["gradients"] = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
            return super().clip_gradients()

    Watched.__module__ = trial_class.__module__
    return Watched


@each_type
def test_a_step_has_the_losses_and_gradients_of_transformers(model_type, shapes, trial_class, train):
    seen = []
    config = small(shapes, model_type)
    config["hyperparameters"]["horizontal_flip"] = 0
    run = train(watching(trial_class, seen), config)
    assert [report["batches"] for report in reports(run, "val")] == [2]
    step, trial = seen[-1], seen[-1]["trial"]
    images, annotations = [], []
    for image_id in step["batch"].image_ids:
        record = next(r for r in map(trial.train_data.annotations.__getitem__, range(24)) if r.image_id == image_id)
        images.append(Image.open(shapes / "train" / record.file_name).convert("RGB"))
        objects = [
            {"bbox": box.tolist(), "category_id": int(label), "area": float(area), "iscrowd": int(crowd)}
            for box, label, area, crowd in zip(
                record.file_boxes, record.labels, record.areas, record.iscrowd, strict=True
            )
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
    for name, gradient in gradients.items():
        largest = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(step["gradients"][name] / largest, gradient / largest, rtol=1e-4, atol=1e-5)


@each_type
def test_an_evaluation_is_image_processor_model_and_post_processing(model_type, shapes, trial_class, train, tmp_path):
    run = train(trial_class, small(shapes, model_type))
    from detr_files.weights import save_for_transformers

    save_for_transformers(run / "checkpoints/last", tmp_path / "plain")
    assert (tmp_path / "plain/model.safetensors").is_file()
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "plain").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "plain")
    coco = COCO(str(shapes / "annotations/val.json"))
    category_ids, results = sorted(coco.cats), []
    assert list(model.config.id2label.values()) == [coco.cats[i]["name"] for i in category_ids]
    for image in coco.imgs.values():
        pixels = processor(images=Image.open(shapes / "val" / image["file_name"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**pixels)
        sizes = torch.tensor([[image["height"], image["width"]]])
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            one = {"image_id": image["id"], "category_id": category_ids[label], "bbox": bbox, "score": score}
            results.append(one)
    evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    (reported,) = reports(run, "val")
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m")
    found = [reported["metrics"][f"bbox_{name}"] for name in names]
    assert found == pytest.approx(evaluation.stats[:5].tolist(), abs=1e-6)
    assert np.isfinite(found[0])
