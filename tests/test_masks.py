"""Masks as COCO's RLE: the bytes that pycocotools gives for the whole image."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from shared.data.annotations import CocoAnnotations
from shared.evaluation import detections as masks_module
from shared.evaluation.detections import encode_masks, encode_on_device

HEIGHT, WIDTH = 12, 17


def drawn() -> np.ndarray:
    """(N, HEIGHT, WIDTH) masks with unusual shapes."""
    rng = np.random.default_rng(0)
    masks = [rng.random((HEIGHT, WIDTH)) < share for share in (0.02, 0.5, 0.98)]
    covered = [
        (slice(0), slice(0)),  # nothing
        (slice(None), slice(None)),  # everything
        (slice(4, 5), slice(7, 8)),  # a pixel
        (slice(0, 1), slice(0, 1)),  # the first one
        (slice(-1, None), slice(-1, None)),  # the last one
        (slice(0, 3), slice(0, 4)),
        (slice(-3, None), slice(-4, None)),
        (slice(None), slice(5, 7)),  # whole columns
        (slice(2, 4), slice(None)),  # whole rows
    ]
    for part in covered:
        masks.append(np.zeros((HEIGHT, WIDTH), bool))
        masks[-1][part] = True
    return np.stack(masks)


def expected(masks: np.ndarray) -> list[dict]:
    return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


@pytest.mark.parametrize("kind", [bool, np.uint8])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_bytes_equal_those_of_the_full_mask(kind, order):
    masks = np.asarray(drawn(), dtype=kind, order=order)
    assert encode_masks(masks) == expected(masks)
    assert encode_masks(masks[2:3]) == expected(masks[2:3])
    assert encode_masks([]) == []


def test_where_runs_begin_gives_the_same_bytes():
    masks = drawn()
    assert encode_on_device(torch.from_numpy(masks)) == expected(masks)
    for few in (0, 1):
        assert encode_on_device(torch.from_numpy(masks[:few])) == expected(masks[:few])


def test_masks_encoded_a_few_at_a_time_give_the_same_bytes(monkeypatch):
    monkeypatch.setattr(masks_module, "PIXELS_AT_ONCE", 5 * HEIGHT * WIDTH)
    assert encode_on_device(torch.from_numpy(drawn())) == expected(drawn())


def test_the_masks_of_coco_s_images_give_the_same_bytes(coco_tiny):
    compared = 0
    for record in CocoAnnotations.open(coco_tiny / "annotations/instances_val2017.json"):
        rles = [
            coco_mask.merge(coco_mask.frPyObjects(s, record.height, record.width))
            for s in record.segmentations
            if isinstance(s, list)
        ]
        if rles:
            masks = np.ascontiguousarray(coco_mask.decode(rles).transpose(2, 0, 1))
            assert encode_masks(masks) == encode_on_device(torch.from_numpy(masks).bool()) == expected(masks)
            compared += len(masks)
    assert compared > 300
