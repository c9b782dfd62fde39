"""`convert cvat`."""

import hotcoco
import pytest
from data_sets import annotations_in, converted, draw, write
from pycocotools import mask as coco_mask

from shared.data.convert.conversion import convert, main
from shared.errors import UserError


def test_cvat_s_folder_stands_for_the_one_xml_file_in_it(shapes, tmp_path):
    (tmp_path / "export").mkdir()
    file = tmp_path / "export/annotations.xml"
    hotcoco.COCO(str(shapes / "annotations/train.json")).to_cvat(str(file))
    of_folder, of_file = (convert("cvat", source, tmp_path / "a.json")[0] for source in (file.parent, file))
    assert of_folder == of_file


def test_cvat_an_image_name_that_comes_twice_is_an_error(tmp_path):
    images = "".join(f'<image id="{i}" name="a.png" width="100" height="50"/>' for i in range(2))
    (tmp_path / "a.xml").write_text(f"<annotations><version>1.1</version>{images}</annotations>")
    with pytest.raises(UserError, match=r"a\.xml: two images have the file name 'a\.png'"):
        convert("cvat", tmp_path / "a.xml", tmp_path / "out.json")


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
    with pytest.raises(
        UserError, match=r"a\.xml: image 'a\.png': (a coordinate|xtl|xbr) is '(1e999|1e400|nan|1e300)', .*\. Fix: "
    ):
        convert("cvat", tmp_path / "a.xml", tmp_path / "out.json")


def cvat_file(file, *images, meta="<label><name>car</name></label><label><name>road</name></label>"):
    """Images of 100×80, each (name, shapes)."""
    rows = "".join(
        f'<image id="{i}" name="{name}" width="100" height="80">{"".join(shapes)}</image>'
        for i, (name, shapes) in enumerate(images)
    )
    meta = f"<meta><task><labels>{meta}</labels></task></meta>" if meta else ""
    return write(file, f"<annotations><version>1.1</version>{meta}{rows}</annotations>")


ROTATED = '<box label="car" xtl="10.00" ytl="20.00" xbr="50.00" ybr="40.00" rotation="90.00"></box>'
MASK = '<mask label="road" rle="3, 4, 6, 4, 3" left="60" top="50" width="10" height="2"></mask>'
ELLIPSE = '<ellipse label="car" cx="50.00" cy="40.00" rx="20.00" ry="10.00"></ellipse>'
POLYLINE = '<polyline label="road" points="5,5;5,60"></polyline>'
POINTS = '<points label="key_point" points="20.00,30.00"></points>'


def test_cvat_rotated_boxes_masks_and_ellipses_have_their_enclosing_boxes(tmp_path):
    draw(tmp_path / "img/sub/a.png", tmp_path / "img/sub/b.png", size=(100, 80))
    full = '<mask label="road" rle="0, 20" left="20" top="10" width="10" height="2"></mask>'
    file = cvat_file(tmp_path / "a.xml", ("sub/a.png", [ROTATED, MASK, ELLIPSE, POLYLINE]), ("sub/b.png", [full]))
    splits, said = converted(None, file, tmp_path / "o.json", images=tmp_path / "img")
    assert splits[""] == {
        "sub/a.png": [("car", 20, 10, 20, 40), ("road", 63, 50, 4, 2), ("car", 30, 30, 40, 20)],
        "sub/b.png": [("road", 20, 10, 10, 2)],
    }
    rows = annotations_in(tmp_path / "o.json")
    assert [round(row["area"]) for row in rows] == [800, 8, 628, 20]
    decoded = coco_mask.decode(rows[1]["segmentation"])
    assert decoded.shape == (80, 100)
    assert decoded[50:52, 63:67].all()
    assert decoded.sum() == 8
    assert "polyline left out 1" in said


def test_cvat_shapes_turned_by_an_odd_angle_keep_their_area(tmp_path):
    turned = ROTATED.replace('"90.00"', '"30.00"'), ELLIPSE.replace("></ell", ' rotation="30"></ell')
    converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", turned)), tmp_path / "o.json")
    box, ellipse = annotations_in(tmp_path / "o.json")
    # half of 40 cos 30° + 20 sin 30°, around 30, 30
    assert box["bbox"] == pytest.approx([7.679, 11.34, 44.641, 37.321], abs=1e-3)
    assert box["area"] == pytest.approx(800, abs=1e-3)
    assert ellipse["bbox"] == pytest.approx([50 - 18.028, 40 - 13.229, 36.056, 26.458], abs=1e-3)


