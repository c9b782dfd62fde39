"""`convert` on data sets of 10,000 images with 4 boxes each, per format: seconds and peak memory.

Each conversion runs in a new process. Memory is what it adds at its peak. The images are links to one
JPEG file, so the disk is warm.
"""

import json
import time
from pathlib import Path

from command_line import main, scratch_folder
from memory import added_mib, in_process
from PIL import Image

from shared.data.convert.conversion import FORMATS, convert

WIDTH, HEIGHT = 640, 480
BOXES = [(10 + 100 * i, 20 + 50 * i, 80, 60) for i in range(4)]  # x y width height
CORNERS = [(x, y, x + w, y + h) for x, y, w, h in BOXES]


def files_of(kind, stems):
    """The annotation files of a format, by their names."""
    if kind == "yolo":
        shares = ((x + w / 2, y + h / 2, w, h) for x, y, w, h in BOXES)
        lines = "".join(f"0 {x / WIDTH} {y / HEIGHT} {w / WIDTH} {h / HEIGHT}\n" for x, y, w, h in shares)
        yaml = {"data.yaml": "train: images\nnames: [cat]"}
        return yaml | {f"labels/{stem}.txt": lines for stem in stems}
    if kind == "voc":
        keys = ("xmin", "ymin", "xmax", "ymax")
        boxes = ["".join(f"<{k}>{n}</{k}>" for k, n in zip(keys, corners, strict=True)) for corners in CORNERS]
        objects = "".join(f"<object><name>cat</name><bndbox>{box}</bndbox></object>" for box in boxes)
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        text = "<annotation><filename>{}.jpg</filename>{}{}</annotation>"
        return {f"Annotations/{stem}.xml": text.format(stem, size, objects) for stem in stems}
    if kind == "cvat":
        keys = ("xtl", "ytl", "xbr", "ybr")
        shapes = [" ".join(f'{k}="{n}"' for k, n in zip(keys, corners, strict=True)) for corners in CORNERS]
        boxes = "".join(f'<box label="cat" {shape}/>' for shape in shapes)
        rows = (f'<image name="{stem}.jpg" width="{WIDTH}" height="{HEIGHT}">{boxes}</image>' for stem in stems)
        return {"annotations.xml": f"<annotations>{''.join(rows)}</annotations>"}
    if kind == "coco":
        images = [{"id": i, "file_name": f"{s}.jpg", "width": WIDTH, "height": HEIGHT} for i, s in enumerate(stems)]
        rows = [{"image_id": i, "category_id": 1, "bbox": box} for i in range(len(stems)) for box in BOXES]
        categories = [{"id": 1, "name": "cat"}]
        return {"a.json": json.dumps({"images": images, "annotations": rows, "categories": categories})}
    if kind == "labelme":
        shapes = [{"label": "cat", "shape_type": "rectangle", "points": [c[:2], c[2:]]} for c in CORNERS]
        size = {"imageWidth": WIDTH, "imageHeight": HEIGHT}
        return {f"{stem}.json": json.dumps({"shapes": shapes, "imagePath": f"{stem}.jpg", **size}) for stem in stems}
    if kind == "labelstudio":
        sides = {"original_width": WIDTH, "original_height": HEIGHT, "type": "rectanglelabels"}
        box = {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["cat"]}
        done = [{"result": [{"value": box, **sides}] * 4}]
        return {"a.json": json.dumps([{"data": {"image": f"{stem}.jpg"}, "annotations": done} for stem in stems])}
    if kind == "createml":
        rows = [{"label": "cat", "coordinates": {"x": x, "y": y, "width": w, "height": h}} for x, y, w, h in BOXES]
        return {"a.json": json.dumps([{"image": f"{stem}.jpg", "annotations": rows} for stem in stems])}
    if kind == "openimages":
        shares = [f"/m/1,{x / WIDTH},{X / WIDTH},{y / HEIGHT},{Y / HEIGHT}" for x, y, X, Y in CORNERS]
        rows = (f"{stem},{box}" for stem in stems for box in shares)
        return {"train-annotations-bbox.csv": "\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *rows])}
    if kind == "csv":
        rows = (f"{stem}.jpg,{WIDTH},{HEIGHT},cat,{','.join(map(str, c))}" for stem in stems for c in CORNERS)
        return {"a.csv": "\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *rows])}
    if kind == "kitti":
        lines = "".join(f"Car 0 0 0 {' '.join(map(str, corners))} 1 1 1 1 1 1 0\n" for corners in CORNERS)
        return {f"label_2/{stem}.txt": lines for stem in stems}
    if kind == "dota":
        lines = "".join(f"{x} {y} {X} {y} {X} {Y} {x} {Y} ship 0\n" for x, y, X, Y in CORNERS)
        return {f"labelTxt/{stem}.txt": lines for stem in stems}
    if kind == "huggingface":
        objects = {"bbox": BOXES, "category": ["cat"] * len(BOXES)}
        rows = (json.dumps({"file_name": f"{stem}.jpg", "objects": objects}) for stem in stems)
        return {"images/metadata.jsonl": "\n".join(rows)}
    raise ValueError(kind)


def measure(kind: str, folder: Path) -> str:
    started, cpu = time.perf_counter(), time.process_time()
    with added_mib() as added:
        (written,) = convert(None, folder, folder / "out/a.json", boxes="xywh" * (kind == "huggingface"), say=str)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert sum(len(image["annotations"]) for image in written.part.images) == len(BOXES) * len(written.part.images)
    return f"| {kind} | {seconds:.1f} | {cpu:.1f} | {added[0]:.0f} |"


ALL = [kind for kind in FORMATS if kind != "tiles"]  # which takes COCO files and writes images


def formats(images: int = 10_000, only: list[str] = ALL) -> None:
    """
    only: formats; default all
    """
    stems = [f"{i:06}" for i in range(images)]
    print("| format | seconds | CPU seconds | peak MiB |\n|---|---|---|---|")
    for kind in only:
        with scratch_folder() as folder:
            (folder / "images").mkdir()
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{stems[0]}.jpg")
            for stem in stems[1:]:
                (folder / "images" / f"{stem}.jpg").hardlink_to(folder / "images" / f"{stems[0]}.jpg")
            for name, text in files_of(kind, stems).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            print(in_process(measure, kind, folder, start="spawn"), flush=True)


if __name__ == "__main__":
    main(__doc__, formats)
