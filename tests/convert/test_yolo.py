"""`convert yolo`."""

import numpy as np
import pytest
import yaml
from data_sets import annotations_in, converted, draw, write
from PIL import Image

from shared.config.experiment import parse_data
from shared.data.convert.conversion import convert
from shared.data.open import open_split
from shared.errors import UserError


@pytest.mark.parametrize("layout", ["ultralytics", "roboflow"])
def test_yolo_is_read_from_its_usual_folders_both_splits_at_once(layout, tmp_path):
    places = {"ultralytics": ("{0}/train", "{0}/val"), "roboflow": ("train/{0}", "valid/{0}")}[layout]
    for place in places:
        images, labels = (tmp_path / place.format(what) for what in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (100, 50)).save(images / f"{name}.png")
        (labels / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6\n0 0.5 0.5 0 0.1\n")
    train, val = (place.format("images") for place in places)
    said = {
        "ultralytics": {"path": "../elsewhere", "train": train, "val": val, "names": {0: "cat", 1: "dog"}},
        "roboflow": {"train": f"../{train}", "val": f"../{val}", "names": ["cat", "dog"]},
    }[layout]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(said))
    written = convert("yolo", tmp_path, tmp_path / "pets.json")
    assert [one.path.name for one in written] == ["pets_train.json", "pets_val.json"]
    for one, place in zip(written, (train, val), strict=True):
        split = {"annotations": str(one.path), "images": str(one.part.folder)}
        assert one.part.folder == tmp_path / place
        data = open_split(parse_data({"data": {"train": split}}), "train").annotations
        assert data.category_names == ["cat", "dog"]
        assert [len(record.boxes) for record in data] == [2, 0]
        np.testing.assert_allclose(data[0].file_boxes, [[40, 15, 20, 20], [10, 10, 20, 20]])
        assert data[0].segmentations == [None, [[10, 10, 30, 10, 30, 30]]]
    (labels / "b.txt").write_text("7 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError, match=r"b\.txt: line 1: category 7, which data.yaml does not name"):
        convert("yolo", tmp_path, tmp_path / "pets.json")


def write_yolo(tmp_path, *lines):
    draw(tmp_path / "images/a[1].png")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]")
    (tmp_path / "labels").mkdir(exist_ok=True)
    (tmp_path / "labels/a[1].txt").write_text("\n".join(lines))


def convert_yolo(tmp_path):
    return convert("yolo", tmp_path / "labels", tmp_path / "out.json", tmp_path / "images")


def test_yolo_two_images_of_one_label_file_are_an_error(tmp_path):
    write_yolo(tmp_path, "1 0.5 0.5 0.1 0.1")
    convert_yolo(tmp_path)
    draw(tmp_path / "images/a1.png", tmp_path / "images/a[1].bmp")
    with pytest.raises(UserError, match=r"a\[1\]\.png: its label file would be a\[1\]\.txt, and that is a\[1\]\.bmp's"):
        convert_yolo(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.5 0.5 0.5 0.1 0.1", "the class is '1.5', which is not a whole number"),
        ("1e400 0.5 0.5 0.1 0.1", "the class is '1e400', which is not a finite number"),
        ("nan 0.5 0.5 0.1 0.1", "the class is 'nan', which is not a finite number"),
        (f"{2**64} 0.5 0.5 0.1 0.1", f"category {2**64}, which data.yaml does not name"),
        ("-1 0.5 0.5 0.1 0.1", "category -1, which data.yaml does not name"),
        ("1 0.5 1e400 0.1 0.1", "a coordinate is '1e400', which is not a finite number"),
        ("1 0.5 0.5 1e300 0.1", "1e+300 is not a share of an image's size"),
        ("1 0.1 0.1 0.5 0.1 -1e300 0.9", "-1e+300 is not a share of an image's size"),
    ],
)
def test_yolo_a_number_that_cannot_be_used_is_named_with_its_line(line, message, tmp_path):
    write_yolo(tmp_path, "1.0 0.5 0.5 0.1 0.1", line)
    with pytest.raises(UserError) as error:
        convert_yolo(tmp_path)
    assert f"labels/a[1].txt: line 2: {message}" in str(error.value)


@pytest.mark.parametrize("key", ["1.5", ".inf", str(True)])
def test_yolo_a_class_in_names_that_is_no_whole_number_is_an_error(key, tmp_path):
    write_yolo(tmp_path, "1 0.5 0.5 0.1 0.1")
    (tmp_path / "data.yaml").write_text(f"names: {{{key}: cat}}")
    with pytest.raises(UserError, match=r"data\.yaml is not YOLO's .*a class in `names` is "):
        convert_yolo(tmp_path)


