"""The synthetic data set."""

import subprocess
import sys

import numpy as np
from conftest import ROOT
from pycocotools import mask as coco_mask

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations


def test_it_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (synthetic.coco_split(seed, 10) for seed in (1, 1, 2))
    assert first == again
    assert first["annotations"] != other["annotations"]
    image, _ = synthetic.draw_sample(1, 4)
    np.testing.assert_array_equal(image, synthetic.draw_sample(1, 4)[0])


def test_it_has_three_categories_crowds_and_masks_that_fit_their_boxes():
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 32))
    assert annotations.category_names == ["rectangle", "circle", "triangle"]
    assert sum(record.iscrowd.sum() for record in annotations) == 2
    for record in annotations:
        assert (record.boxes >= 0).all()
        assert (record.boxes <= 128).all()
        for box, segmentation in zip(record.boxes, record.segmentations, strict=True):
            if isinstance(segmentation, list):
                segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, record.height, record.width))
            x, y, width, height = coco_mask.toBbox(segmentation)
            # a triangle's tip is thinner than a pixel, and COCO draws it otherwise
            np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=1.5)


def test_boxes_and_areas_are_those_of_the_pixels_that_are_drawn():
    off = []
    for index in range(64):
        image, annotations = synthetic.draw_sample(1, index)
        pixels, last = np.asarray(image), annotations[-1]  # which nothing hides
        if last["iscrowd"]:
            continue
        x, y, width, height = last["bbox"]
        color = pixels[int(y + 0.6 * height), int(x + width / 2)]
        rows, columns = np.nonzero((pixels == color).all(axis=2))
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        off.append(drawn - [x, y, x + width, y + height])
        assert last["area"] == len(rows)
        # and its polygon is where the pixels are
        xs, ys = np.reshape(last["segmentation"][0], (-1, 2)).T
        edges = [xs.min(), ys.min(), xs.max(), ys.max()]
        tip = {1: 0, 2: 0.25, 3: 1}[last["category_id"]]  # which is thinner than a pixel
        np.testing.assert_allclose(drawn, edges, atol=0.51 + tip)
    assert len(off) > 60
    assert not np.any(off)


def test_the_command_writes_a_coco_data_set(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "shared", "synthetic", tmp_path, "--train", "3", "--val", "2"], check=True, cwd=ROOT
    )
    for split, count in (("train", 3), ("val", 2)):
        annotations = CocoAnnotations.open(tmp_path / f"annotations/{split}.json")
        assert len(annotations) == count
        assert all((tmp_path / split / record.file_name).is_file() for record in annotations)
