"""`--tiles`: detections in parts of large images become the image's detections."""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from conftest import run_command
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from shared.commands.evaluate import evaluate
from shared.commands.predict import predict
from shared.config.schema import TrainingHyperparameters
from shared.data.dataset import CocoDetection
from shared.data.loading import Batch
from shared.data.tiles import Tiling, open_windows
from shared.errors import UserError
from shared.evaluation.detections import Detections, encode_masks
from shared.training.trial import DetectionTrial


@dataclass
class Hyperparameters(TrainingHyperparameters):
    global_batch_size: int = 2


class FindsWhite(DetectionTrial):
    """Finds each white rectangle, cut off where the tile cuts it, with its mask and its center."""

    hyperparameters_class = Hyperparameters
    pretrained_categories = ({"id": 7, "name": "rectangle"},)
    shown = ()

    def check_pretrained(self):
        pass

    def build_model(self):
        return torch.nn.Linear(1, 1)

    def evaluation_dataset(self, data):
        return CocoDetection(
            data.annotations, data.images, lambda image, record: (image, record), 0, False, self.bad_images
        )

    def collate(self, training):
        return lambda samples: Batch(
            [np.asarray(image) for image, _ in samples], None, [r.image_id for _, r in samples]
        )

    def detect(self, model, batch):
        type(self).shown += tuple(image.shape[:2] for image in batch.images)
        return [self.find(image, i) for image, i in zip(batch.images, batch.image_ids, strict=True)]

    def find(self, image, image_id):
        parts, count = ndimage.label(image[..., 0] > 128)
        slices = ndimage.find_objects(parts)
        boxes = [[x.start, y.start, x.stop, y.stop] for y, x in slices]
        masks = encode_masks([parts == i + 1 for i in range(count)])
        middles = [[[(x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2, 1]] for x1, y1, x2, y2 in boxes]
        # partial objects have no lower score
        sizes = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
        scores = [0.9 - 0.3 * size / (size + 1000) for size in sizes]
        keypoints = np.reshape(middles, (count, 1, 3))
        return Detections(image_id, boxes, scores, [0] * count, masks, keypoints)


for abstract in ("training_dataset", "build_optimizer", "losses"):
    setattr(FindsWhite, abstract, None)
FindsWhite.__abstractmethods__ = frozenset()

# x y width height: away from edges, over one edge, over four, larger than the overlap, larger than a tile
RECTANGLES = [(5, 5, 30, 20), (90, 40, 40, 20), (185, 180, 30, 30), (300, 20, 100, 90), (150, 250, 300, 130)]
SIZE = (500, 400)


@pytest.fixture
def scene(tmp_path):
    """An image of white rectangles, as a data set."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    for x, y, width, height in RECTANGLES:
        pixels[y : y + height, x : x + width] = 255
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "scene.png")
    annotations = [
        {"id": i + 1, "image_id": 3, "category_id": 7, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(RECTANGLES)
    ]
    coco = {
        "images": [{"id": 3, "file_name": "scene.png", "width": SIZE[0], "height": SIZE[1]}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "rectangle"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(coco))
    return tmp_path


@pytest.fixture
def detected(scene):
    """Results of `predict --tiles`."""

    def call(batch_size=2, images="images/scene.png", output="out", **arguments):
        FindsWhite.shown = ()
        config = scene / "config.yaml"
        data = {"workers": 0, "val": {"annotations": str(scene / "val.json"), "images": str(scene / "images")}}
        hyperparameters = {"global_batch_size": batch_size}
        searcher = {"metric": "bbox_mAP", "max_length": {"batches": 1}}
        config.write_text(yaml.safe_dump({"data": data, "hyperparameters": hyperparameters, "searcher": searcher}))
        given = {"tiles": 128, "format": "png", "min_score": 0.3, "checkpoint": None, **arguments}
        run_command(predict, FindsWhite, config, images=[str(scene / images)], output=scene / output, **given)
        return json.loads((scene / output / "results.json").read_text())

    return call


def boxes(results):
    return sorted(tuple(result["bbox"]) for result in results)


def test_each_object_is_found_once_and_whole_whatever_cuts_it(detected):
    results = detected()
    assert boxes(results) == sorted(RECTANGLES)
    assert [result["image_id"] for result in results] == [3] * 5
    assert (400, 500) in FindsWhite.shown  # the view of the whole
    assert set(FindsWhite.shown) == {(128, 128), (400, 500)}


def test_masks_and_keypoints_of_tiles_are_those_of_the_image(detected):
    for result in detected():
        x, y, width, height = map(int, result["bbox"])
        expected = np.zeros(SIZE[::-1], bool)
        expected[y : y + height, x : x + width] = True
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), expected)
        assert result["keypoints"] == [x + (width - 1) / 2, y + (height - 1) / 2, 1]


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_results_do_not_depend_on_the_batch_size(detected, overlap):
    results = [detected(size, output=f"out{size}", overlap=overlap) for size in (1, 3, 7)]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) >= 5


def test_an_image_no_larger_than_a_tile_is_detected_as_without_tiles(detected):
    assert detected(tiles=500) == detected(tiles=None, output="plain")
    assert FindsWhite.shown == ((400, 500),)


def test_tiles_cover_an_image_evenly_and_overlap_enough():
    for length in (128, 129, 300, 1000, 20000):
        starts = Tiling(128, 0.2).starts(length)
        assert starts[0] == 0
        assert starts[-1] + 128 == max(length, 128)
        assert all(later - earlier <= 128 - 25 for earlier, later in itertools.pairwise(starts))
    assert Tiling(128, 0.2).starts(20) == [0]


def test_evaluate_in_tiles_scores_the_whole_images(scene, detected, capsys):
    detected()
    config, out = scene / "config.yaml", scene / "scored"
    arguments = {"checkpoint": None, "results": None, "output": out, "report": None, "min_score": "best"}
    run_command(evaluate, FindsWhite, config, tiles=128, **arguments)
    assert json.loads((out / "metrics.json").read_text())["bbox_mAP"] == pytest.approx(1)


def test_an_image_that_cannot_be_read_is_skipped_once(scene, detected, caplog):
    Image.new("RGB", SIZE, "gray").save(scene / "images/broken.jpg")
    (scene / "images/broken.jpg").write_bytes((scene / "images/broken.jpg").read_bytes()[:700])
    results = detected(images="images")
    assert {result["file_name"] for result in results} == {"scene.png"}
    assert "1 of 2 images" in caplog.text


def test_a_large_tiff_is_read_by_windows_alone(scene, detected):
    """The test lowers Pillow's limit instead of writing gigabytes."""
    rasterio = pytest.importorskip("rasterio")
    pixels = np.zeros((1000, 5000, 3), np.uint8)
    pixels[100:140, 1000:1060] = 255
    pixels[500:900, 2000:4400] = 255  # larger than a tile
    profile = {"driver": "GTiff", "width": 5000, "height": 1000, "count": 3, "dtype": "uint8", "compress": "lzw"}
    with rasterio.open(scene / "large.tif", "w", **profile, tiled=True, blockxsize=256, blockysize=256) as file:
        file.write(pixels.transpose(2, 0, 1))
    limits = {"images": "large.tif", "overrides": ["data.max_image_pixels=3000000"]}
    results = detected(tiles=1024, **limits)
    assert boxes(results) == [(1000, 100, 60, 40), (2000, 500, 2400, 400)]
    assert FindsWhite.shown[-1] == (500, 2500)  # the view of the whole
    assert Image.open(scene / "out/large.tif.png").size == (2500, 500)
    with pytest.raises(UserError, match=r"large\.tif: .*Fix: if you trust it, set data\.max_image_pixels"):
        detected(output="refused", tiles=None, **limits)


def test_windows_have_the_pixels_of_the_whole_file(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 301, 457), np.uint8)
    profile = {"driver": "GTiff", "width": 457, "height": 301, "count": 3, "dtype": "uint8", "compress": "deflate"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as file:
        file.write(pixels)
    whole = Image.open(tmp_path / "a.tif").convert("RGB")
    windows = open_windows(tmp_path / "a.tif")
    assert windows.size == (457, 301)
    for box in ((0, 0, 457, 301), (13, 200, 141, 301)):
        np.testing.assert_array_equal(np.asarray(windows.read(box)), np.asarray(whole.crop(box)))
    np.testing.assert_array_equal(np.asarray(windows.reduced(2)), np.asarray(whole.reduce(2)))
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.tif")
    assert open_windows(tmp_path / "deep.tif") is None
