"""`convert csv`, `openimages`, `createml` and `huggingface`."""

import json

import pytest
from data_sets import converted, draw, write

from shared.data.convert.conversion import annotations_of
from shared.errors import UserError

ROBOFLOW = "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,100,50,cat,10,5,30,25\n"


@pytest.mark.parametrize(
    "text",
    [
        ROBOFLOW,
        "\ufeffimage;xmin;ymin;xmax;ymax;label\r\na.png;10;5;30;25;cat\r\n",
        "image_id,x,y,w,h,category\na,10,5,20,20,cat\n",
        "path,x1,y1,x2,y2,class_name\nphotos/a.png,0.1,0.1,0.3,0.5,cat\n",
        "a.png,10,5,30,25,cat\n",
        'image_id,width,height,bbox,label\na,100,50,"[10, 5, 20, 20]",cat\na,100,50,"[90.0, 5, 10, 20]",dog\n',
    ],
)
def test_csv_with_any_usual_columns(text, tmp_path):
    draw(tmp_path / "in/a.png")
    write(tmp_path / "in/boxes.csv", text)
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits[""]["a.png"][0] == ("cat", 10, 5, 20, 20)


def test_csv_a_row_without_numbers_is_an_image_without_boxes(tmp_path):
    draw(tmp_path / "in/a.png", tmp_path / "in/b.png")
    write(tmp_path / "in/boxes.csv", "b.png,,,,,\na.png,10,5,30,25,cat\n")
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"b.png": [], "a.png": [("cat", 10, 5, 20, 20)]}


def test_csv_a_folder_of_roboflow_is_read_by_its_path_alone(tmp_path):
    for split in ("train", "valid", "test"):
        draw(tmp_path / f"in/{split}/a.png")
        write(tmp_path / f"in/{split}/_annotations.csv", ROBOFLOW)
    splits, said = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits == {split: {"a.png": [("cat", 10, 5, 20, 20)]} for split in ("train", "val", "test")}
    assert "read as csv: " in said


def test_csv_four_numbers_that_may_be_either_need_an_option(tmp_path):
    draw(tmp_path / "in/a.png")
    write(tmp_path / "in/boxes.csv", 'image,bbox,label\na.png,"[10, 5, 30, 25]",cat\n')
    with pytest.raises(UserError, match=r"boxes\.csv: .* Fix: pass `--boxes xywh` or `--boxes xyxy`"):
        converted("csv", tmp_path / "in", tmp_path / "o.json")
    for order, size in (("xywh", (30, 25)), ("xyxy", (20, 20))):
        splits, _ = converted("csv", tmp_path / "in", tmp_path / "o.json", boxes=order)
        assert splits[""]["a.png"] == [("cat", 10, 5, *size)]


def test_csv_four_numbers_that_leave_the_image_as_sizes_are_corners(tmp_path):
    draw(tmp_path / "in/a.png")
    write(tmp_path / "in/boxes.csv", 'image,bbox,label\na.png,"[10, 5, 30, 25]",cat\na.png,"[60, 5, 80, 25]",cat\n')
    splits, _ = converted("csv", tmp_path / "in", tmp_path / "o.json")
    assert splits[""]["a.png"] == [("cat", 10, 5, 20, 20), ("cat", 60, 5, 20, 20)]


def test_csv_without_a_category_gets_one_and_logs_it(tmp_path):
    draw(tmp_path / "in/a.png")
    write(tmp_path / "in/boxes.csv", "image,x,y,w,h\na.png,10,5,20,20\n")
    splits, said = converted("csv", tmp_path / "in", tmp_path / "o.json")
    assert splits[""]["a.png"] == [("object", 10, 5, 20, 20)]
    assert "no column names the category" in said


@pytest.mark.parametrize("row", ["a.png,100,50,cat,10,5,thirty,25", "a.png,100,50,cat"])
def test_csv_a_wrong_row_is_named(row, tmp_path):
    write(tmp_path / "boxes.csv", f"{ROBOFLOW}{row}\n")
    with pytest.raises(UserError, match=r"boxes\.csv: row 2: .*\. Fix: correct the row"):
        converted("csv", tmp_path / "boxes.csv", tmp_path / "o.json")


def test_open_images_has_shares_groups_and_names_of_categories(tmp_path):
    root = tmp_path / "in"
    draw(root / "train/0001.jpg", root / "validation/0002.jpg")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction\n"
    rows = "0001,x,/m/1,1,0.1,0.3,0.1,0.5,0,0,0,0\n0001,x,/m/2,1,0,1,0,1,0,0,1,0\n0009,x,/m/1,1,0,1,0,1,0,0,0,0\n"
    write(root / "oidv6-train-annotations-bbox.csv", header + rows)
    write(root / "validation-annotations-bbox.csv", header + "0002,x,/m/1,1,0.1,0.3,0.1,0.5,0,0,0,0\n")
    write(root / "class-descriptions-boxable.csv", "/m/1,Cat\n/m/2,Dog\n")
    splits, said = converted(None, root, tmp_path / "o.json")
    assert splits["train"] == {"0001.jpg": [("Cat", 10, 5, 20, 20), ("Dog", 0, 0, 100, 50)]}
    assert splits["val"] == {"0002.jpg": [("Cat", 10, 5, 20, 20)]}
    assert "crowds (IsGroupOf) 1, boxes left out (of images that are not there) 1" in said


