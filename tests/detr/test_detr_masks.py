"""Instance masks of RF-DETR beside transformers' own: losses, gradients, detections, metrics, and resumed runs."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import reports
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_against_transformers import assert_reports_pycocotools_numbers, small, watched_run
from test_resume import assert_same_bits, final_state
from tiny_detr import DETR_TYPES
from tiny_models import trial_classes
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from detr_files.model import build_detector, model_config
from detr_files.weights import load_start_weights
from detr_hyperparameters import DetrHyperparameters
from shared.errors import UserError

# not the size of the images: masks are resized to the input, and back
SIZE = {"height": 96, "width": 96}
CATEGORIES = [{"id": i + 1, "name": name} for i, name in enumerate(("rectangle", "circle", "triangle"))]


def masks_config(shapes, batches=2, **hyperparameters):
    config = small(shapes, "rf_detr", batches)
    config["hyperparameters"].update(masks=True, processor={"size": SIZE}, horizontal_flip=0.0, **hyperparameters)
    return config


def with_its_batches(trial_class):
    """The trial class, and the list that its batches are added to."""
    batches = []

    class Watched(trial_class):
        def losses(self, model, batch):
            batches.append(batch)
            return super().losses(model, batch)

    Watched.__module__ = trial_class.__module__
    return Watched, batches


@pytest.fixture(scope="module")
def trial_class():
    return trial_classes()["detr"]


@pytest.fixture(scope="module")
def trained(shapes, trial_class, tmp_path_factory):
    """A run of two batches whose searcher metric is of masks: its folder, its steps and its detections."""
    config = masks_config(shapes)
    config["searcher"]["metric"] = "segm_mAP"
    return watched_run(trial_class, config, tmp_path_factory.mktemp("masks"))


def test_a_step_with_masks_has_transformers_losses_and_gradients(shapes, trained):
    _, steps, _ = trained
    step, trial = steps[-1], steps[-1]["trial"]
    coco = COCO(str(shapes / "annotations/train.json"))
    label_of = {category_id: label for label, category_id in enumerate(sorted(coco.cats))}
    images, annotations = [], []
    for image_id in step["batch"].image_ids:
        images.append(Image.open(shapes / "train" / coco.imgs[image_id]["file_name"]).convert("RGB"))
        # transformers gives crowds' masks to other objects
        objects = [
            {**each, "category_id": label_of[each["category_id"]]}
            for each in coco.imgToAnns[image_id]
            if not each["iscrowd"]
        ]
        annotations.append({"image_id": image_id, "annotations": objects})
    inputs = trial.processor(
        images=images, annotations=annotations, return_segmentation_masks=True, return_tensors="pt"
    )
    for ours, theirs in zip(step["batch"].targets["labels"], inputs["labels"], strict=True):
        assert ours["masks"].any()
        assert torch.equal(ours["masks"], theirs["masks"])

    detector = step["model"].detector.train()
    torch.random.set_rng_state(step["random"])
    outputs = detector(pixel_values=inputs["pixel_values"], labels=inputs["labels"])
    outputs.loss.backward()
    for name in ("loss_mask_ce", "loss_mask_dice"):
        assert step["losses"][name].item() == pytest.approx(outputs.loss_dict[name].item(), rel=1e-6)
    assert step["losses"]["loss"].item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    assert step["gradients"].keys() == gradients.keys()
    assert "segmentation_bias" in gradients
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(step["gradients"][name] / largest, gradient / largest, rtol=0, atol=1e-6)


def test_masks_and_their_metrics_are_those_of_plain_transformers(shapes, trained, tmp_path, command, trial_class):
    run, _, detected = trained
    of_checkpoint = ["--checkpoint", run / "checkpoints/last", "--format", "transformers", "--output", tmp_path]
    command(trial_class, "export", run / "config.yaml", *of_checkpoint)
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    coco = COCO(str(shapes / "annotations/val.json"))
    category_ids, results, total = sorted(coco.cats), [], 0
    of_image = {found.image_id: found for found in detected}
    for image in coco.imgs.values():
        pixels = processor(images=Image.open(shapes / "val" / image["file_name"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**pixels)
        size = (image["height"], image["width"])
        (boxes,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size])
        (found,) = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )
        ours = of_image[image["id"]]
        torch.testing.assert_close(torch.tensor(ours.boxes), boxes["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.tensor(ours.scores), boxes["scores"], rtol=0, atol=1e-6)
        assert ours.labels.tolist() == boxes["labels"].tolist()
        masks = [coco_mask.decode(mask).astype(bool) for mask in ours.masks]
        assert all(mask.shape == size for mask in masks)
        # transformers omits empty masks; here, their boxes count
        seen = [i for i, mask in enumerate(masks) if mask.any()]
        assert [about["label_id"] for about in found["segments_info"]] == ours.labels[seen].tolist()
        scores = [about["score"] for about in found["segments_info"]]
        assert scores == pytest.approx(ours.scores[seen].tolist(), abs=1e-6)
        expected = [np.zeros(size, dtype=bool) for _ in masks]
        for i, mask in zip(seen, found["segmentation"].numpy(), strict=True):
            expected[i] = mask
        assert np.mean(np.array(expected) != np.array(masks)) < 1e-4  # rounding decides at a logit of 0
        total += np.sum(expected)
        for mask, score, label in zip(expected, boxes["scores"].tolist(), boxes["labels"].tolist(), strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            one = {"image_id": image["id"], "category_id": category_ids[label], "segmentation": rle, "score": score}
            results.append(one)
    assert total > 1000
    assert_reports_pycocotools_numbers(run, coco, results, "segm")


def test_predict_draws_the_masks_of_a_checkpoint(shapes, trained, tmp_path, command, trial_class):
    run, _, _ = trained
    image = shapes / "val/000000.png"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["hyperparameters"] = {"model": "gone"}  # the checkpoint's own config says that it has masks
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(config))
    arguments = ("--images", image, "--output", tmp_path / "out", "--min-score", 0)
    command(trial_class, "predict", tmp_path / "later.yaml", "--checkpoint", run / "checkpoints/last", *arguments)
    results = json.loads((tmp_path / "out/results.json").read_text())
    covered = np.any([coco_mask.decode(result["segmentation"]) for result in results], axis=0)
    (drawn,) = (tmp_path / "out").glob("*.png")
    changed = (np.asarray(Image.open(drawn).convert("RGB")) != np.asarray(Image.open(image).convert("RGB"))).any(axis=2)
    assert changed[covered].mean() > 0.9


@pytest.mark.slow
def test_a_resumed_run_with_masks_equals_an_uninterrupted_one(
    shapes, trial_class, train, crash_and_resume, without_figures
):
    config = masks_config(shapes, batches=4)
    config["hyperparameters"]["horizontal_flip"] = 0.5
    config["min_checkpoint_period"] = {"batches": 2}
    whole = train(trial_class, config, "whole")
    assert_same_bits(final_state(crash_and_resume(trial_class, config, 2)), final_state(whole))


def test_batches_without_objects_and_of_several_sizes_train(trial_class, train, tmp_path):
    """The two batches have wide and high images. One of them has no object."""
    images, annotations = [], []
    for i in range(8):
        width, height = (128, 96) if i % 2 else (96, 128)
        Image.new("RGB", (width, height), (20 * i, 90, 90)).save(tmp_path / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        polygon = [[10, 10, 70, 10, 70, 50, 10, 50]]
        shape = {"bbox": [10, 10, 60, 40], "area": 2400, "iscrowd": 0, "segmentation": polygon}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, **shape})
    content = {"images": images, "categories": CATEGORIES}
    (tmp_path / "val.json").write_text(json.dumps({**content, "annotations": annotations}))
    (tmp_path / "train.json").write_text(json.dumps({**content, "annotations": annotations[:1]}))
    config = masks_config(tmp_path, batches=2, validation_loss=True, class_weights={"rectangle": 2.0})
    config["hyperparameters"]["processor"] = {"size": {"shortest_edge": 96, "longest_edge": 128}}
    for split in ("train", "val"):
        config["data"][split] = {"annotations": str(tmp_path / f"{split}.json"), "images": str(tmp_path)}
    watched, batches = with_its_batches(trial_class)
    (report,) = reports(train(watched, config), "val")
    objects = [[len(label["masks"]) for label in batch.targets["labels"]] for batch in batches]
    assert sorted(map(sum, objects)) == [0, 1]
    for batch in batches:
        assert batch.targets["mask"] is not None
        assert all(label["masks"].shape[1:] == batch.images.shape[2:] for label in batch.targets["labels"])
    covered = sum(label["masks"].sum().item() for batch in batches for label in batch.targets["labels"])
    assert covered == pytest.approx(2400, rel=0.01)
    assert all(np.isfinite(value) for name, value in report["metrics"].items() if "loss" in name)


def test_augmented_masks_stay_on_their_boxes(shapes, trial_class, train):
    config = masks_config(shapes, batches=1)
    del config["hyperparameters"]["horizontal_flip"]
    config["data"]["augment"] = {"preset": "light", "flip": 1.0}
    watched, batches = with_its_batches(trial_class)
    train(watched, config)
    labels = [each for batch in batches for each in batch.targets["labels"]]
    boxes = torch.cat([each["boxes"] for each in labels])
    masks = torch.cat([each["masks"] for each in labels])
    assert len(boxes) == len(masks) > 4
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.nonzero().T
        middle = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
        torch.testing.assert_close(box[:2] * 96, torch.stack(middle), rtol=0, atol=2.0)


def test_masks_cannot_be_trained_on_boxes_alone(shapes, train, trial_class, tmp_path):
    config = masks_config(shapes)
    coco = json.loads((shapes / "annotations/train.json").read_text())
    for annotation in coco["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    config["data"]["train"]["annotations"] = str(tmp_path / "boxes.json")
    with pytest.raises(UserError, match=r"have no segmentation, the first has id \d+; the model detects masks. Fix: "):
        train(trial_class, config)


def test_the_config_of_a_folder_says_whether_the_model_has_masks(tmp_path):
    own = {"model_type": "rf_detr", **DETR_TYPES["rf_detr"]}
    built = build_detector(model_config(DetrHyperparameters(config=own, masks=True)), CATEGORIES)
    built.save_pretrained(tmp_path)
    for masks, name in ((None, "InstanceSegmentation"), (True, "InstanceSegmentation"), (False, "ObjectDetection")):
        config = model_config(DetrHyperparameters(model=str(tmp_path), masks=masks))
        assert type(build_detector(config, CATEGORIES)).__name__ == f"RfDetrFor{name}"


@pytest.mark.parametrize("masks", [True, False])
def test_published_boxes_start_masks_and_masks_start_boxes(masks, tmp_path):
    own = {"model_type": "rf_detr", **DETR_TYPES["rf_detr"]}
    published = build_detector(model_config(DetrHyperparameters(config=own, masks=not masks)), CATEGORIES)
    published.save_pretrained(tmp_path)
    hparams = DetrHyperparameters(model=str(tmp_path), weights="published", masks=masks)
    detector = build_detector(model_config(hparams), CATEGORIES)
    load_start_weights(detector, hparams, CATEGORIES)
    of_boxes = (detector.model if masks else detector).state_dict()
    expected = (published if masks else published.model).state_dict()
    assert all(torch.equal(of_boxes[name], value) for name, value in expected.items())


def test_masks_of_a_model_without_them_are_one_line_with_the_fix():
    hparams = DetrHyperparameters(config={"model_type": "detr", **DETR_TYPES["detr"]}, masks=True)
    with pytest.raises(UserError, match=r"hyperparameters.masks: 'detr' has no instance masks here. Fix: choose"):
        model_config(hparams)
