"""Pictures of detections."""

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image
from pycocotools import mask as coco_mask
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shared.data import synthetic
from shared.data.annotations import CocoAnnotations
from shared.evaluation import drawing, lettering
from shared.evaluation.detections import Detections
from shared.evaluation.drawing import (
    Objects,
    draw,
    objects_of_truth,
    page_of_truth,
    picture_of,
    save,
    save_picture_of,
    side_by_side,
)
from shared.evaluation.lettering import color_of, on_color

CATS_AND_DOGS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@pytest.fixture
def detections():
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[30:50, 40:70] = 1
    return Detections(1, [[40, 30, 70, 50], [0, 0, 9, 9]], [0.9, 0.1], [0, 1], masks=[coco_mask.encode(mask)] * 2)


@pytest.fixture
def without_captions(monkeypatch):
    nothing = Image.new("RGB", (0, 0))
    monkeypatch.setattr("shared.evaluation.drawing._caption", lambda *_: nothing)


def test_a_png_has_the_image_s_size_and_shows_only_sure_detections(detections, tmp_path):
    image = Image.new("RGB", (80, 60), "white")
    save(picture_of(image, detections, CATS_AND_DOGS, min_score=0.3), tmp_path / "p.png")
    assert np.asarray(image).min() == 255  # the caller's own
    with Image.open(tmp_path / "p.png") as written:
        assert drawing.is_drawn(written)
        drawn = np.asarray(written.convert("RGB"))
    assert drawn.shape == (60, 80, 3)
    assert (drawn[35:48, 45:65] != 255).any(axis=2).mean() > 0.9  # the mask
    assert (drawn[:9, :9] == 255).all()  # score 0.1
    assert (drawn[55:, :] == 255).all()


@pytest.mark.parametrize(("width", "height"), [(80, 60), (1200, 900), (1001, 333)])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_box_s_line_lies_on_the_edge_of_what_it_is_around(width, height, shift, without_captions):
    x1, y1, x2, y2 = box = np.array([width // 4, height // 3, width // 2, 3 * height // 4]) + shift
    image = np.full((height, width, 3), 255, np.uint8)
    image[int(y1) : int(y2), int(x1) : int(x2)] = 0
    drawn = {}
    for name, boxes in (("without", np.zeros((0, 4))), ("with", [box])):
        found = Detections(1, boxes, [0.9] * len(boxes), [0] * len(boxes))
        drawn[name] = np.asarray(picture_of(Image.fromarray(image), found, CATS_AND_DOGS, 0)).astype(float)
    np.testing.assert_array_equal(drawn["without"], image)  # pixel for pixel
    covered = ((drawn["with"] - image) / (np.array(color_of(0)) - image))[..., 1]  # by the line
    row, column = covered[int(y1 + y2) // 2], covered[:, int(x1 + x2) // 2]
    for across, edges in ((row, (x1, x2)), (column, (y1, y2))):
        middle = int(sum(edges)) // 2
        for edge, start, part in ((edges[0], 0, across[:middle]), (edges[1], middle, across[middle:])):
            centers = start + np.arange(len(part)) + 0.5
            assert (centers * part).sum() / part.sum() == pytest.approx(edge, abs=0.05)


def test_a_mask_covers_its_own_pixels(without_captions):
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[20:40, 30:60] = 1
    detections = Detections(1, [[0, 0, -9, -9]], [0.9], [0], masks=[coco_mask.encode(mask)])
    drawn = np.asarray(picture_of(Image.new("RGB", (80, 60), "white"), detections, CATS_AND_DOGS, 0))
    covered = (drawn != 255).any(axis=2)
    np.testing.assert_array_equal(covered[3:, 3:], mask[3:, 3:] > 0)


@pytest.mark.parametrize("box", [(0, 0, 80, 60), (-20, -20, 5, 5), (75, 55, 90, 70), (70, 2, 79, 58)])
@pytest.mark.parametrize("name", ["cat", "a very long name of a category that does not fit at all"])
def test_a_caption_fits_into_the_picture(box, name, monkeypatch):
    pasted = []
    whole = Image.Image.paste

    def paste(self, im, place=None, mask=None):
        if self.size == (80, 60) and isinstance(im, Image.Image) and mask is None:
            pasted.append((*place, *im.size))
        whole(self, im, place, mask)

    monkeypatch.setattr(Image.Image, "paste", paste)
    picture_of(Image.new("RGB", (80, 60)), Detections(1, [box], [0.9], [0]), [{"id": 1, "name": name}])
    ((left, top, width, height),) = pasted
    assert left >= 0
    assert top >= 0
    assert 20 < width <= 80 - left
    assert 8 < height <= 60 - top


def test_lines_and_letters_scale_with_the_image():
    colored = []
    for scale in (2, 5, 15):
        width, height = 600 * scale, 200 * scale
        boxes = np.array([[100, 100, 500, 180]]) * scale
        drawn = np.asarray(
            picture_of(Image.new("RGB", (width, height)), Detections(1, boxes, [0.9], [0]), CATS_AND_DOGS)
        )
        colored.append(drawn.any(axis=2).mean())
    assert drawn.shape == (1333, 4000, 3)
    assert colored == pytest.approx([colored[0]] * 3, rel=0.2)
    mask = coco_mask.encode(np.asfortranarray(np.ones((3000, 9000), np.uint8)))
    covered = Detections(1, [[0, 0, 9000, 3000]], [0.9], [0], masks=[mask])
    assert np.asarray(picture_of(Image.new("RGB", (9000, 3000)), covered, CATS_AND_DOGS)).any(axis=2).all()


def test_80_classes_have_80_colors_that_letters_can_be_read_on():
    colors = np.array([color_of(label) for label in range(80)]).astype(float)
    apart = np.linalg.norm(colors[:, None] - colors, axis=2)
    assert apart[~np.eye(80, dtype=bool)].min() > 25
    for color in colors:
        assert abs(np.array(on_color(tuple(color))) - color).mean() > 60
    assert color_of(3) == color_of(3 + 256)


@pytest.mark.parametrize("name", ["Größe", "кошка", "犬", "แมว", "كلب", "🐕 dog", "a\nb", ""])
def test_names_in_any_script_are_drawn_and_missing_glyphs_reported_once(name, monkeypatch, caplog):
    monkeypatch.setattr(lettering, "_system_fonts", lambda: [])
    monkeypatch.setattr(lettering, "_warned_of", set())
    for cached in (lettering.lettering, lettering.runs_of):
        cached.cache_clear()
    with caplog.at_level(logging.WARNING):
        for score in (0.8, 0.9):
            picture_of(Image.new("RGB", (80, 60)), Detections(1, [[9, 9, 50, 50]], [score], [0]), [{"name": name}])
    expected = {"犬": "犬.*fonts-noto-cjk", "แมว": "แ.*fonts-noto-core", "🐕 dog": "🐕.*fonts-symbola"}
    assert len(caplog.records) == (name in expected)
    if name in expected:
        assert re.search(expected[name], caplog.text)


def test_missing_letters_come_from_another_font(monkeypatch):
    other = str(Path(lettering.DEFAULT_FONT).with_name("STIXGeneral.ttf"))
    lacking = set(FT2Font(other).get_charmap()) - set(FT2Font(lettering.DEFAULT_FONT).get_charmap())
    letter = next(chr(code) for code in sorted(lacking) if chr(code).isalpha())
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ["/no/font.ttf", other])
    lettering.runs_of.cache_clear()
    assert lettering.runs_of(f"犬{letter} ж") == [
        (lettering.DEFAULT_FONT, "犬"),
        (other, f"{letter} "),
        (lettering.DEFAULT_FONT, "ж"),
    ]
    assert lettering.runs_of(letter) == [(other, letter)]


def test_tensorboard_takes_the_truth_and_the_detections_side_by_side(tmp_path):
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 2))
    samples = []
    for i, record in enumerate(annotations):
        found = Detections(record.image_id, record.boxes, np.ones(len(record.boxes)), record.labels)
        samples.append((synthetic.draw_sample(1, i)[0], record, found))
    picture = side_by_side(samples, annotations.categories, width=700)
    with SummaryWriter(tmp_path) as writer:
        writer.add_image("detections", np.asarray(picture), 3, dataformats="HWC")
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    ((step, width, height),) = [(image.step, image.width, image.height) for image in events.Images("detections")]
    assert (step, width) == (3, 700)
    assert 2 * 330 < height < 760


