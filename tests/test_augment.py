"""`data.augment`: its effects on images and objects, and its random numbers."""

import importlib
import io
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import WITHOUT_LIBRARY, stop_workers
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_detr import detr_config
from tiny_experiment import load_model_def
from tiny_models import CONFIGS, TINY_DETECTORS, efficientdet_config, trial_classes, with_keypoints

from model_def import EfficientDetTrial
from shared.config.augment import PRESETS
from shared.config.experiment import parse_data
from shared.data.annotations import CocoAnnotations
from shared.data.augment.augmenter import DataAugmenter
from shared.data.augment.placement import Layout, mirrored_keypoints
from shared.data.dataset import BadImages, CocoDetection, SampleKey
from shared.data.loading import TrainingBatchSampler
from shared.data.open import open_split
from shared.errors import UserError

SIZE = (96, 80)
SQUARE_COLORS = {1: (250, 20, 20), 2: (20, 250, 20), 3: (20, 20, 250)}


def fit(width, height):
    scale = min(SIZE[0] / width, SIZE[1] / height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


class Squares:
    """Images of colored rectangles on black, one color per category, and their annotations."""

    def __init__(self, images=12, rle=False):
        rng = np.random.default_rng(0)
        self.files, self.coco = {}, {"images": [], "annotations": [], "categories": []}
        self.coco["categories"] = [{"id": i, "name": f"c{i}"} for i in SQUARE_COLORS]
        for image in range(images):
            width, height = int(rng.integers(60, 200)), int(rng.integers(60, 200))
            pixels = np.zeros((height, width, 3), np.uint8)
            for column, category in enumerate(SQUARE_COLORS):
                x, y = column * width // 3 + 2, int(rng.integers(2, height // 2))
                w, h = width // 3 - 6, int(rng.integers(12, height // 2))
                pixels[y : y + h, x : x + w] = SQUARE_COLORS[category]
                polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                segmentation = coco_mask.frPyObjects(polygon, height, width)[0] if rle else polygon
                if rle:
                    segmentation["counts"] = segmentation["counts"].decode()
                self.coco["annotations"].append(
                    {
                        **{"id": len(self.coco["annotations"]) + 1, "image_id": image + 1, "category_id": category},
                        **{"bbox": [x, y, w, h], "area": w * h, "segmentation": segmentation},
                        "iscrowd": int(category == 3 and image % 2),
                    }
                )
            name = f"{image}.png"
            self.coco["images"].append({"id": image + 1, "file_name": name, "width": width, "height": height})
            self.files[name] = as_png(pixels)

    def read(self, name):
        if name not in self.files:
            raise OSError("it is not there")
        return self.files[name]


def as_png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def augmented(data, augment, seed=0, masks=True, bad_images=None, last_epoch=None, layout=None, annotations=None):
    """The data set whose samples are (pixels, record)."""
    annotations = annotations or CocoAnnotations.from_dict(data.coco)
    settings = parse_data({"data": {"augment": augment}}).augment
    augmenter = DataAugmenter(
        settings, layout or Layout(fit, SIZE, (0, 0, 0)), last_epoch, mirrored_keypoints(annotations.categories), masks
    )
    return CocoDetection(
        annotations, data, lambda image, record: (image, record), seed, True, bad_images, augmenter.decode,
        augmenter=augmenter,
    )  # fmt: skip


def mask_of(record, i):
    return coco_mask.decode(record.segmentations[i]).astype(bool)


OPERATIONS = {
    "none": {},
    "flip": {"flip": 1.0},
    "vertical_flip": {"vertical_flip": 1.0},
    "scale": {"scale": [0.3, 3.0]},
    "crop": {"crop": 1.0},
    "mosaic": {"mosaic": 1.0, "flip": 0.5, "vertical_flip": 0.5, "scale": [0.5, 2.0]},
    "copy_paste": {"copy_paste": 1.0, "flip": 0.5},
    "rotation": {"transforms": [{"RandomRotation": {"degrees": 30}}]},
    "affine": {"transforms": [{"RandomAffine": {"degrees": 0, "translate": [0.3, 0.3]}}, "RandomHorizontalFlip"]},
    "all": {"preset": "strong", "mixup": 0.0, "color": 0.0, "erase": 0.0},
}


@pytest.mark.parametrize("rle", [False, True], ids=["polygons", "rle"])
@pytest.mark.parametrize("augment", OPERATIONS.values(), ids=OPERATIONS)
def test_boxes_and_masks_stay_on_their_objects(augment, rle):
    data = augmented(Squares(rle=rle), augment)
    seen = 0
    for epoch, index in itertools.product(range(2), range(len(data))):
        pixels, record = data[SampleKey(epoch, index)]
        assert pixels.shape == (SIZE[1], SIZE[0], 3)
        assert (record.width, record.height) == SIZE
        for i, box in enumerate(record.boxes):
            mask = mask_of(record, i)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert columns[0] > box[0] - 2
            assert rows[0] > box[1] - 2
            assert columns[-1] < box[2] + 1
            assert rows[-1] < box[3] + 1
            inner = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
            if inner.sum() > 8:  # the color under the mask is the category's
                color = SQUARE_COLORS[int(record.labels[i]) + 1]
                assert np.abs(np.median(pixels[inner], axis=0) - color).max() < 60
                seen += 1
    assert seen > len(data)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_lies_outside_of_the_image(preset):
    data = augmented(Squares(), preset, masks=False)
    for epoch, index in itertools.product(range(3), range(len(data))):
        _, record = data[SampleKey(epoch, index)]
        assert (record.boxes[:, :2] >= 0).all()
        assert (record.boxes[:, 2:] <= SIZE).all()
        assert (record.boxes[:, 2:] - record.boxes[:, :2] >= 1).all()
        assert len(record.labels) == len(record.iscrowd) == len(record.areas) == len(record.boxes)
        np.testing.assert_allclose(record.file_boxes[:, :2], record.boxes[:, :2], atol=1e-4)


def test_crowds_stay_crowds_in_a_mosaic():
    data = augmented(Squares(), {"mosaic": 1.0})
    crowds = 0
    for index in range(len(data)):
        pixels, record = data[index]
        for i in np.flatnonzero(record.iscrowd):
            inner = mask_of(record, i)
            assert record.labels[i] == 2
            assert np.abs(np.median(pixels[inner], axis=0) - SQUARE_COLORS[3]).max() < 60
            crowds += 1
    assert crowds > 3


def test_ignored_objects_of_the_file_enter_no_mosaic(tmp_path):
    squares = Squares()
    for annotation in squares.coco["annotations"]:
        annotation["ignore"] = int(annotation["category_id"] == 2)
    (tmp_path / "images").mkdir()
    for name, data in squares.files.items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "train.json").write_text(json.dumps(squares.coco))
    split = {"annotations": str(tmp_path / "train.json"), "images": str(tmp_path / "images")}
    opened = open_split(parse_data({"data": {"train": split}}), "train")
    data = augmented(squares, {"mosaic": 1.0}, annotations=opened.annotations)
    labels = np.concatenate([data[index][1].labels for index in range(len(data))])
    assert sorted(set(labels.tolist())) == [0, 2]


