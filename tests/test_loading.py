"""Images and batches."""

import multiprocessing
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from shared.config.experiment import parse_data
from shared.data.annotations import CocoAnnotations
from shared.data.checks import check_images
from shared.data.dataset import BadImages, CocoDetection, SampleKey
from shared.data.loading import Batch, EvaluationBatchSampler, PrefetchLoader, start_workers
from shared.data.open import open_split
from shared.data.storage import DiskImages
from shared.errors import UserError


def sample(image, record):
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    return image, record, draws


def dataset(shapes, training=True, seed=0):
    annotations = CocoAnnotations.open(shapes / "annotations/train.json")
    return CocoDetection(annotations, DiskImages(shapes / "train"), sample, seed, training)


def test_random_numbers_follow_from_seed_epoch_and_index_alone(shapes):
    data = dataset(shapes)
    first = data[SampleKey(2, 5)][2]
    random.seed(99)
    data[SampleKey(0, 1)]
    assert data[SampleKey(2, 5)][2] == first
    others = [data[SampleKey(1, 5)], data[SampleKey(2, 6)], dataset(shapes, seed=1)[SampleKey(2, 5)]]
    assert all(first[k] != other[2][k] for other in others for k in range(3))


def test_boxes_without_area_are_no_training_targets(shapes):
    data = dataset(shapes)
    coco_boxes = data.annotations.columns["boxes"].copy()
    coco_boxes[0, 2] = 0
    data.annotations.columns["boxes"] = coco_boxes
    record, whole = data[0][1], data.annotations[0]
    assert len(record.boxes) == len(record.labels) == len(record.segmentations) == len(whole.boxes) - 1
    data.training = False
    assert len(data[0][1].boxes) == len(whole.boxes)


def test_missing_images_are_named_before_anything_is_read(shapes):
    annotations = CocoAnnotations.open(shapes / "annotations/train.json")
    with pytest.raises(UserError, match=r"data\.train\.images: 14 of the 24 .* first is 000010\.png"):
        check_images(annotations, DiskImages(shapes / "val"), "data.train.images")
    with pytest.raises(UserError, match=r"data\.val\.images: /nowhere is not a folder"):
        open_split(parse_data({"data": {"val": {"annotations": str(annotations.path), "images": "/nowhere"}}}), "val")


def test_an_image_that_cannot_be_decoded_is_named(shapes, tmp_path):
    for file in (shapes / "train").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "000000.png").write_bytes(b"no image")
    data = dataset(shapes)
    data.images = DiskImages(tmp_path)
    with pytest.raises(UserError, match=r"000000\.png \(image id 1\) cannot be read"):
        data[0]
    Image.new("RGB", (5, 5)).save(tmp_path / "000001.png")
    with pytest.raises(UserError, match=r"000001\.png \(image id 2\) has 5×5 pixels"):
        data[1]


def test_a_bad_image_is_replaced_by_the_next_of_its_size_or_shape():
    rng = np.random.default_rng(0)
    widths = rng.integers(5, 15, 60).tolist()
    images = [{"id": i, "file_name": str(i), "width": width, "height": 10} for i, width in enumerate(widths)]
    annotations = CocoAnnotations.from_dict(
        {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    )
    read = []

    class Nothing:
        def read(self, file_name):
            read.append(int(file_name))
            return b""

    wide = np.array(widths) > 10
    for in_use in (None, rng.permutation(60)[:40], np.array([7, 7, 3])):
        data = CocoDetection(annotations, Nothing(), sample, 0, True, BadImages(skip=True), in_use=in_use)
        for index in (0, 7, 31, 59):
            read.clear()
            with pytest.raises(UserError, match="none of the images"):
                data[index]
            used = range(60) if in_use is None else set(in_use.tolist())
            of_size = [i for i in used if widths[i] == widths[index]]
            first = min(of_size, default=index)
            expected = [i for i in [*range(index + 1, 60), *range(index)] if i in of_size]
            # of another size the same for all of this one
            expected += [i for i in [*range(first, 60), *range(first)] if i in used and i not in of_size]
            assert read == [index, *(i for i in expected if wide[i] == wide[index])]


def test_batches_come_prepared_in_order_and_numbered():
    batches = [Batch(torch.full((2, 1), i), {"t": torch.tensor([i])}, [i, i]) for i in range(4)]

    def prepare(batch, number):
        return Batch(batch.images + 10, batch.targets, [*batch.image_ids, number])

    loader = PrefetchLoader(batches, torch.device("cpu"), prepare, first_batch=5)
    seen = list(loader)
    assert [batch.images[0].item() for batch in seen] == [10, 11, 12, 13]
    assert [batch.image_ids[-1] for batch in seen] == [5, 6, 7, 8]
    assert loader.waiting > 0


def test_workers_started_ahead_give_every_validation_batch():
    loader = DataLoader(
        range(5), batch_sampler=EvaluationBatchSampler(range(5), 2), num_workers=2, persistent_workers=True
    )
    start_workers(loader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    assert multiprocessing.active_children() == workers