def test_a_pdf_by_the_name_s_ending_has_the_captions_as_text(detections, tmp_path):
    points = Detections(1, detections.boxes, [0.9, 0.8], [0, 1], detections.masks, [[[20, 20, 0.9], [60, 20, 0.9]]] * 2)
    categories = [{**category, "skeleton": [[1, 2]]} for category in CATS_AND_DOGS]
    save_picture_of(tmp_path / "p.pdf", Image.new("RGB", (80, 60)), points, categories, 0.3)
    written = (tmp_path / "p.pdf").read_bytes()
    assert written.startswith(b"%PDF")
    assert b"DejaVuSans" in written
    assert b"/MediaBox [ 0 0 80 60 ]" in written


def test_the_truth_s_crowds_say_so_and_its_masks_are_filled():
    annotations = CocoAnnotations.from_dict(synthetic.coco_split(1, 8))
    image, _ = synthetic.draw_sample(1, 7)
    record = annotations[7]  # polygons and a crowd's RLE
    truth = objects_of_truth(record, annotations.categories, with_masks=True)
    assert truth.endings[0] == " (crowd)"
    assert truth.endings[1:] == [""] * (len(record.boxes) - 1)
    with_masks, without = (
        np.asarray(page_of_truth([(image, r)], annotations.categories)).astype(int)
        for r in (
            record,
            dataclasses.replace(record, raw_segmentations=[b"null"] * len(truth.labels)),
        )
    )
    changed = (with_masks != without).any(axis=2).sum() / (590 / 128) ** 2
    areas = sum(coco_mask.area(mask) for mask in truth.masks)
    assert changed == pytest.approx(areas, rel=0.3)  # captions and lines are over them
    found = Detections(record.image_id, record.boxes, np.ones(len(record.boxes)), record.labels, truth.masks)
    assert side_by_side([(image, record, found)], annotations.categories).width == 1400


def test_keypoints_are_drawn_with_their_skeleton(without_captions):
    categories = [{"id": 1, "name": "person", "keypoints": ["a", "b", "c"], "skeleton": [[1, 2], [2, 3]]}]
    points = [[[20, 20, 0.9], [60, 20, 0.9], [40, 50, 0.0]]]  # the third is not there
    detections = Detections(1, [[0, 0, 0, 0]], [0.9], [0], keypoints=points)
    drawn = np.asarray(picture_of(Image.new("RGB", (80, 60)), detections, categories, 0.3)).any(axis=2)
    assert drawn[20, 20:61].all()  # the limb
    assert drawn[18, 20]  # the joint is rounder than it
    assert not drawn[26:].any()


def test_nothing_to_draw_is_the_image_itself():
    image = Image.new("L", (5, 3), 7)
    picture = draw(image, Objects(np.zeros((0, 4)), [], [], []))
    assert (picture.mode, picture.size, picture.getpixel((2, 2))) == ("RGB", (5, 3), (7, 7, 7))