def test_a_crop_keeps_an_object_whole():
    data = augmented(Squares(), {"crop": 1.0}, layout=Layout(lambda *size: size))
    for epoch, index in itertools.product(range(3), range(len(data))):
        pixels, record = data[SampleKey(epoch, index)]
        objects = data.annotations[index]
        ratio = np.array([record.width, record.height])
        whole = [
            (record.boxes[i][:2] > 0).any() or (record.boxes[i][2:] < ratio).any() for i in range(len(record.boxes))
        ]
        assert any(whole) or len(objects.boxes) == 0
        assert pixels.shape == (record.height, record.width, 3)


def test_keypoints_follow_and_left_becomes_right_in_a_flip():
    squares = Squares()
    squares.coco = with_keypoints(squares.coco)
    plain, flipped = augmented(squares, "none"), augmented(squares, {"flip": 1.0})
    mirror = mirrored_keypoints(squares.coco["categories"])[0]
    for index in range(len(plain)):
        (_, before), (_, after) = plain[index], flipped[index]
        right = before.boxes[:, 2].max() + after.boxes[:, 0].min()  # where the mirrored image ends
        expected = before.keypoints[:, mirror]
        both = (expected[..., 2] > 0) & (after.keypoints[..., 2] > 0)
        assert both.sum() > 5
        np.testing.assert_allclose(after.keypoints[both][:, 0], right - expected[both][:, 0], atol=1e-3)
        np.testing.assert_allclose(after.keypoints[both][:, 1], expected[both][:, 1], atol=1e-3)


