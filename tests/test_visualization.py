"""Pictures of detections."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.evaluation.detections import Detections
from shared.evaluation.visualization import figure_of, save, side_by_side

CATS_AND_DOGS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@pytest.fixture
def detections():
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[30:50, 40:70] = 1
    return Detections(1, [[40, 30, 70, 50], [0, 0, 9, 9]], [0.9, 0.1], [0, 1], masks=[coco_mask.encode(mask)] * 2)


def test_a_png_has_the_image_s_size_and_shows_only_sure_detections(detections, tmp_path):
    image = Image.new("RGB", (80, 60), "white")
    save(figure_of(image, detections, CATS_AND_DOGS, min_score=0.3), tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert drawn.shape == (60, 80, 3)
    assert (drawn[35:48, 45:65] != 255).any(axis=2).mean() > 0.9  # the mask
    assert (drawn[:9, :9] == 255).all()  # score 0.1
    assert (drawn[55:, :] == 255).all()


def test_pdf_by_the_name_s_ending(detections, tmp_path):
    save(figure_of(Image.new("RGB", (80, 60)), detections, CATS_AND_DOGS, 0.3), tmp_path / "p.pdf")
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")


def test_truth_and_detections_stand_side_by_side(tmp_path):
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 8))
    image, _ = synthetic.draw_sample(1, 7)
    record = annotations[7]
    found = Detections(record.image_id, record.boxes, np.ones(len(record.boxes)), record.labels)
    figure = side_by_side([(image, record, found)], annotations.categories)
    left, right = figure.axes
    captions = [[text.get_text() for text in axes.texts] for axes in (left, right)]
    assert any("(crowd)" in caption for caption in captions[0])
    assert all(caption.endswith("1.00") for caption in captions[1])
    save(figure, tmp_path / "p.png")


def test_the_truth_has_its_masks_where_the_detections_have_some():
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 8))
    image, _ = synthetic.draw_sample(1, 7)
    record = annotations[7]  # polygons and a crowd's RLE
    masks = [coco_mask.encode(np.asfortranarray(np.ones((128, 128), np.uint8)))] * len(record.boxes)
    found = Detections(record.image_id, record.boxes, np.ones(len(record.boxes)), record.labels, masks)
    for detections, drawn in ((found, len(record.boxes)), (Detections(8, [], [], []), 0)):
        left, _ = side_by_side([(image, record, detections)], annotations.categories).axes
        overlays = left.images[1:]
        assert len(overlays) == (drawn > 0)
        for overlay in overlays:
            colors = {tuple(color) for color in overlay.get_array().reshape(-1, 4) if color[3]}
            assert len(colors) == len(set(record.labels.tolist()))


def test_keypoints_are_drawn_with_their_skeleton():
    categories = [{"id": 1, "name": "person", "keypoints": ["a", "b", "c"], "skeleton": [[1, 2], [2, 3]]}]
    points = [[[20, 20, 0.9], [60, 20, 0.9], [40, 50, 0.0]]]  # the third is not there
    detections = Detections(1, [[10, 10, 70, 55]], [0.9], [0], keypoints=points)
    axes = figure_of(Image.new("RGB", (80, 60)), detections, categories, 0.3).axes[0]
    (limb,) = axes.lines
    assert limb.get_xydata().tolist() == [[20.5, 20.5], [60.5, 20.5]]
    assert len(axes.collections[0].get_offsets()) == 2


def test_an_image_of_many_pixels_is_drawn_smaller(tmp_path):
    width, height = 9000, 3000
    mask = coco_mask.encode(np.asfortranarray(np.ones((height, width), np.uint8)))
    detections = Detections(1, [[0, 0, width, height]], [0.9], [0], masks=[mask])
    save(figure_of(Image.new("RGB", (width, height)), detections, CATS_AND_DOGS, 0.3), tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (4000, 1333)
