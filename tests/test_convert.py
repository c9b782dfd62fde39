"""`python3 -m shared convert`: other formats as COCO files that a training takes."""

import hotcoco
import numpy as np
import pytest
import yaml
from PIL import Image

from shared.config.experiment import parse_data
from shared.data.annotations import CocoAnnotations
from shared.data.convert import convert, main
from shared.data.open import open_split
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


def voc_object(name="cell", corners=(10, 10, 30, 30), difficult=0):
    box = "".join(f"<{key}>{c}</{key}>" for key, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def write_voc(file, *objects, filename=None, width=100):
    file.parent.mkdir(parents=True, exist_ok=True)
    size = f"<size><width>{width}</width><height>50</height></size>"
    name = f"<filename>{filename or f'{file.stem}.jpg'}</filename>"
    file.write_text(f"<annotation>{name}{size}{''.join(objects)}</annotation>")


def test_voc_is_read_from_its_usual_folders_with_its_own_splits_and_said_what_came_of_it(tmp_path, capsys):
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
    with pytest.raises(UserError, match=r"a\.xml is no annotation of Pascal VOC, or is cut off"):
        convert("voc", root, tmp_path / "cells.json")


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
    (labels / "c.txt").write_text("")
    with pytest.raises(UserError, match=r"has no image for the label file .*c\.txt"):
        convert("yolo", tmp_path, tmp_path / "pets.json")
    (labels / "c.txt").rename(labels / "b.txt").write_text("7 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError, match=r"b\.txt: line 1: category 7, which data.yaml does not name"):
        convert("yolo", tmp_path, tmp_path / "pets.json")


def test_a_split_has_each_image_once(sources, shapes, tmp_path):
    train, val = (one.path for one in convert("voc", sources["voc"], tmp_path / "cells.json", val_share=0.25))
    names = [
        [annotations.file_name(i) for i in range(len(annotations))]
        for annotations in map(CocoAnnotations.open, (train, val))
    ]
    assert (train.name, val.name) == ("cells_train.json", "cells_val.json")
    assert len(names[1]) == 6
    assert sorted(names[0] + names[1]) == sorted(file.name for file in (shapes / "train").iterdir())


def test_what_is_wrong_is_one_line(sources, shapes, tmp_path):
    with pytest.raises(SystemExit, match="error: /nowhere does not exist"):
        main(["voc", "/nowhere", str(tmp_path / "a.json")])
    with pytest.raises(UserError, match=r"neither `train` nor `val`.*give --images"):
        convert("yolo", sources["yolo"], tmp_path / "a.json")
    with pytest.raises(UserError, match=r"has no image for the label file .*yolo/0000\d+\.txt"):
        convert("yolo", sources["yolo"], tmp_path / "a.json", shapes / "val")
    (tmp_path / "bad.xml").write_text("<no")
    with pytest.raises(UserError, match=r"bad.xml cannot be read as cvat"):
        convert("cvat", tmp_path / "bad.xml", tmp_path / "a.json")
    (tmp_path / "other.xml").write_text("<annotations/>")
    with pytest.raises(UserError, match=r"is a folder with \d XML files: give the one to read"):
        convert("cvat", tmp_path, tmp_path / "a.json")


def test_cvat_s_folder_stands_for_the_one_xml_file_in_it(sources, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/annotations.xml").write_bytes(sources["cvat"].read_bytes())
    of_folder, of_file = (
        convert("cvat", source, tmp_path / "a.json")[0] for source in (tmp_path / "export", sources["cvat"])
    )
    assert of_folder == of_file


def draw(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(file)


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
    assert voc_names(tmp_path) == ["a0.xml", "b0.PNG"]  # the first has no image, and the training says so


def test_voc_an_image_that_two_files_claim_is_an_error(tmp_path):
    draw(tmp_path / "voc/a.png", tmp_path / "voc/b.png")
    for stem in ("a", "b"):
        write_voc(tmp_path / f"voc/{stem}.xml", voc_object(), filename="a.png")
    with pytest.raises(UserError, match=r"b\.xml: its image is 'a\.png', which a\.xml has too\. Fix: correct"):
        voc_names(tmp_path)


def test_voc_two_images_that_may_be_meant_are_an_error(tmp_path):
    draw(tmp_path / "voc/a.png", tmp_path / "voc/a.bmp")
    write_voc(tmp_path / "voc/a.xml", voc_object(), filename="old_name.jpg")
    with pytest.raises(UserError, match=r"a\.xml .*no image 'old_name\.jpg', and a\.bmp, a\.png with the name"):
        voc_names(tmp_path)


def test_voc_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    draw(tmp_path / "private.png", tmp_path / "voc/b.png")
    write_voc(tmp_path / "voc/a.xml", voc_object(), filename="../private.png")
    with pytest.raises(UserError, match=r"voc: the image file name '\.\./private\.png' leads out"):
        voc_names(tmp_path)


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


def test_cvat_an_image_name_that_comes_twice_is_an_error(tmp_path):
    images = "".join(f'<image id="{i}" name="a.png" width="100" height="50"/>' for i in range(2))
    (tmp_path / "a.xml").write_text(f"<annotations><version>1.1</version>{images}</annotations>")
    with pytest.raises(UserError, match=r"a\.xml: two images have the file name 'a\.png'"):
        convert("cvat", tmp_path / "a.xml", tmp_path / "out.json")


@pytest.mark.parametrize("value", ["1e400", "-1e400", "nan", "inf", "1e300", "12 px", "9" * 400])
def test_voc_a_corner_that_is_no_number_is_named_with_its_file(value, tmp_path):
    write_voc(tmp_path / "voc/a.xml", voc_object(corners=(1, 2, value, 4)))
    with pytest.raises(UserError) as error:
        convert("voc", tmp_path / "voc", tmp_path / "out.json")
    assert f"voc/a.xml is no annotation of Pascal VOC, or is cut off (xmax is '{value[:40]}" in str(error.value)


@pytest.mark.parametrize("value", ["1e400", "nan", "100.5", "0", "-3", "99999999999"])
def test_voc_a_size_that_no_image_has_is_named_with_its_file(value, tmp_path):
    write_voc(tmp_path / "voc/a.xml", voc_object(), width=value)
    with pytest.raises(UserError, match=rf"voc/a\.xml .*{value}"):
        convert("voc", tmp_path / "voc", tmp_path / "out.json")


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


@pytest.mark.parametrize(
    "shape",
    [
        '<box label="cat" xtl="1" ytl="2" xbr="1e400" ybr="4"/>',
        '<box label="cat" xtl="nan" ytl="2" xbr="3" ybr="4"/>',
        '<box label="cat" xtl="1" ytl="2" xbr="1e300" ybr="4"/>',
        '<polygon label="cat" points="1,2;nan,3;4,5"/>',
        '<polygon label="cat" points="1,2;1e999,3;4,5"/>',
    ],
)
def test_cvat_a_coordinate_that_cannot_be_used_is_named_with_its_image(shape, tmp_path):
    labels = "<meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    image = f'<image id="0" name="a.png" width="100" height="50">{shape}</image>'
    (tmp_path / "a.xml").write_text(f"<annotations><version>1.1</version>{labels}{image}</annotations>")
    with pytest.raises(UserError, match=r"a\.xml: image 'a\.png': a coordinate is (inf|nan|1e\+300)\. Fix: "):
        convert("cvat", tmp_path / "a.xml", tmp_path / "out.json")