def test_mixup_has_the_objects_of_both_images():
    data, plain = augmented(Squares(), {"mixup": 1.0}), augmented(Squares(), "none")
    pixels, record = data[SampleKey(0, 3, others=(5,))]
    assert len(record.boxes) == len(plain[3][1].boxes) + len(plain[5][1].boxes)
    assert 60 < pixels.max() < 250


def test_pasted_objects_hide_those_under_them():
    data, plain = augmented(Squares(), {"copy_paste": 1.0}), augmented(Squares(), "none")
    for index in range(len(data)):
        _pixels, record = data[index]
        total = sum(mask_of(record, i).astype(int) for i in range(len(record.boxes)))
        assert total.max() == 1  # no pixel belongs to two objects
        assert len(record.boxes) >= 1
    assert any(len(data[i][1].boxes) > len(plain[i][1].boxes) for i in range(len(data)))


def test_color_and_erase_change_pixels_and_no_box():
    _, plain = augmented(Squares(), "none")[2]
    for augment in ({"color": 1.0}, {"erase": 1.0}):
        pixels = [augmented(Squares(), augment)[SampleKey(epoch, 2)] for epoch in range(3)]
        assert len({image.tobytes() for image, _ in pixels}) == 3
        for _, record in pixels:
            np.testing.assert_array_equal(record.boxes, plain.boxes)