def yolo_folder(root, lines, names=("plate", "frame"), **more):
    """Two images of 200×100 in each of train and val, with these label lines."""
    for split in ("train", "val"):
        draw(*(root / f"images/{split}/a{i}.png" for i in range(2)), size=(200, 100))
        for i in range(2):
            write(root / f"labels/{split}/a{i}.txt", lines if isinstance(lines, bytes) else "\n".join(lines))
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": list(names), **more}
    write(root / "data.yaml", yaml.safe_dump(content))
    return root


PLATE = ("plate", 80, 30, 40, 40)


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        ("0 0.5 0.5 0.2 0.4 0.91 3", "confidences left out 2, track ids left out 2"),
        ("0 0.5 0.5 0.2 0.4 0.91", "confidences left out 2"),
        ("0 0.5 0.5 0.2 0.4 17", "track ids left out 2"),
    ],
)
def test_yolo_predictions_of_boxes_are_boxes_and_their_columns_are_counted(line, left_out, tmp_path):
    splits, said = converted(None, yolo_folder(tmp_path, [line]), tmp_path / "o.json")
    assert splits["train"] == {"a0.png": [PLATE], "a1.png": [PLATE]}
    assert left_out in said


def test_yolo_six_numbers_that_are_boxes_or_triangles_need_an_option(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4 0.9 1"])
    with pytest.raises(UserError, match=r"Fix: pass one of `--labels boxes`, `--labels polygons`"):
        converted("yolo", root, tmp_path / "o.json")
    splits, _ = converted("yolo", root, tmp_path / "o.json", labels="boxes")
    assert splits["train"]["a0.png"] == [PLATE]
    splits, _ = converted("yolo", root, tmp_path / "o.json", labels="polygons")
    assert splits["train"]["a0.png"] == [("plate", 40, 40, 140, 60)]


def test_yolo_an_angle_after_a_box_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"neither a confidence nor a track id; it may be an angle\. Fix: "):
        converted("yolo", yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4 1.57"]), tmp_path / "o.json")


POSE = "0 0.5 0.5 0.2 0.4 0.45 0.4 2 0.55 0.4 1 0 0 0"


def test_yolo_pose_becomes_keypoints(tmp_path):
    root = yolo_folder(tmp_path, [POSE], kpt_shape=[3, 3], flip_idx=[1, 0, 2])
    splits, said = converted(None, root, tmp_path / "o.json")
    assert splits["train"]["a0.png"] == [PLATE]
    first = annotations_in(tmp_path / "o_train.json")[0]
    assert first["keypoints"] == pytest.approx([90, 40, 2, 110, 40, 1, 0, 0, 0])
    assert (first["num_keypoints"], "segmentation" in first) == (2, False)
    category = yaml.safe_load((tmp_path / "o_train.json").read_text())["categories"][0]
    assert category["keypoints"] == ["left_1", "right_1", "point_3"]
    assert "boxes with keypoints 2" in said


def test_yolo_pose_without_visibility_has_names_from_the_yaml(tmp_path):
    lines = ["0 0.5 0.5 0.2 0.4 0.45 0.4 0 0"]
    names = {"kpt_names": {0: ["nose", "tail"]}}
    converted("yolo", yolo_folder(tmp_path, lines, kpt_shape=[2, 2], **names), tmp_path / "o.json")
    assert annotations_in(tmp_path / "o_train.json")[0]["keypoints"] == pytest.approx([90, 40, 2, 0, 0, 0])
    category = yaml.safe_load((tmp_path / "o_train.json").read_text())["categories"][0]
    assert category["keypoints"] == ["nose", "tail"]


def test_yolo_what_may_be_keypoints_needs_an_option(tmp_path):
    root = yolo_folder(tmp_path, [POSE])
    with pytest.raises(UserError, match=r"data\.yaml: .*Fix: pass one of `--labels keypoints:3x3`.*`kpt_shape`"):
        converted("yolo", root, tmp_path / "o.json")
    converted("yolo", root, tmp_path / "o.json", labels="keypoints:3x3")
    assert annotations_in(tmp_path / "o_val.json")[0]["num_keypoints"] == 2


def test_yolo_four_corners_that_may_be_keypoints_need_an_option(tmp_path):
    root = yolo_folder(tmp_path, ["1 0.4 0.4 0.5 0.4 0.5 0.5 0.4 0.5"])
    with pytest.raises(UserError, match=r"`--labels keypoints:2x2`, `--labels polygons`, `--labels oriented`"):
        converted("yolo", root, tmp_path / "o.json")
    splits, _ = converted("yolo", root, tmp_path / "o.json", labels="oriented")
    assert splits["train"]["a0.png"] == [("frame", 80, 40, 20, 10)]


def test_yolo_a_line_without_all_keypoints_is_named(tmp_path):
    root = yolo_folder(tmp_path, [POSE, "0 0.5 0.5 0.2 0.4 0.45 0.4 2"], kpt_shape=[3, 3])
    with pytest.raises(UserError, match=r"a0\.txt: line 2: 7 numbers after the class; .* are 13\. Fix: "):
        converted("yolo", root, tmp_path / "o.json")


@pytest.mark.parametrize("more", [{"task": "obb"}, {}])
def test_yolo_oriented_boxes_become_the_enclosing_box_and_four_corners(more, tmp_path):
    root = yolo_folder(tmp_path, ["1 0.5 0.1 0.7 0.5 0.5 0.9 0.3 0.5"], **more)
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["train"]["a0.png"] == [("frame", 60, 10, 80, 80)]
    first = annotations_in(tmp_path / "o_train.json")[0]
    assert first["segmentation"] == [pytest.approx([100, 10, 140, 50, 100, 90, 60, 50])]
    assert first["area"] == pytest.approx(3200)


def test_yolo_polygons_of_many_lengths_are_polygons_beside_boxes(tmp_path):
    lines = ["0 0.1 0.1 0.3 0.1 0.2 0.5", "1 0.5 0.1 0.7 0.5 0.6 0.9 0.5 0.9 0.3 0.5", "0 0.5 0.5 0.2 0.4"]
    splits, said = converted("yolo", yolo_folder(tmp_path, lines), tmp_path / "o.json")
    assert splits["val"]["a1.png"] == [("plate", 20, 10, 40, 40), ("frame", 60, 10, 80, 80), PLATE]
    assert "masks 4" in said


def test_yolo_predicted_polygons_end_with_a_confidence(tmp_path):
    lines = ["0 0.1 0.1 0.3 0.1 0.2 0.5 0.88", "1 0.5 0.1 0.7 0.5 0.6 0.9 0.5 0.9 0.3 0.5 0.71"]
    splits, said = converted("yolo", yolo_folder(tmp_path, lines), tmp_path / "o.json")
    assert splits["val"]["a1.png"] == [("plate", 20, 10, 40, 40), ("frame", 60, 10, 80, 80)]
    assert "confidences left out 4" in said


def test_yolo_numbers_in_pixels_are_named(tmp_path):
    with pytest.raises(UserError, match=r"a0\.txt: line 1: 100 is not a share of an image's size\. Fix: "):
        converted("yolo", yolo_folder(tmp_path, ["0 100 50 40 40"]), tmp_path / "o.json")


@pytest.mark.parametrize("prefix", ["", "./", "data/", "images\\..\\"])
def test_yolo_a_split_may_be_a_list_of_images(prefix, tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], train="train.txt", val="val.txt")
    draw(root / "images/train/a2.png")
    for split in ("train", "val"):
        write(root / f"{split}.txt", "".join(f"{prefix}images/{split}/a{i}.png\n" for i in (0, 1)))
    write(root / "labels/train/a2.txt", "0 0.5 0.5 0.2 0.4")  # its image is there, and in no list
    splits, said = converted(None, root, tmp_path / "o.json")
    assert splits["train"] == {"a0.png": [PLATE], "a1.png": [PLATE]}
    assert splits["val"] == {"a0.png": [PLATE], "a1.png": [PLATE]}
    assert "have no image" not in said


