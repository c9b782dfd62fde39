"""Unusual images have the right pixels; bad images are named or skipped."""

import io
import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import yaml
from conftest import other_detectors_are_slow, reports
from PIL import Image
from tiny_models import CONFIGS, efficientdet_config, trial_classes

from shared.config.experiment import parse_data
from shared.data.images import BadImageError, read_image
from shared.data.open import open_split
from shared.data.storage import DiskImages
from shared.errors import UserError
from shared.training.checkpoints import load_state

ORIENTATION = 274  # EXIF's tag


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y) * 3], axis=-1).astype(np.uint8))


def with_orientation(image, value):
    exif = image.getexif()
    exif[ORIENTATION] = value
    return encoded(image, "PNG", exif=exif)


def png_of_size(width, height):
    """A PNG whose header states this size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def read(tmp_path, data, size=None, decode=None):
    (tmp_path / "image").write_bytes(data)
    return read_image(DiskImages(tmp_path), "image", size, "image id 7", decode)


def opencv(data):
    cv2 = pytest.importorskip("cv2")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.mark.parametrize("decode", [None, opencv], ids=["pillow", "opencv"])
def test_odd_images_give_the_pixels_they_show(tmp_path, decode):
    image = gradient()
    expected = np.asarray(image)

    def pixels(data):
        return np.asarray(read(tmp_path, data, image.size, decode)).astype(int)

    assert (pixels(encoded(image, "PNG")) == expected).all()
    levels = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54
    grey = pixels(encoded(Image.fromarray(levels), "PNG"))
    assert (grey == (levels >> 8)[..., None]).all()
    palette = image.quantize(64)
    shown = np.asarray(palette.convert("RGB"))
    assert (pixels(encoded(palette, "PNG", transparency=bytes(range(64)))) == shown).all()
    assert abs(pixels(encoded(image.convert("CMYK"), "JPEG", quality=95)) - expected).max() < 30
    frames = [image.quantize(64), Image.new("P", image.size)]
    assert (pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == shown).all()
    assert (pixels(encoded(image.convert("RGBA"), "PNG")) == expected).all()


@pytest.mark.parametrize(
    ("brightest", "said"), [(4095, "no value above 4095: .* multiply the values of such images by 16"), (50_000, "")]
)
def test_twelve_bits_in_sixteen_are_named_once_and_stay_as_they_are(shapes, tmp_path, caplog, brightest, said):
    folder = shutil.copytree(shapes / "val", tmp_path / "images")
    levels = np.linspace(0, brightest, 128 * 128).astype(np.uint16).reshape(128, 128)
    for file in folder.iterdir():
        Image.fromarray(levels).save(file)
    data = open_split(parse_data({"data": {"val": {**split(shapes), "images": str(folder)}}}), "val")
    warned = [record.message for record in caplog.records if "has 16 bits a pixel" in record.message]
    assert len(warned) == bool(said)
    assert all(re.search(said, message) for message in warned)
    pixels = np.asarray(read_image(data.images, "000003.png"))
    assert (pixels == (levels >> 8)[..., None]).all()
    (folder / "000000.png").write_bytes(b"no image")  # which is another's to say
    open_split(parse_data({"data": {"val": {**split(shapes), "images": str(folder)}}}), "val")


@pytest.mark.parametrize(
    ("levels", "scale"),
    [
        (np.linspace(0, 1, 1200, dtype=np.float32), 255),
        (np.linspace(0, 255, 1200, dtype=np.float32), 1),
        (np.linspace(0, 255, 1200).astype(np.uint16), 1),
        (np.linspace(0, 65535, 1200).astype(np.int32), 1 / 256),
    ],
    ids=["floats to 1", "floats to 255", "8 bits in 16", "16 bits in 32"],
)
@pytest.mark.parametrize("decode", [None, opencv], ids=["pillow", "opencv"])
def test_grey_of_more_than_8_bits_is_not_read_as_black(tmp_path, levels, scale, decode):
    image = Image.fromarray(levels.reshape(30, 40))
    pixels = np.asarray(read(tmp_path, encoded(image, "TIFF"), image.size, decode))
    assert abs(pixels - (levels.reshape(30, 40, 1).astype(float) * scale)).max() <= 1


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (np.linspace(-3, 2, 1200, dtype=np.float32), "its values are from -3 to 2, of mode float32. Fix: save it"),
        (np.full(1200, np.nan, np.float32), "its values are from nan to nan"),
        (np.linspace(0, 10**6, 1200).astype(np.int32), r"its values are from 0 to 1e\+06, of mode int32"),
    ],
)
def test_an_image_whose_range_is_not_known_is_named_with_its_values(tmp_path, levels, said):
    with pytest.raises(BadImageError, match=f"image .*image id 7.*{said}"):
        read(tmp_path, encoded(Image.fromarray(levels.reshape(30, 40)), "TIFF"), (40, 30))


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_12_bits_per_color_channel_in_16_are_named_and_16_are_read(tmp_path, ending):
    cv2 = pytest.importorskip("cv2")
    levels = np.linspace(0, 65535, 3600).astype(np.uint16).reshape(30, 40, 3)
    pixels = np.asarray(read(tmp_path, cv2.imencode(ending, levels[..., ::-1])[1].tobytes(), (40, 30)))
    assert (pixels == levels >> 8).all()
    with pytest.raises(
        BadImageError, match=r"16 bits per channel and no value above 4095, .* multiply its values by 16"
    ):
        read(tmp_path, cv2.imencode(ending, levels >> 4)[1].tobytes(), (40, 30))


def test_a_key_allows_images_that_look_like_decompression_bombs(shapes, tmp_path):
    with pytest.raises(BadImageError, match=r"decompression bomb.* Fix: if you trust it, set data.max_image_pixels"):
        read(tmp_path, png_of_size(15_000, 15_000))
    open_split(parse_data({"data": {"val": split(shapes), "max_image_pixels": 15_000**2}}), "val")
    with pytest.raises(BadImageError, match=r"cannot be read as an image: (?!.*bomb)"):
        read(tmp_path, png_of_size(15_000, 15_000))
    with pytest.raises(BadImageError, match="bomb"):
        read(tmp_path, png_of_size(15_000, 15_002))
    open_split(parse_data({"data": {"val": split(shapes)}}), "val")
    with pytest.raises(BadImageError, match="bomb"):
        read(tmp_path, png_of_size(15_000, 15_000))


def test_images_in_a_hugging_face_cache_are_links_to_its_blobs(shapes, tmp_path):
    snapshot, blobs = tmp_path / "datasets--a--b/snapshots/0123/val", tmp_path / "datasets--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(shapes / "val", blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../../blobs/{blob.name}")
    open_split(parse_data({"data": {"val": {**split(shapes), "images": str(snapshot)}}}), "val")
    (tmp_path / "other.png").write_bytes((blobs / "000003.png").read_bytes())
    (snapshot / "000003.png").unlink()
    (snapshot / "000003.png").symlink_to(tmp_path / "other.png")
    with pytest.raises(UserError, match="is a link out of"):
        open_split(parse_data({"data": {"val": {**split(shapes), "images": str(snapshot)}}}), "val")


def test_an_image_of_one_pixel_is_one(tmp_path):
    assert read(tmp_path, encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), (1, 1)).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("decode", [None, opencv], ids=["pillow", "opencv"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_rotates_an_image_only_to_the_size_in_the_annotations(tmp_path, decode, orientation):
    image = gradient()
    data = with_orientation(image, orientation)
    assert (np.asarray(read(tmp_path, data, (40, 30), decode)) == np.asarray(image)).all()
    turned = np.asarray(read(tmp_path, data, (30, 40), decode))
    if orientation in (6, 8):
        assert (turned == np.rot90(np.asarray(image), -1 if orientation == 6 else 1)).all()
    assert turned.shape == (40, 30, 3)


BAD = {
    "cut off": encoded(gradient(), "JPEG")[:600],
    "cut off in the pixels": encoded(gradient(400, 300), "JPEG", quality=95)[:-2000],
    "a cut off PNG": encoded(gradient(), "PNG")[:-30],
    "zero bytes": b"",
    "not an image": b"<html>404</html>" * 20,
    "another size": encoded(gradient(20, 30), "PNG"),
    "a bomb": png_of_size(40_000, 40_000),
}
SIZES = {"a bomb": (40_000, 40_000), "cut off in the pixels": (400, 300)}


@pytest.mark.parametrize("decode", [None, opencv], ids=["pillow", "opencv"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named(tmp_path, kind, decode):
    with pytest.raises(BadImageError, match=r"image \(image id 7\)"):
        read(tmp_path, BAD[kind], SIZES.get(kind, (40, 30)), decode)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "s3://other-bucket/a.png",
        "a\0.png",
        "a/../../b.png",
        "",
        "\\\\host\\a",
        "..",
        "a/..",
        "a" * 5000,
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(shapes, name, tmp_path):
    coco = json.loads((shapes / "annotations/val.json").read_text())
    coco["images"][3]["file_name"] = name
    coco["images"][4]["file_name"] = "right..after/a:b.png"
    (tmp_path / "val.json").write_text(json.dumps(coco))
    val = {"annotations": str(tmp_path / "val.json"), "images": str(shapes / "val")}
    for check in (True, False):
        with pytest.raises(
            UserError, match=r"data\.val\.images \(.*\): the image file name .* leads out of the images'"
        ):
            open_split(parse_data({"data": {"val": val, "check_images": check}}), "val")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_that_lead_out_of_the_folder_are_refused(shapes, tmp_path, what):
    folder = tmp_path / "images"
    if what == "file":
        shutil.copytree(shapes / "val", folder)
        (folder / "000003.png").unlink()
        (folder / "000003.png").symlink_to("/etc/passwd")
        names = sorted(os.listdir(folder))
    else:
        folder.mkdir()
        (folder / "sub").symlink_to(shapes / "val")
        names = ["sub/000003.png"]
    with pytest.raises(UserError, match=r"is a link out of .*images, to /"):
        DiskImages(folder).look(np.array(names, dtype=bytes))
    inside = tmp_path / "inside"
    shutil.copytree(shapes / "val", inside)
    (inside / "linked.png").symlink_to(inside / "000003.png")
    assert DiskImages(inside).look(np.array([b"linked.png"])).missing == 0


# --- in training ------------------------------------------------------------------------------------


def spoiled(shapes, folder):
    """The shapes with two bad training images and one bad validation image."""
    shutil.copytree(shapes, folder)
    (folder / "train/000004.png").write_bytes((folder / "train/000004.png").read_bytes()[:200])
    (folder / "train/000009.png").write_bytes(b"")
    (folder / "val/000002.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def trial_class(detector):
    return trial_classes()[detector]


@other_detectors_are_slow
def test_a_bad_image_stops_the_run_with_its_name_or_is_skipped(detector, trial_class, shapes, train, tmp_path, caplog):
    config = CONFIGS[detector](spoiled(shapes, tmp_path / "data"))
    config["searcher"]["max_length"] = {"batches": 8}
    config["data"]["workers"] = 0
    with pytest.raises(UserError, match=r"00000[49]\.png \(image id \d+\) cannot be read as an image"):
        train(trial_class, config, "error")
    config["data"]["on_bad_image"] = "skip"
    run = train(trial_class, config, "skip")
    counts = [report["metrics"]["skipped_images"] for report in reports(run, "train")]
    assert sum(counts[:3]) == 2  # both in the first epoch, of six batches
    assert [report["metrics"]["skipped_images"] for report in reports(run, "val")] == [1, 1]
    left_out = [record.message for record in caplog.records if record.message.startswith("skipped: ")]
    assert len(left_out) == 3


def test_a_resumed_run_skips_the_same_images(shapes, train, crash_and_resume, tmp_path):
    from model_def import EfficientDetTrial

    config = efficientdet_config(spoiled(shapes, tmp_path / "data"))
    config["data"] |= {"on_bad_image": "skip", "workers": 0}
    config["searcher"]["max_length"] = {"batches": 12}
    config["min_checkpoint_period"] = {"batches": 4}
    whole = train(EfficientDetTrial, config, "whole")
    parts = crash_and_resume(EfficientDetTrial, config, 6)
    ours, expected = (load_state(r / "checkpoints/last/state_dict.pth")["models_state_dict"][0] for r in (parts, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_images_skipped_by_an_evaluation_are_not_counted(shapes, tmp_path):
    from shared.evaluation.detections import Detections
    from shared.evaluation.evaluator import CocoEvaluator

    data = open_split(parse_data({"data": {"val": split(shapes)}}), "val")
    bad = int(data.annotations.image_ids[2])
    found = [
        Detections(record.image_id, record.boxes, np.ones(len(record.boxes), np.float32), record.labels)
        for record in data.annotations
        if record.image_id != bad
    ]
    evaluator = CocoEvaluator(data.annotations)
    evaluator.update(found)
    assert evaluator.compute()["bbox_mAP"] < 0.99
    evaluator.skip([bad])
    metrics = evaluator.compute()
    assert metrics["bbox_mAP"] == pytest.approx(1)
    assert metrics["skipped_images"] == 1


def split(shapes, name="val"):
    return {"annotations": str(shapes / f"annotations/{name}.json"), "images": str(shapes / name)}


def test_missing_images_can_be_skipped_unless_all_are_missing(shapes, tmp_path, caplog):
    folder = shutil.copytree(shapes / "val", tmp_path / "images")
    (folder / "000003.png").unlink()
    data = {"val": {**split(shapes), "images": str(folder)}, "on_bad_image": "skip"}
    open_split(parse_data({"data": data}), "val")
    assert "1 of the 10 images" in caplog.text
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="10 of the 10 images"):
        open_split(parse_data({"data": data}), "val")
    with pytest.raises(UserError, match=r"data\.on_bad_image: 'ignore' is unknown. Fix: use one of error, skip"):
        parse_data(yaml.safe_load("{data: {on_bad_image: ignore}}"))