def test_a_sample_follows_from_the_seed_the_epoch_and_the_image():
    keys = [SampleKey(epoch, index) for epoch in range(2) for index in range(6)]

    def drawn(seed, order):
        data = augmented(Squares(), "strong", seed)
        found = {key: data[key] for key in order}
        return [(found[key][0].tobytes(), found[key][1].boxes.tobytes()) for key in keys]

    first = drawn(1, keys)
    assert first == drawn(1, keys[::-1])  # not from what was drawn before, or what is cached
    assert first != drawn(2, keys)
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("images", [40, 400])
def test_ranks_and_resumes_combine_the_same_images(images):
    arguments = {"groups": np.zeros(images), "seed": 3, "others": 5}
    one = list(itertools.islice(TrainingBatchSampler(per_slot_batch_size=8, **arguments), 2 * images // 8))
    two = [
        list(itertools.islice(TrainingBatchSampler(per_slot_batch_size=4, rank=rank, slots=2, **arguments), len(one)))
        for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    late = TrainingBatchSampler(per_slot_batch_size=8, first_batch=7, **arguments)
    assert list(itertools.islice(late, len(one) - 7)) == one[7:]
    others = [key.others for batch in one for key in batch]
    assert all(len(each) == 5 for each in others)
    assert len({index for each in others for index in each}) > images // 2


def test_only_flips_remain_in_the_last_epochs():
    settings = {"preset": "strong", "off_for_last": {"epochs": 2}}
    data, flips = augmented(Squares(), settings, last_epoch=3), augmented(Squares(), {"flip": 0.5})
    for index in range(6):
        assert data[SampleKey(2, index)][0].tobytes() != flips[SampleKey(2, index)][0].tobytes()
        of_flip = {augmented(Squares(), {"flip": p})[index][0].tobytes() for p in (0.0, 1.0)}
        assert data[SampleKey(3, index)][0].tobytes() in of_flip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_keys_change_them(preset):
    settings = parse_data({"data": {"augment": preset}}).augment
    assert settings == parse_data({"data": {"augment": {"preset": preset}}}).augment
    assert parse_data({"data": {"augment": {"preset": preset, "mosaic": 0.25}}}).augment.mosaic == 0.25


def test_a_bad_image_in_a_mosaic_is_replaced_or_named():
    squares = Squares()
    del squares.files["5.png"]
    key = SampleKey(0, 1, others=(5, 2, 3))
    with pytest.raises(UserError, match=r"5\.png .* cannot be read"):
        augmented(squares, {"mosaic": 1.0})[key]
    data = augmented(squares, {"mosaic": 1.0}, bad_images=BadImages(skip=True))
    assert data[key][0].shape == (SIZE[1], SIZE[0], 3)
    assert data.bad_images.take() == [6]


def test_a_large_jpeg_is_decoded_smaller_and_its_boxes_fit():
    pixels = np.zeros((640, 960, 3), np.uint8)
    pixels[200:400, 300:700] = SQUARE_COLORS[1]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    squares = Squares(1)
    squares.files["0.png"] = buffer.getvalue()
    squares.coco["images"][0] |= {"width": 960, "height": 640}
    squares.coco["annotations"] = squares.coco["annotations"][:1]
    squares.coco["annotations"][0] |= {"bbox": [300, 200, 400, 200], "area": 80000, "segmentation": None}
    data = augmented(squares, {"scale": [0.5, 1.5]})
    assert data.load(0)[0].shape == (160, 240, 3)
    image, record = data[0]
    left, top, right, bottom = record.boxes[0].round().astype(int)
    inside = (image[..., 0] > 125).nonzero()
    assert np.abs(np.array([inside[1].min(), inside[0].min(), inside[1].max() + 1, inside[0].max() + 1])
                  - [left, top, right, bottom]).max() <= 1  # fmt: skip


# --- the config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("medum", "data.augment: 'medum' is unknown; did you mean 'medium'?"),
        ({"mozaic": 1}, "data.augment: unknown key 'mozaic'; did you mean 'mosaic'?"),
        ({"flip": 2}, "data.augment.flip: it is 2. Fix: give a number <= 1"),
        ({"scale": [2, 1]}, "data.augment.scale: [2, 1] is not a range above 0"),
        ({"off_for_last": {"epoch": 1}}, "data.augment.off_for_last: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"off_for_last": 3}, "data.augment.off_for_last: 3 is not a section"),
        (3, "data.augment: 3 is not a section"),
        ({"transforms": [{"A": {}, "B": {}}]}, "data.augment.transforms"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_the_nearest(augment, message):
    with pytest.raises(UserError) as error:
        parse_data({"data": {"augment": augment}})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["GausianBlur"], "'GausianBlur' is not a transform of torchvision; did you mean 'GaussianBlur'?"),
        ([{"GaussianBlur": {"kernel": 3}}], "GaussianBlur has no argument 'kernel'; did you mean 'kernel_size'?"),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], "Normalize cannot change an image with boxes"),
        ([{"ToDtype": {"dtype": "float"}}], "ToDtype"),
    ],
)
def test_a_wrong_transform_is_an_error_before_the_training(transforms, message):
    with pytest.raises(UserError) as error:
        augmented(Squares(2), {"transforms": transforms})
    assert message in str(error.value)


def test_a_transform_of_albumentations_without_the_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"albumentations\.CLAHE needs the package. Fix: pip install albumentations"):
        augmented(Squares(2), {"transforms": ["albumentations.CLAHE"]})


def test_albumentations_moves_boxes_masks_and_keypoints():
    pytest.importorskip("albumentations")
    squares = Squares()
    squares.coco = with_keypoints(squares.coco)
    ours = augmented(squares, {"vertical_flip": 1.0, "scale": [1.0, 1.0]}, layout=Layout(lambda *size: size))
    theirs = {"transforms": [{"albumentations.VerticalFlip": {"p": 1.0}}]}
    data = augmented(squares, theirs, layout=Layout(lambda *size: size))
    for index in range(4):
        (pixels, record), (expected, of_ours) = data[index], ours[index]
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_allclose(record.boxes, of_ours.boxes, atol=1e-3)
        assert [mask_of(record, i).sum() for i in range(3)] == [mask_of(of_ours, i).sum() for i in range(3)]


@pytest.mark.parametrize("detector", [name for name, tiny in TINY_DETECTORS.items() if hasattr(tiny, "OWN_PIPELINE")])
def test_detectors_with_their_own_pipeline_refuse_it(detector):
    name, instead = TINY_DETECTORS[detector].OWN_PIPELINE
    module = importlib.import_module(f"{detector}_hyperparameters")
    with pytest.raises(UserError, match=rf"^data\.augment: .*{instead}.*config_overrides"):
        parse_data({"data": {"augment": "light"}}, getattr(module, name))


