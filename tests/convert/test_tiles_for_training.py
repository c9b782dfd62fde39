"""`convert tiles`: a data set cut into tiles."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from shared.data.annotations import CocoAnnotations
from shared.data.convert.conversion import main
from shared.errors import UserError
from shared.evaluation.detections import as_rle

SIZE = (200, 120)
POLYGON = [40, 20, 110, 20, 110, 60, 40, 60]  # 70 wide: the tile from 0 to 100 shows 60 of it


@pytest.fixture
def convert(tmp_path):
    """`convert tiles` of one image with these annotations. Returns the tiles' records by name."""

    def call(*annotations, tiles=100, overlap=0.0):
        rng = np.random.default_rng(0)
        (tmp_path / "in/street").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in/street/a.png")
        rows = [
            {"id": i + 1, "image_id": 5, "category_id": 3, "iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a}
            for i, a in enumerate(annotations)
        ]
        image = {"id": 5, "file_name": "street/a.png", "width": SIZE[0], "height": SIZE[1]}
        categories = [{"id": 3, "name": "car"}]
        coco = {"images": [image], "annotations": rows, "categories": categories}
        (tmp_path / "in.json").write_text(json.dumps(coco))
        source, output = str(tmp_path / "in.json"), str(tmp_path / "out.json")
        options = ("--images", str(tmp_path / "in"), "--tiles", str(tiles), "--overlap", str(overlap))
        main(["tiles", source, output, *options])
        for record in (tiles := {r.file_name: r for r in CocoAnnotations.open(output)}).values():
            x, y = map(int, record.file_name.removesuffix(".png").split("_")[1:])
            tile = np.asarray(Image.open(tmp_path / "out_images" / record.file_name))
            np.testing.assert_array_equal(tile, pixels[y : y + record.height, x : x + record.width])
        return tiles

    return call


def test_tiles_hold_the_pixels_and_boxes_are_clipped_to_them(convert, capsys):
    tiles = convert({"bbox": [40, 20, 100, 40]}, {"bbox": [10, 90, 12, 20]})
    assert set(tiles) == {"street/a_0_0.png", "street/a_100_0.png", "street/a_0_20.png", "street/a_100_20.png"}
    assert tiles["street/a_0_0.png"].boxes.tolist() == [[40, 20, 100, 60], [10, 90, 22, 100]]
    assert tiles["street/a_100_0.png"].boxes.tolist() == [[0, 20, 40, 60]]
    assert tiles["street/a_0_20.png"].boxes.tolist() == [[40, 0, 100, 40], [10, 70, 22, 90]]
    said = capsys.readouterr().out
    assert "images 4, boxes 6" in said
    assert "out_images" in said


def test_an_object_that_a_tile_hardly_shows_is_omitted_and_counted(convert, capsys):
    tiles = convert({"bbox": [10, 20, 95, 30]})  # 5 of 95 pixels are in the other tile
    assert tiles["street/a_0_0.png"].boxes.tolist() == [[10, 20, 100, 50]]
    assert len(tiles["street/a_100_0.png"].boxes) == 0
    assert "parts left out (under 30% of the object) 2" in capsys.readouterr().out


@pytest.mark.parametrize("as_mask", [False, True])
def test_polygons_and_masks_are_clipped_to_a_tile(convert, as_mask):
    whole = as_rle([POLYGON], SIZE[1], SIZE[0])
    pixels = coco_mask.decode(whole)
    rle = {"size": [SIZE[1], SIZE[0]], "counts": whole["counts"].decode()}
    tiles = convert({"bbox": [40, 20, 70, 40], "segmentation": rle if as_mask else [POLYGON], "area": 2800})
    record = tiles["street/a_0_0.png"]
    mask = coco_mask.decode(as_rle(record.segmentations[0], 100, 100))
    np.testing.assert_array_equal(mask, pixels[:100, :100])
    assert record.boxes.tolist() == [[40, 20, 100, 60]]
    assert record.areas.tolist() == [2400]


def test_keypoints_that_a_tile_does_not_show_are_not_labelled(convert):
    points = [60, 30, 2, 105, 40, 1, 0, 0, 0]
    tiles = convert({"bbox": [40, 20, 100, 40], "keypoints": points, "num_keypoints": 2})
    assert tiles["street/a_0_0.png"].keypoints.tolist() == [[[60, 30, 2], [0, 0, 0], [0, 0, 0]]]
    assert tiles["street/a_100_0.png"].keypoints.tolist() == [[[0, 0, 0], [5, 40, 1], [0, 0, 0]]]


def test_an_object_in_the_overlap_is_complete_in_both_tiles(convert):
    tiles = convert({"bbox": [50, 20, 20, 20], "area": 123.0}, tiles=120, overlap=0.5)
    whole = [record for record in tiles.values() if len(record.boxes)]
    assert [record.areas.tolist() for record in whole] == [[123.0]] * 2
    assert {tuple(np.ptp(record.boxes[0].reshape(2, 2), axis=0)) for record in whole} == {(20, 20)}


def test_a_tile_size_of_zero_is_one_line(convert):
    with pytest.raises(UserError, match=r"--tiles: 0 pixels that overlap by 0\. Fix: give one pixel"):
        convert({"bbox": [1, 1, 9, 9]}, tiles=0)
