"""`convert voc`."""

import pytest
from data_sets import annotations_in, converted, draw

from shared.data.annotations import CocoAnnotations
from shared.data.convert.conversion import convert, main
from shared.errors import UserError


def voc_object(name="cell", corners=(10, 10, 30, 30), difficult=0):
    box = "".join(f"<{key}>{c}</{key}>" for key, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def write_voc(file, *objects, filename=None, width=100):
    file.parent.mkdir(parents=True, exist_ok=True)
    size = f"<size><width>{width}</width><height>50</height></size>"
    name = f"<filename>{filename or f'{file.stem}.jpg'}</filename>"
    file.write_text(f"<annotation>{name}{size}{''.join(objects)}</annotation>")


def test_voc_usual_folders_with_splits_are_read_and_counted(tmp_path, capsys):
    root = tmp_path / "VOC2012"
    write_voc(root / "Annotations/a.xml", voc_object(corners=(0, 1, 100, 50)), voc_object(difficult=1))
    write_voc(root / "Annotations/b.xml", voc_object(corners=(5, 5, 2, 9)))
    write_voc(root / "Annotations/c.xml", voc_object("dust"))
    for split, stems in (("train", "a\nb\n"), ("val", "c\n")):
        file = root / f"ImageSets/Main/{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stems)
    (root / "JPEGImages").mkdir()
    main(["voc", str(root), str(tmp_path / "cells.json")])
    said = capsys.readouterr().out
    train = CocoAnnotations.open(tmp_path / "cells_train.json")
    assert [train.file_name(i) for i in range(2)] == ["a.jpg", "b.jpg"]
    assert train[0].file_boxes.tolist() == [[0, 0, 100, 50], [9, 9, 21, 21]]  # VOC counts from 1; a 0 is the first too
    assert train[0].iscrowd.tolist() == [False, True]
    counts = "images 2, boxes 2, categories 2, images without boxes 1, crowds (VOC's `difficult`) 1, boxes left out"
    assert f"cells_train.json: {counts}" in said
    images = f"images: {root / 'JPEGImages'}}}"
    assert f"data:\n  train: {{annotations: {tmp_path / 'cells_train.json'}, {images}\n  val: {{annotations: " in said

    file = root / "Annotations/a.xml"
    file.write_text(file.read_text()[:200])
    with pytest.raises(UserError, match=r"a\.xml: is not an annotation of Pascal VOC, or is cut off"):
        convert("voc", root, tmp_path / "cells.json")


def voc_names(tmp_path, source="voc"):
    convert("voc", tmp_path / source, tmp_path / "out.json", tmp_path / "voc")
    opened = CocoAnnotations.open(tmp_path / "out.json")
    return [opened.file_name(i) for i in range(len(opened))]


def test_voc_brackets_in_a_name_are_no_pattern(tmp_path):
    draw(tmp_path / "voc/cell1.png", tmp_path / "voc/cell[1].png")
    write_voc(tmp_path / "voc/cell[1].xml", voc_object())
    assert voc_names(tmp_path) == ["cell[1].png"]


def test_voc_only_images_count_as_images_in_a_folder_of_both(tmp_path):
    draw(tmp_path / "voc/b0.PNG", tmp_path / "voc/b0.small.png")
    for stem in ("a0", "b0"):
        write_voc(tmp_path / f"voc/{stem}.xml", voc_object(), filename=f"{stem}.xml")
        (tmp_path / f"voc/{stem}.txt").write_text("")
    assert voc_names(tmp_path) == ["a0.xml", "b0.PNG"]  # the first has no image, and the training reports it


def test_voc_an_image_that_two_files_claim_is_an_error(tmp_path):
    draw(tmp_path / "voc/a.png")
    for stem in ("a", "b"):
        write_voc(tmp_path / f"voc/{stem}.xml", voc_object(), filename="a.png")
    with pytest.raises(UserError, match=r"b\.xml: its image is 'a\.png', which a\.xml has too\. Fix: correct"):
        voc_names(tmp_path)


def test_voc_an_xml_file_keeps_the_image_with_its_own_name(tmp_path):
    draw(tmp_path / "voc/a.png", tmp_path / "voc/b.png")
    write_voc(tmp_path / "voc/a.xml", voc_object("cat"), filename="b.png")
    write_voc(tmp_path / "voc/b.xml", voc_object("dog"), filename="a.png")
    splits, said = converted("voc", tmp_path / "voc", tmp_path / "o.json")
    assert {name: rows[0][0] for name, rows in splits[""].items()} == {"a.png": "cat", "b.png": "dog"}
    assert "`filename`s of another image (the image with the XML file's name is taken) 2" in said


def test_voc_drawings_beside_the_images_are_not_the_images(tmp_path):
    draw(tmp_path / "in/JPEGImages/a.png", tmp_path / "in/AnnotationsVisualization/a.png")
    write_voc(tmp_path / "in/Annotations/a.xml", voc_object(), filename="a.png")
    (written,) = convert("voc", tmp_path / "in", tmp_path / "o.json")
    assert written.part.folder == tmp_path / "in/JPEGImages"


def test_voc_two_images_that_may_be_meant_are_an_error(tmp_path):
    draw(tmp_path / "voc/a.png", tmp_path / "voc/a.bmp")
    write_voc(tmp_path / "voc/a.xml", voc_object(), filename="old_name.jpg")
    with pytest.raises(UserError, match=r"a\.xml: the image 'a' may be a\.bmp or a\.png"):
        voc_names(tmp_path)


def test_voc_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    draw(tmp_path / "private.png", tmp_path / "voc/b.png")
    write_voc(tmp_path / "voc/a.xml", voc_object(), filename="../private.png")
    with pytest.raises(UserError, match=r"voc: the image file name '\.\./private\.png' leads out"):
        voc_names(tmp_path)


@pytest.mark.parametrize("value", ["1e400", "-1e400", "nan", "inf", "1e300", "12 px", "9" * 400])
def test_voc_a_corner_that_is_no_number_is_named_with_its_file(value, tmp_path):
    write_voc(tmp_path / "voc/a.xml", voc_object(corners=(1, 2, value, 4)))
    with pytest.raises(UserError) as error:
        convert("voc", tmp_path / "voc", tmp_path / "out.json")
    assert f"voc/a.xml: xmax is '{value[:40]}" in str(error.value)


@pytest.mark.parametrize("value", ["1e400", "nan", "100.5", "0", "-3", "99999999999"])
def test_voc_a_size_that_no_image_has_is_named_with_its_file(value, tmp_path):
    write_voc(tmp_path / "voc/a.xml", voc_object(), width=value)
    with pytest.raises(UserError, match=rf"voc/a\.xml: .*{value}"):
        convert("voc", tmp_path / "voc", tmp_path / "out.json")


def test_voc_a_name_in_a_list_may_have_spaces(tmp_path):
    root = tmp_path / "voc"
    for i in range(4):
        draw(root / f"JPEGImages/photo ({i}).png")
        write_voc(root / f"Annotations/photo ({i}).xml", voc_object(), filename=f"photo ({i}).png")
    lists = {"train": "photo (0)\r\nphoto (1) \nphoto (2).png\n\n", "val": "\ufeffphoto (3)  1\n"}
    for split, text in lists.items():
        file = root / f"ImageSets/Main/{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    splits, _ = converted(None, root, tmp_path / "o.json")
    assert [list(split) for split in splits.values()] == [[f"photo ({i}).png" for i in range(3)], ["photo (3).png"]]


def test_voc_names_of_a_list_without_a_file_are_counted(tmp_path):
    root = tmp_path / "voc"
    for split, text in {"train": "a\ngone\n", "val": "b\n", "test": "only_for_the_server\n"}.items():
        file = root / f"ImageSets/Main/{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for stem in "abc":
        write_voc(root / f"Annotations/{stem}.xml", voc_object())
    splits, said = converted("voc", root, tmp_path / "o.json")
    assert {split: list(images) for split, images in splits.items()} == {"train": ["a.jpg"], "val": ["b.jpg"]}
    assert "train.txt: 1 names have no XML file, and are left out; the first is 'gone'" in said
    assert "1 XML files are in none of the lists" in said


@pytest.mark.parametrize("layout", ["{split}", "{split}/Annotations", "annotations/{split}"])
def test_voc_a_folder_per_split_has_one_list_of_categories(layout, tmp_path):
    for split, names in (("train", ("bird", "cat", "dog")), ("valid", ("bird", "dog"))):
        folder = tmp_path / "in" / layout.format(split=split)
        draw(folder / "a0.png") if layout == "{split}" else draw(tmp_path / f"in/{split}/images/a0.png")
        write_voc(folder / "a0.xml", *map(voc_object, names), filename="a0.png")
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert [[row[0] for row in split["a0.png"]] for split in splits.values()] == [
        ["bird", "cat", "dog"],
        ["bird", "dog"],
    ]
    for split in ("train", "val"):
        assert CocoAnnotations.open(tmp_path / f"o_{split}.json").category_names == ["bird", "cat", "dog"]


def test_voc_categories_can_be_those_of_a_coco_file(tmp_path):
    for split, names in (("train", ("bird", "cat", "dog")), ("valid", ("bird", "dog"))):
        write_voc(tmp_path / split / "a0.xml", *map(voc_object, names))
    converted("voc", tmp_path / "train", tmp_path / "train.json")
    converted("voc", tmp_path / "valid", tmp_path / "val.json", categories=tmp_path / "train.json")
    assert CocoAnnotations.open(tmp_path / "val.json").category_names == ["bird", "cat", "dog"]
    (tmp_path / "val.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"--categories: .*val\.txt lacks 'bird'.*Fix: "):
        converted("voc", tmp_path / "train", tmp_path / "o.json", categories=tmp_path / "val.txt")


@pytest.mark.parametrize("folders", [("labels", "imgs"), ("xml", "photos"), (".", "."), ("Annotations", "JPEGImages")])
def test_voc_folders_may_have_any_name(folders, tmp_path):
    root = tmp_path / "in"
    draw(root / folders[1] / "a.png")
    write_voc(root / folders[0] / "a.xml", voc_object(), filename="a.png")
    _, said = converted(None, root, tmp_path / "o.json")
    (one,) = convert("voc", root, tmp_path / "o.json")
    assert one.part.folder == root / folders[1]
    assert list(one.part.found) == [f"{folders[1]}/a.png".removeprefix("./")]
    assert "read as voc: 1 XML files" in said


def test_voc_devkit_is_read_with_the_lists_of_the_folder_in_it(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for split, stem in (("train", "a"), ("val", "b")):
        draw(root / f"JPEGImages/{stem}.jpg")
        write_voc(root / f"Annotations/{stem}.xml", voc_object())
        file = root / f"ImageSets/Main/{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stem)
    splits, _ = converted(None, tmp_path / "VOCdevkit", tmp_path / "o.json")
    assert {split: list(images) for split, images in splits.items()} == {"train": ["a.jpg"], "val": ["b.jpg"]}


def test_voc_hidden_files_are_no_data(tmp_path):
    draw(tmp_path / "in/JPEGImages/a0.png")
    write_voc(tmp_path / "in/Annotations/a0.xml", voc_object(), filename="a0.png")
    (tmp_path / "in/Annotations/._a0.xml").write_bytes(b"\0\5\x16\7")
    splits, _ = converted("voc", tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"a0.png": [("cell", 9, 9, 21, 21)]}


def test_voc_an_empty_size_is_read_from_the_image(tmp_path):
    draw(tmp_path / "voc/a.png", size=(64, 48))
    write_voc(tmp_path / "voc/a.xml", voc_object(), filename="a.png", width=0)
    text = (tmp_path / "voc/a.xml").read_text().replace("<height>50</height>", "")
    (tmp_path / "voc/a.xml").write_text(text)
    converted("voc", tmp_path / "voc", tmp_path / "o.json")
    record = CocoAnnotations.open(tmp_path / "o.json")[0]
    assert (record.width, record.height) == (64, 48)


def test_voc_polygons_rotated_boxes_and_parts_are_read_or_counted(tmp_path):
    corners = "<x1>10</x1><y1>10</y1><x2>30</x2><y2>10</y2><x3>30</x3><y3>30</y3>"
    polygon = voc_object().replace("</object>", f"<polygon>{corners}</polygon></object>")
    rotated = (
        "<object><name>cell</name><robndbox><cx>40</cx><cy>25</cy><w>20</w><h>10</h><angle>1.5707963267948966</angle>"
        "</robndbox></object>"
    )
    part = voc_object().replace("</object>", "<part><name>head</name></part></object>")
    write_voc(tmp_path / "voc/a.xml", polygon, rotated, part, "<object><name>cell</name></object>")
    splits, said = converted("voc", tmp_path / "voc", tmp_path / "o.json")
    assert splits[""]["a.jpg"][1] == ("cell", 35, 15, 10, 20)
    assert annotations_in(tmp_path / "o.json")[0]["segmentation"] == [[10, 10, 30, 10, 30, 30]]
    assert "parts of objects left out 1, objects left out (without a box) 1" in said