# --- training runs ----------------------------------------------------------------------------------


def weights_of(run):
    state = torch.load(run / "checkpoints/last/state_dict.pth", weights_only=True)
    return state["models_state_dict"][0]


@pytest.mark.parametrize("detector", ["efficientdet", pytest.param("detr", marks=pytest.mark.slow)])
def test_a_resume_with_mosaic_is_bit_for_bit(detector, shapes, train):
    trial_class = trial_classes()[detector]
    config = CONFIGS[detector](shapes)
    config["hyperparameters"].pop("sched_on_updates", None)
    config["hyperparameters"]["sched"] = {"efficientdet": "step", "detr": "constant"}[detector]
    config["data"]["augment"] = {"preset": "strong", **({"multi_scale": [0.5, 1.5]} if detector == "detr" else {})}
    for period in ("min_validation_period", "min_checkpoint_period"):
        config.pop(period, None)

    def trained(name, batches, resume=None):
        config["searcher"]["max_length"] = {"batches": batches}
        return train(trial_class, config, name, resume=resume)

    whole = weights_of(trained("whole", 3))
    half = trained("half", 1)
    resumed = weights_of(trained("resumed", 3, resume=str(half / "checkpoints/last")))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_do_not_depend_on_workers(workers, shapes, unbuilt):
    def batches(workers):
        config = efficientdet_config(shapes)
        config["data"] |= {"augment": {"preset": "strong", "off_for_last": {"epochs": 1}}, "workers": workers}
        trial = unbuilt(EfficientDetTrial, config)
        trial.open_data()
        trial.build()
        return [batch.images.numpy().tobytes() for batch in itertools.islice(trial.training_batch_loader(), 3)]

    try:
        assert batches(workers) == batches(0)
    finally:
        stop_workers()


@pytest.mark.skipif("detr" in WITHOUT_LIBRARY, reason=WITHOUT_LIBRARY.get("detr", ""))
def test_multi_scale_changes_the_input_of_each_batch(shapes, unbuilt):
    config = detr_config(shapes)
    config["data"]["augment"] = {"multi_scale": [0.5, 1.5], "off_for_last": {"epochs": 1}}
    trial = unbuilt(load_model_def("detr").DetrTrial, config)
    trial.open_data()
    trial.build()
    batch = next(iter(trial.training_batch_loader()))
    sizes = [tuple(trial.prepare(batch, number).images.shape[2:]) for number in range(12)]
    assert len(set(sizes[:6])) > 1
    assert all(height == width and height % 32 == 0 and 64 <= height <= 192 for height, width in sizes)
    assert set(sizes[6:]) == {(128, 128)}  # the last of the two epochs


def test_efficientdet_refuses_multi_scale(shapes, refused, run_config, tmp_path):
    line = refused("train", run_config(data__augment={"multi_scale": [0.5, 1.5]}), "--output-dir", tmp_path / "run")
    assert line.startswith("error: data.augment.multi_scale: ")
    assert "Fix: remove it" in line


def test_hyperparameters_that_it_replaces_are_named(shapes, unbuilt, caplog):
    config = efficientdet_config(shapes)
    config["hyperparameters"]["scale_jitter"] = [0.5, 1.5]
    config["data"]["augment"] = "light"
    trial = unbuilt(EfficientDetTrial, config)
    trial.open_data()
    trial.build()
    trial.training_dataset()
    assert "data.augment replaces hyperparameters.scale_jitter, which has no effect" in caplog.text
    assert ("augmentation", "flip 0.5, scale 0.8–1.25, color 0.3") in [
        (name, str(value)) for name, value in trial.summary_lines()
    ]


def test_check_draws_augmented_images(run_config, tmp_path, command, capsys):
    page = tmp_path / "page.png"
    with pytest.raises(SystemExit) as ended:
        command(EfficientDetTrial, "check", run_config(data__augment="strong"), "--images", "2", "--page", page)
    assert ended.value.code == 0
    assert f"then augmented training images: {page}" in capsys.readouterr().out
    assert Image.open(page).height > 2.7 * Image.open(page).width  # three rows of each split, and three augmented ones
