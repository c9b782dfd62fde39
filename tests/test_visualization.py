"""Pictures of detections."""

import gc
import weakref

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image
from pycocotools import mask as coco_mask
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

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


@pytest.mark.parametrize(("width", "height"), [(80, 60), (1200, 900), (1001, 333)])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_box_s_line_lies_on_the_edge_of_what_it_is_around(width, height, shift, tmp_path):
    x1, y1, x2, y2 = box = np.array([width // 4, height // 3, width // 2, 3 * height // 4]) + shift
    image = np.full((height, width, 3), 255, np.uint8)
    image[int(y1) : int(y2), int(x1) : int(x2)] = 0
    categories = [{"id": 1, "name": ""}]
    drawn = {}
    for name, boxes in (("without", np.zeros((0, 4))), ("with", [box])):
        figure = figure_of(
            Image.fromarray(image), Detections(1, boxes, [0.9] * len(boxes), [0] * len(boxes)), categories, 0
        )
        for text in figure.axes[0].texts:
            text.set_visible(False)
        save(figure, tmp_path / "p.png")
        drawn[name] = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(float)
    np.testing.assert_array_equal(drawn["without"], image)  # pixel for pixel
    covered = ((drawn["with"] - image) / (np.array([31, 119, 180]) - image))[..., 1]  # by the line, tab:blue
    row, column = covered[int(y1 + y2) // 2], covered[:, int(x1 + x2) // 2]
    for across, edges in ((row, (x1, x2)), (column, (y1, y2))):
        middle = int(sum(edges)) // 2
        for edge, start, part in ((edges[0], 0, across[:middle]), (edges[1], middle, across[middle:])):
            centers = start + np.arange(len(part)) + 0.5
            assert (centers * part).sum() / part.sum() == pytest.approx(edge, abs=0.05)


def test_a_mask_covers_its_own_pixels(tmp_path):
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[20:40, 30:60] = 1
    detections = Detections(1, [[0, 0, 0, 0]], [0.9], [0], masks=[coco_mask.encode(mask)])
    figure = figure_of(Image.new("RGB", (80, 60), "white"), detections, [{"id": 1, "name": ""}], 0)
    for artist in (*figure.axes[0].texts, *figure.axes[0].patches):
        artist.set_visible(False)
    save(figure, tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    np.testing.assert_array_equal((drawn != 255).any(axis=2), mask > 0)


def test_tensorboard_takes_the_figures_and_none_stays_open(tmp_path):
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 2))
    samples = []
    for i, record in enumerate(annotations):
        found = Detections(record.image_id, record.boxes, np.ones(len(record.boxes)), record.labels)
        samples.append((synthetic.draw_sample(1, i)[0], record, found))
    figures = []
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            figure = side_by_side(samples, annotations.categories, dpi=70)
            writer.add_figure("detections", figure, step)
            figures.append(weakref.ref(figure))
            del figure
    gc.collect()
    assert not pyplot.get_fignums()
    assert not any(figure() for figure in figures)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [(image.step, image.width, image.height) for image in events.Images("detections")] == [
        (step, 980, 840) for step in range(3)
    ]


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
