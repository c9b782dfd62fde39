"""`python3 -m shared convert` with any format: COCO files that training takes."""

from pathlib import Path

import hotcoco
import numpy as np
import pytest
from data_sets import boxes_of, converted, draw, write

from shared.config.experiment import parse_data
from shared.data.annotations import CocoAnnotations
from shared.data.convert.conversion import annotations_of, convert, main
from shared.data.open import open_split, open_train_and_val
from shared.errors import UserError


@pytest.fixture
def sources(shapes, tmp_path):
    """The shapes' training data in each format."""
    coco = hotcoco.COCO(str(shapes / "annotations/train.json"))
    (tmp_path / "voc").mkdir()
    coco.to_voc(str(tmp_path / "voc"))
    coco.to_yolo(str(tmp_path / "yolo"))
    coco.to_cvat(str(tmp_path / "cvat.xml"))
    return {"voc": tmp_path / "voc", "yolo": tmp_path / "yolo", "cvat": tmp_path / "cvat.xml"}


def boxes_by_name(annotations, crowds=True):
    named = {}
    for record in annotations:
        kept = np.flatnonzero(crowds | ~record.iscrowd)
        names = [annotations.category_names[label] for label in record.labels]
        named[record.file_name] = {(names[i], *record.boxes[i].tolist()) for i in kept}
    return named


@pytest.mark.parametrize("kind", ["voc", "yolo", "cvat"])
def test_a_format_s_boxes_come_out_as_a_data_set(kind, sources, shapes, tmp_path):
    images = shapes / "train" if kind == "yolo" else None
    (written,) = convert(kind, sources[kind], tmp_path / "out/all.json", images)
    data = {"train": {"annotations": str(written.path), "images": str(shapes / "train")}}
    ours = boxes_by_name(open_split(parse_data({"data": data}), "train").annotations)
    # of which YOLO's labels have no crowds
    expected = boxes_by_name(CocoAnnotations.open(shapes / "annotations/train.json"), crowds=kind != "yolo")
    assert ours.keys() == expected.keys()
    for name, boxes in expected.items():
        assert sorted(b[0] for b in ours[name]) == sorted(b[0] for b in boxes)
        for box in boxes:
            assert any(box[0] == b[0] and np.abs(np.subtract(box[1:], b[1:])).max() <= 2 for b in ours[name])


def test_a_split_has_each_image_once(sources, shapes, tmp_path):
    train, val = (one.path for one in convert("voc", sources["voc"], tmp_path / "cells.json", val_share=0.25))
    names = [
        [annotations.file_name(i) for i in range(len(annotations))]
        for annotations in map(CocoAnnotations.open, (train, val))
    ]
    assert (train.name, val.name) == ("cells_train.json", "cells_val.json")
    assert len(names[1]) == 6
    assert sorted(names[0] + names[1]) == sorted(file.name for file in (shapes / "train").iterdir())


def test_a_mistake_in_convert_is_one_line(sources, shapes, tmp_path):
    with pytest.raises(UserError, match="/nowhere: does not exist"):
        main(["voc", "/nowhere", str(tmp_path / "a.json")])
    with pytest.raises(UserError, match=r"neither `train` nor `val`.*give --images"):
        convert("yolo", sources["yolo"], tmp_path / "a.json")
    draw(tmp_path / "others/other.png")
    with pytest.raises(UserError, match=r"has no label file for an image .*the label file .*yolo/0000\d+\.txt"):
        convert("yolo", sources["yolo"], tmp_path / "a.json", tmp_path / "others")
    (tmp_path / "bad.xml").write_text("<no")
    with pytest.raises(UserError, match=r"bad.xml: cannot be read as cvat"):
        convert("cvat", tmp_path / "bad.xml", tmp_path / "a.json")
    (tmp_path / "other.xml").write_text("<annotations/>")
    with pytest.raises(UserError, match=r"is a folder with \d XML files: give the one to read"):
        convert("cvat", tmp_path, tmp_path / "a.json")


LINE = "0 0.5 0.5 0.2 0.4"


def pets(root, splits=("train", "val", "test")):
    """A YOLO data set with an image in each split."""
    for split in splits:
        draw(root / f"images/{split}/a.png")
        write(root / f"labels/{split}/a.txt", LINE)
    places = "".join(f"{split}: images/{split}\n" for split in splits)
    write(root / "data.yaml", f"{places}names: [cat, dog]\n")
    return root


