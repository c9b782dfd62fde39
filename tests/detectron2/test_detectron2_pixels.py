"""Samples of Detectron2's mapper: bit-for-bit equal, and nearly equal with `data.fast_images`."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from PIL import Image

from detectron2_files.data import MapperTransform, to_dataset_dict
from detectron2_files.pixels import with_quick_resizing
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import seed_all
from shared.data.storage import DiskImages
from shared.data.synthetic import write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, train=6, val=1)
    for i, file in enumerate(sorted((folder / "train").iterdir())):
        x, y = np.meshgrid(np.linspace(0, 9, 128), np.linspace(0, 7, 128))
        waves = np.stack([np.sin(x + y + i), np.cos(x * 2), np.sin(y * 3)], axis=-1) * 120 + 128
        Image.fromarray(waves.astype(np.uint8)).save(file)
    return CocoAnnotations.open(folder / "annotations/train.json"), DiskImages(folder / "train")


def mapper_of(image_format="BGR", **settings):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = image_format
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (100, 150, 260), 300
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.CROP.ENABLED = settings.get("crop", False)
    mapper = DatasetMapper(cfg, settings.get("training", True))
    if settings.get("flip_first"):
        mapper.augmentations = T.AugmentationList([T.RandomFlip(), T.Resize((200, 90))])
    return mapper


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize("settings", [{}, {"training": False}, {"crop": True}, {"flip_first": True}])
def test_samples_are_the_mapper_s_and_fast_ones_next_to_them(data, image_format, settings):
    annotations, images = data
    mapper = mapper_of(image_format, **settings)
    exact, fast = (MapperTransform(with_quick_resizing(mapper, fast), True) for fast in (False, True))
    for number in range(18):
        record = annotations[number % len(annotations)]
        content = images.read(record.file_name)
        seed_all(5, number)
        expected = mapper({**to_dataset_dict(record), "file_name": str(images.folder / record.file_name)})
        seed_all(5, number)
        sample = exact(content, record)
        seed_all(5, number)
        fast_sample = fast(content, record)
        assert torch.equal(sample["image"], expected["image"])
        assert sample["image"].is_contiguous()
        assert (fast_sample["image"].int() - expected["image"].int()).abs().max() <= 2
        if "instances" in expected:
            for found in (sample["instances"], fast_sample["instances"]):
                assert torch.equal(found.gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
                assert torch.equal(found.gt_classes, expected["instances"].gt_classes)
                assert str(found.gt_masks.polygons) == str(expected["instances"].gt_masks.polygons)


def test_another_mapper_stays_unchanged_and_is_logged(caplog):
    def mapper(dataset_dict):
        return dataset_dict

    with caplog.at_level(logging.WARNING):
        assert with_quick_resizing(mapper, fast=False) is mapper
        assert not caplog.messages
        assert with_quick_resizing(mapper, fast=True) is mapper
    assert "data.fast_images does nothing for function" in caplog.text