def test_createml_boxes_have_their_middle(tmp_path):
    draw(tmp_path / "in/train/a.png")
    box = {"label": "cat", "coordinates": {"x": 20, "y": 15, "width": 20, "height": 20}}
    write(tmp_path / "in/train/_annotations.createml.json", [{"image": "a.png", "annotations": [box]}])
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits["train"] == {"a.png": [("cat", 10, 5, 20, 20)]}


OBJECTS = {"bbox": [[10, 5, 20, 20], [60, 5, 20, 10]], "categories": ["cat", "dog"]}
BOXES = [("cat", 10, 5, 20, 20), ("dog", 60, 5, 20, 10)]


@pytest.mark.parametrize(
    "objects", [OBJECTS, [{"bbox": b, "category": c} for b, c in zip(*OBJECTS.values(), strict=True)]]
)
def test_hugging_face_imagefolder_has_a_line_per_image(objects, tmp_path):
    for split in ("train", "validation"):
        draw(tmp_path / f"in/{split}/a.png", tmp_path / f"in/{split}/b.png")
        lines = [{"file_name": "a.png", "objects": objects}, {"file_name": "b.png", "objects": {"bbox": []}}]
        write(tmp_path / f"in/{split}/metadata.jsonl", "\n".join(map(json.dumps, lines)))
    splits, said = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits == {split: {"a.png": BOXES, "b.png": []} for split in ("train", "val")}
    assert "read as huggingface: " in said


def test_hugging_face_metadata_may_be_csv_with_json_cells(tmp_path):
    draw(tmp_path / "in/a.png")
    cell = json.dumps(OBJECTS).replace('"', '""')
    write(tmp_path / "in/metadata.csv", f'file_name,objects\na.png,"{cell}"\n')
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits[""] == {"a.png": BOXES}


def test_hugging_face_a_wrong_line_is_named(tmp_path):
    draw(tmp_path / "in/a.png")
    write(
        tmp_path / "in/metadata.jsonl", '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3]], "label": ["cat"]}}\n'
    )
    with pytest.raises(UserError, match=r"metadata\.jsonl: row 1: a box has 3 numbers, and needs 4\. Fix: "):
        converted("huggingface", tmp_path / "in", tmp_path / "o.json")


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_hugging_face_parquet_and_arrow_give_the_images_too(ending, tmp_path):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    draw(tmp_path / "a.png")
    lists = datasets.List(datasets.List(datasets.Value("float32"), length=4))
    classes = datasets.List(datasets.ClassLabel(names=["cat", "dog", "bird"]))
    features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": lists, "category": classes}})
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "photos/a.png"}
    row = {"image": image, "objects": {"bbox": OBJECTS["bbox"], "category": [0, 1]}}
    table = pyarrow.Table.from_pylist([row], schema=features.arrow_schema)
    if ending == "parquet":
        (tmp_path / "in/data").mkdir(parents=True)
        pyarrow.parquet.write_table(table, tmp_path / "in/data/train-00000-of-00001.parquet")
    else:
        write(tmp_path / "in/train/state.json", {})
        with pyarrow.ipc.new_stream(tmp_path / "in/train/data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    splits, _ = converted(None, tmp_path / "in", tmp_path / "o.json")
    assert splits == {"train": {"00000000_a.png": BOXES}}
    assert (tmp_path / "o_images/train/00000000_a.png").read_bytes() == image["bytes"]
    categories = json.loads((tmp_path / "o_train.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["cat", "dog", "bird"]
    with pytest.raises(UserError, match="holds its images inside"):
        annotations_of(tmp_path / "in", "train")


def test_hugging_face_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    write(tmp_path / "in/train.parquet", b"PAR1")
    with pytest.raises(UserError, match=r"is not installed\. Fix: pip install datasets"):
        converted(None, tmp_path / "in", tmp_path / "o.json")


@pytest.mark.parametrize("kind", ["csv", "openimages", "huggingface"])
def test_a_table_with_a_cell_without_end_is_named(kind, tmp_path):
    header = {
        "csv": "image,x1,y1,x2,y2",
        "openimages": "ImageID,LabelName,XMin,XMax,YMin,YMax",
        "huggingface": "file_name",
    }
    file = "metadata.csv" if kind == "huggingface" else "boxes.csv"
    write(tmp_path / f"in/{file}", f'{header.get(kind, "file_name")}\n"{"x" * 140_000}\n')
    with pytest.raises(UserError, match=rf"{file}.*field larger than field limit"):
        converted(kind, tmp_path / "in", tmp_path / "o.json")