def test_convert_without_a_format_says_what_it_saw(tmp_path, capsys):
    main([str(pets(tmp_path / "in")), str(tmp_path / "pets.json"), "--val", "0"])
    assert "in: read as yolo: data.yaml has `names`" in capsys.readouterr().out


def test_options_may_lie_between_the_format_and_the_paths(tmp_path):
    root = pets(tmp_path / "in", ("train",))
    main(["yolo", "--images", str(root / "images/train"), str(root / "labels/train"), str(tmp_path / "pets.json")])
    assert boxes_of(tmp_path / "pets.json") == {"a.png": [("cat", 40, 15, 20, 20)]}


def test_a_test_split_is_written_and_its_path_printed_outside_the_config(tmp_path, capsys):
    main([str(pets(tmp_path / "in")), str(tmp_path / "instances.json")])
    said, config = capsys.readouterr().out.split("for the experiment config:")
    assert (
        f"the test split is {tmp_path / 'instances_test.json'}, its images are in {tmp_path / 'in/images/test'}" in said
    )
    assert "instances_train.json" in config
    assert f"  test: {{annotations: {tmp_path / 'instances_test.json'}, images: " in config
    assert boxes_of(tmp_path / "instances_test.json") == {"a.png": [("cat", 40, 15, 20, 20)]}


def test_two_data_sets_with_equal_file_names_become_one(tmp_path):
    pets(tmp_path / "cats", ("train",))
    pets(tmp_path / "dogs", ("train",))
    for name in ("cats", "dogs"):
        convert("yolo", tmp_path / name, tmp_path / f"{name}.json", root=tmp_path)
    files = [hotcoco.COCO(str(tmp_path / f"{name}_train.json")) for name in ("cats", "dogs")]
    hotcoco.COCO.merge(files).save(str(tmp_path / "both.json"))
    data = {"train": {"annotations": str(tmp_path / "both.json"), "images": str(tmp_path)}}
    opened = open_split(parse_data({"data": data}), "train").annotations
    assert [opened.file_name(i) for i in range(len(opened))] == [
        "cats/images/train/a.png",
        "dogs/images/train/a.png",
    ]
    assert list(opened.category_names) == ["cat", "dog"]


def test_a_root_that_is_not_above_the_images_is_refused(tmp_path):
    root = pets(tmp_path / "in", ("train",))
    with pytest.raises(UserError, match=r"--root: .*labels does not contain .*images/train\. Fix: give a folder above"):
        convert("yolo", root, tmp_path / "o.json", root=root / "labels")


def test_an_ambiguous_source_is_an_error_that_names_both_formats(tmp_path):
    root = pets(tmp_path / "in")
    write(root / "boxes.csv", "filename,xmin,ymin,xmax,ymax,class\na.png,1,2,3,4,cat\n")
    with pytest.raises(
        UserError, match=r"may be several formats \(yolo: .*; csv: .*\)\. Fix: name one, `convert yolo …`"
    ):
        converted(None, root, tmp_path / "o.json")
    converted("yolo", root, tmp_path / "o.json")


def test_an_error_about_an_unknown_format_counts_the_source_s_files(tmp_path):
    write(tmp_path / "in/notes.docx", "")
    draw(tmp_path / "in/a.png")
    with pytest.raises(UserError, match=r"is not in a known format; there is 1 \.docx, 1 \.png\. Fix: "):
        converted(None, tmp_path / "in", tmp_path / "o.json")


def test_an_archive_is_to_be_unpacked(tmp_path):
    with pytest.raises(UserError, match=r"pets\.zip: is an archive\. Fix: unpack it"):
        converted(None, write(tmp_path / "pets.zip", b"PK\3\4"), tmp_path / "o.json")


def test_a_format_that_does_not_exist_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"yollo: is not a format; did you mean 'yolo'\?"):
        converted("yollo", tmp_path, tmp_path / "o.json")


def test_an_option_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--boxes: is for csv and huggingface, and not for yolo\. Fix: omit it"):
        converted("yolo", pets(tmp_path / "in"), tmp_path / "o.json", boxes="xyxy")


def test_a_file_that_cannot_be_read_does_not_hide_the_format(tmp_path):
    root = pets(tmp_path / "in")
    write(root / "notes.csv", b"gr\xf6\xdfe")
    splits, _ = converted(None, root, tmp_path / "o.json")
    assert list(splits) == ["train", "val", "test"]


def test_one_image_cannot_be_split(tmp_path):
    root = pets(tmp_path / "in", ("train",))
    with pytest.raises(UserError, match=r"--val: .* has one image"):
        converted("yolo", root, tmp_path / "o.json", val_share=0.5)