def test_yolo_images_of_a_list_that_are_not_there_are_counted(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], train="train.txt")
    write(root / "train.txt", "images/train/a0.png\nimages/train/gone.png\n")
    splits, said = converted("yolo", root, tmp_path / "o.json")
    assert list(splits["train"]) == ["a0.png"]
    assert "train.txt: 1 images are not there, and are left out; the first is images/train/gone.png" in said


def test_yolo_a_test_split_that_was_not_exported_is_a_line(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], test="../test/images")
    splits, said = converted("yolo", root, tmp_path / "o.json")
    assert list(splits) == ["train", "val"]
    assert "test: ../test/images is not there" in said


def test_yolo_a_val_split_that_is_not_there_needs_a_share(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], val="../valid/images")
    with pytest.raises(UserError, match=r"val: \.\./valid/images is not there.*Fix: .* pass --val 0\.2"):
        converted("yolo", root, tmp_path / "o.json")
    splits, _ = converted("yolo", root, tmp_path / "o.json", val_share=0.5)
    assert [len(split) for split in splits.values()] == [1, 1]


def test_yolo_a_test_split_is_converted_too(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], test="images/val")
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["test"] == splits["val"]


def test_yolo_hidden_files_are_no_data(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"])
    for hidden in ("images/train/._a0.png", "labels/train/._a0.txt", "images/train/.cache/b.png", "labels/.DS_Store"):
        write(root / hidden, b"\0\5\x16\7")
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["train"] == {"a0.png": [PLATE], "a1.png": [PLATE]}


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf0 0.5 0.5 0.2 0.4\r\n", "0 0.5 0.5 0.2 0.4\n".encode("utf-16")])
def test_yolo_labels_may_begin_with_a_byte_order_mark(text, tmp_path):
    root = yolo_folder(tmp_path, text)
    (root / "data.yaml").write_bytes(b"\xef\xbb\xbf" + (root / "data.yaml").read_bytes())
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["train"]["a0.png"] == [PLATE]


def test_yolo_a_label_file_without_an_image_is_counted(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"])
    write(root / "labels/train/orphan.txt", "0 0.5 0.5 0.2 0.4")
    splits, said = converted("yolo", root, tmp_path / "o.json")
    assert len(splits["train"]) == 2
    assert "1 label files have no image, and are left out; the first is " in said
    assert "train/orphan.txt" in said


@pytest.mark.parametrize("place", ["classes.txt", "labels/classes.txt", "obj.names"])
def test_yolo_without_a_data_yaml_has_the_names_in_a_list(place, tmp_path):
    draw(tmp_path / "in/images/a.png", size=(200, 100))
    write(tmp_path / "in/labels/a.txt", "0 0.5 0.5 0.2 0.4")
    write(tmp_path / "in" / place, "plate\nlicense frame\n")
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"a.png": [PLATE]}


def test_yolo_darknet_has_lists_in_obj_data_and_labels_beside_the_images(tmp_path):
    root = tmp_path / "in"
    draw(root / "obj_train_data/a.png", root / "obj_train_data/b.png", size=(200, 100))
    write(root / "obj_train_data/a.txt", "0 0.5 0.5 0.2 0.4")
    write(root / "obj.names", "plate\nframe\n")
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(root / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    splits, _ = converted(None, root, tmp_path / "o.json")
    assert splits["train"] == {"a.png": [PLATE], "b.png": []}


def test_yolo_a_photo_that_exif_turns_has_the_size_that_it_is_shown_with(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.8 0.4"])
    Image.new("RGB", (100, 40)).save(root / "images/train/a0.png", exif=exif)
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["train"]["a0.png"] == [("plate", 4, 30, 32, 40)]


@pytest.mark.parametrize("layout", ["images/{split}", "{split}/images", "{split}"])
def test_yolo_without_a_data_yaml_has_the_splits_of_its_folders(layout, tmp_path):
    for split in ("train", "valid"):
        folder = layout.format(split=split)
        draw(tmp_path / "in" / folder / "a.png", size=(200, 100))
        write(tmp_path / "in" / folder.replace("images", "labels") / "a.txt", "0 0.5 0.5 0.2 0.4")
        write(tmp_path / "in" / split / "_darknet.labels", "plate")
    write(tmp_path / "in/classes.txt", "plate")
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits == {"train": {"a.png": [PLATE]}, "val": {"a.png": [PLATE]}}


def test_yolo_paths_of_another_machine_are_found_by_their_end(tmp_path):
    places = {split: f"/content/pets/images/{split}" for split in ("train", "val")}
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], path="/content/pets", **places)
    splits, _ = converted("yolo", root, tmp_path / "o.json")
    assert splits["val"]["a0.png"] == [PLATE]


def test_yolo_without_names_takes_those_of_the_categories_option(tmp_path):
    root = yolo_folder(tmp_path, ["1 0.5 0.5 0.2 0.4"])
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"which names the categories\. Fix: pass --categories FILE"):
        converted(None, root, tmp_path / "o.json")
    names = write(tmp_path / "names.txt", "frame\nplate\n")
    splits, said = converted(None, root, tmp_path / "o.json", categories=names)
    assert splits["train"]["a0.png"][0][0] == "plate"
    assert "read as yolo: " in said


def test_yolo_a_name_that_no_disk_can_have_is_a_missing_image(tmp_path):
    root = yolo_folder(tmp_path, ["0 0.5 0.5 0.2 0.4"], train="train.txt")
    write(root / "train.txt", f"images/train/a0.png\n{'x' * 5000}.png\n")
    splits, said = converted("yolo", root, tmp_path / "o.json")
    assert list(splits["train"]) == ["a0.png"]
    assert "not there" in said