def test_cvat_a_mask_that_reaches_over_the_edge_is_cut_off(tmp_path):
    over = MASK.replace('left="60"', 'left="95"').replace('top="50"', 'top="-1"')
    splits, _ = converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", [over])), tmp_path / "o.json")
    assert splits[""]["a.png"] == [("road", 98, 0, 2, 1)]


def test_cvat_a_file_with_only_points_is_an_error(tmp_path):
    file = cvat_file(tmp_path / "a.xml", ("a.png", [POINTS, POLYLINE]), meta="")
    with pytest.raises(UserError, match=r"a\.xml: has no boxes.*, but points 1, polyline 1 alone\. Fix: "):
        main(["cvat", str(file), str(tmp_path / "o.json")])


def test_cvat_tags_and_cuboids_are_counted(tmp_path):
    others = '<tag label="night"></tag><cuboid label="car" xtl1="1"></cuboid><cuboid label="car"></cuboid>'
    _, said = converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", [ROTATED, others])), tmp_path / "o.json")
    assert "tag left out 1, cuboid left out 2" in said


def test_cvat_skeletons_become_keypoints_with_names(tmp_path):
    meta = (
        "<label><name>person</name><type>skeleton</type></label>"
        "<label><name>nose</name><type>points</type><parent>person</parent></label>"
        "<label><name>foot</name><type>points</type><parent>person</parent></label>"
    )
    skeleton = (
        '<skeleton label="person"><points label="foot" outside="0" occluded="1" points="30,60"></points>'
        '<points label="nose" outside="0" occluded="0" points="20,10"></points></skeleton>'
    )
    converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", [skeleton]), meta=meta), tmp_path / "o.json")
    (row,) = annotations_in(tmp_path / "o.json")
    assert (row["bbox"], row["keypoints"]) == ([20, 10, 10, 50], [20, 10, 2, 30, 60, 1])


def test_cvat_a_file_without_boxes_and_labels_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"a\.xml: has no boxes, and names no categories\. Fix: "):
        converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", []), meta=""), tmp_path / "o.json")


@pytest.mark.parametrize(
    ("subsets", "splits"),
    [(("Train", "Validation"), {"train": ["0.png"], "val": ["1.png"]}), (("Train", "mine"), {"": ["0.png", "1.png"]})],
)
def test_cvat_subsets_of_a_project_are_splits_if_all_are_named_so(subsets, splits, tmp_path):
    box = '<box label="car" xtl="1" ytl="2" xbr="5" ybr="4"/>'
    images = "".join(
        f'<image id="{i}" name="{i}.png" subset="{subset}" width="100" height="80">{box}</image>'
        for i, subset in enumerate(subsets)
    )
    found, _ = converted(None, write(tmp_path / "a.xml", f"<annotations>{images}</annotations>"), tmp_path / "o.json")
    assert {split: list(names) for split, names in found.items()} == splits


def test_cvat_names_without_the_ending_of_the_image_are_found(tmp_path):
    draw(tmp_path / "img/frame_000001.jpg", size=(100, 80))
    file = cvat_file(tmp_path / "a.xml", ("frame_000001", [ROTATED]))
    splits, _ = converted("cvat", file, tmp_path / "o.json", images=tmp_path / "img")
    assert list(splits[""]) == ["frame_000001.jpg"]


def test_cvat_attributes_are_kept(tmp_path):
    box = '<box label="car" xtl="1" ytl="2" xbr="5" ybr="4"><attribute name="color">red</attribute></box>'
    converted("cvat", cvat_file(tmp_path / "a.xml", ("a.png", [box])), tmp_path / "o.json")
    assert annotations_in(tmp_path / "o.json")[0]["attributes"] == {"color": "red"}


def test_cvat_of_a_video_says_what_to_export(tmp_path):
    file = write(tmp_path / "a.xml", '<annotations><track id="0" label="car"><box frame="0"/></track></annotations>')
    with pytest.raises(UserError, match=r"a\.xml: is of a video\. Fix: export the task as `CVAT for images 1\.1`"):
        converted("cvat", file, tmp_path / "o.json")
