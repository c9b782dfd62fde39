"""Masks of an exported file: pasted as PyTorch pastes them, evaluated, drawn, and given by `Predictor`."""

import json

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as coco_mask
from tiny_models import efficientdet_config
from torch.nn import functional

from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import from_coco_results
from shared.evaluation.evaluator import evaluate
from shared.export import formats
from shared.export.metadata import Metadata
from shared.export.operations import Exportable, size_of
from shared.predictor import Predictor

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    pytest.skip("export needs torch 2.6", allow_module_level=True)
BOXES = torch.tensor([[10.3, 20.6, 60.1, 90.4], [-3.0, 70.2, 128.0, 127.5]])
HEIGHT, WIDTH = 128, 128


class Constant(Exportable):
    """Finds the same two objects in each image."""

    input_size = (HEIGHT, WIDTH)

    def __init__(self, name: str, masks: torch.Tensor):
        super().__init__()
        self.outputs = (*self.outputs, name)
        self.register_buffer("masks", masks)
        self.register_buffer("boxes", BOXES)

    def prepare(self, images):
        return images.float(), size_of(images)

    def detect(self, pixels, sizes):
        shown = pixels.mean((1, 2, 3))[:, None] * 0
        scores, labels = shown + torch.tensor([0.9, 0.8]), shown.long() + torch.tensor([1, 0])
        return shown[..., None] + self.boxes, scores, labels, shown[..., None, None] + self.masks


def pasted_in_boxes(masks):
    """(2, H, W) bool, as Detectron2 and MMDetection paste probabilities."""
    places = [
        (torch.arange(count) + 0.5 - BOXES[:, axis, None]) / (BOXES[:, axis + 2] - BOXES[:, axis])[:, None] * 2 - 1
        for axis, count in ((0, WIDTH), (1, HEIGHT))
    ]
    x, y = places[0][:, None, :].expand(-1, HEIGHT, -1), places[1][:, :, None].expand(-1, -1, WIDTH)
    return functional.grid_sample(masks[:, None], torch.stack([x, y], 3), align_corners=False)[:, 0] >= 0.5


def resized_to_image(masks):
    """(2, H, W) bool, as RF-DETR resizes logits."""
    return functional.interpolate(masks[:, None], (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[:, 0] > 0


@pytest.mark.parametrize(("name", "expected"), [("masks", pasted_in_boxes), ("image_masks", resized_to_image)])
def test_masks_of_a_file_are_pasted_evaluated_and_drawn(name, expected, shapes, tmp_path, command, trial_class):
    torch.manual_seed(0)
    masks = functional.interpolate(torch.rand(1, 2, 5, 5), (28, 28), mode="bilinear")[0] - (name == "image_masks") * 0.5
    annotations = shapes / "annotations/val.json"
    categories = json.loads(annotations.read_text())["categories"]
    detector = Constant(name, masks)
    metadata = Metadata(categories, detector.outputs, (HEIGHT, WIDTH), "float32", 0.5, {}, None, None, {})
    path = formats.write(detector, "torch", tmp_path, metadata)

    image = next((shapes / "val").iterdir())
    found = Predictor(path)(image, min_score=0)
    ours = np.stack([coco_mask.decode(mask) for mask in found.masks]).astype(bool)
    assert ours.any()
    assert (ours != expected(masks).numpy()).mean() < 1e-4  # rounding decides at the limit

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(efficientdet_config(shapes)))
    images = ["--images", shapes / "val", "--output", tmp_path / "found"]
    command(trial_class, "predict", tmp_path / "config.yaml", "--model", path, *images)
    results = json.loads((tmp_path / "found/results.json").read_text())
    assert all("segmentation" in result for result in results)
    command(trial_class, "evaluate", tmp_path / "config.yaml", "--model", path, "--output", tmp_path / "evaluated")
    metrics = json.loads((tmp_path / "evaluated/metrics.json").read_text())
    known = CocoAnnotations.open(annotations)
    of_results = evaluate(known, from_coco_results(tmp_path / "evaluated/results.json", known), ("segm",))
    assert metrics["segm_mAP"] == pytest.approx(of_results["segm_mAP"])