@pytest.mark.parametrize("path", ["data.yaml", "."])
def test_annotations_of_a_split_are_those_that_a_training_opens(path, tmp_path):
    root = pets(tmp_path / "in")
    coco, images = annotations_of(root / path, "val")
    annotations = CocoAnnotations.from_dict(coco)
    assert annotations.category_names == ["cat", "dog"]
    assert annotations[0].file_boxes.round(3).tolist() == [[40, 15, 20, 20]]
    assert (images / annotations.file_name(0)).is_file()


def test_annotations_of_a_split_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has the splits train, val, and not 'test'\. Fix: name one of these"):
        annotations_of(pets(tmp_path / "in", ("train", "val")), "test")


def test_annotations_of_a_source_without_splits_are_all(tmp_path):
    write(tmp_path / "in/a.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,100,50,cat,10,5,30,25\n")
    coco, images = annotations_of(tmp_path / "in", "train")
    assert [image["file_name"] for image in coco["images"]] == ["a.png"]
    assert images is None


@pytest.mark.parametrize("section", ["data.yaml", {"annotations": "data.yaml"}])
def test_a_config_names_a_yolo_data_set_directly(tmp_path, monkeypatch, caplog, section):
    caplog.set_level("INFO")
    pets(tmp_path)
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [dog, cat]\n")
    monkeypatch.chdir(tmp_path)
    data = parse_data({"data": {"train": section, "val": section}})
    train, val = open_train_and_val(data)
    assert train.categories == val.categories
    assert len(train.annotations) > 0
    assert all(Path(train.images.folder, record.file_name).is_file() for record in train.annotations)
    assert "data.train: data.yaml is converted at each start" in caplog.text


def test_a_config_names_a_voc_folder_directly(tmp_path):
    draw(tmp_path / "images/a.png")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    head = "<filename>a.png</filename><size><width>100</width><height>50</height></size>"
    write(tmp_path / "labels/a.xml", f"<annotation>{head}<object><name>dog</name>{box}</object></annotation>")
    given = {"annotations": str(tmp_path / "labels"), "images": str(tmp_path / "images")}
    val = open_split(parse_data({"data": {"val": given}}), "val")
    assert [category["name"] for category in val.categories] == ["dog"]
    assert len(val.annotations[0].boxes) == 1


def test_a_coco_file_needs_the_folder_of_its_images(tmp_path):
    with pytest.raises(UserError, match=r"data\.val\.images is missing"):
        parse_data({"data": {"val": {"annotations": "a.json"}}})


def test_the_only_folder_with_a_format_is_read(tmp_path):
    pets(tmp_path / "in/download/pets")
    (tmp_path / "in/code").mkdir()
    splits, said = converted(None, tmp_path / "in", tmp_path / "pets.json")
    assert list(splits) == ["train", "val", "test"]
    assert f"{tmp_path / 'in/download/pets'}: read as yolo" in said


def test_several_folders_with_a_format_are_named(tmp_path):
    for name in ("cats", "dogs"):
        pets(tmp_path / "in" / name)
    with pytest.raises(UserError, match=r"Fix: give one of .*in/cats \(yolo\), .*in/dogs"):
        convert(None, tmp_path / "in", tmp_path / "pets.json")


def test_a_source_without_a_val_split_says_how_to_make_one(tmp_path, capsys):
    main([str(pets(tmp_path / "in", ("train", "test"))), str(tmp_path / "pets.json")])
    assert "training also needs data.val: `--val 0.2` makes it" in capsys.readouterr().out


def test_an_image_in_two_splits_is_reported(tmp_path):
    root = pets(tmp_path / "in")
    write(root / "data.yaml", "train: images/train\nval: images/train\nnames: [cat]")
    assert "train and val have 1 image in common" in converted("yolo", root, tmp_path / "pets.json")[1]


def test_an_output_that_is_a_folder_is_an_error(tmp_path):
    root = pets(tmp_path / "in")
    with pytest.raises(UserError, match=r"OUTPUT: .*in is a folder\. Fix: name the file to write, .*annotations\.json"):
        convert("yolo", root, root)


def test_label_folders_are_not_split_by_a_description_far_above(tmp_path):
    root = pets(tmp_path / "in")
    (root / "data.yaml").rename(tmp_path / "another.yaml")
    splits, _ = converted(None, root, tmp_path / "o.json", categories=write(tmp_path / "names.txt", "cat\ndog\n"))
    assert list(splits) == ["train", "val", "test"]
