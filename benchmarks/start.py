"""How long a run with very much data takes until that is open, and what it takes of memory, by 1 and more processes.

`python3 benchmarks/start.py`, or only some of it:

disk: 2 million images (empty files: it needs as many inodes), from the start to a batch of files read by 1 and 8
    processes. `remembered` is a later start: at most 5 s.
bucket: the same, where a server on loopback makes the list up, page by page as S3 does.
annotations: 1 and 16 processes that open a new annotation file of COCO's size at once, then one of 10 million boxes;
    the limit is 1.2 times the memory of one process.
"""

import argparse
import http.server
import multiprocessing
import os
import shutil
import sys
import tempfile
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks import together
from tabulate import tabulate

from coco_files import make_file
from shared.config.schema import DataConfig, Split
from shared.data.annotations import CocoAnnotations
from shared.data.open import open_split

BYTES = 1000  # of each image in the bucket
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="disk|bucket|annotations")
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--boxes", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made, for a time")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for what in arguments.what or ("disk", "bucket", "annotations"):
            if what == "annotations":
                parses(folder, arguments.boxes)
            else:
                starts(folder, what, arguments.images)
    finally:
        shutil.rmtree(folder)


def starts(folder: Path, place: str, images: int) -> None:
    write_boxes(folder / "train.json", images, images)
    data = DataConfig(anonymous=True)
    server = None
    if place == "disk":
        data.train = Split(str(folder / "train.json"), str(folder / "images"))
        (folder / "images").mkdir()
        for number in range(images):
            os.mknod(folder / "images" / name_of(number))
    else:
        data.train = Split(str(folder / "train.json"), "s3://bucket/images")
        ports = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve_bucket, args=(images, ports), daemon=True)
        server.start()
        data.endpoint_url = f"http://127.0.0.1:{ports.get()}"
    rows = []
    for ranks in (1, 8):
        data.cache_dir = str(folder / f"{place}{ranks}")
        for start in ("first", "remembered", "check_images: false"):
            data.check_images = start != "check_images: false"
            seconds, gib = together(lambda: first_batch(data), ranks)
            rows.append([place, f"{images:,}", ranks, start, f"{seconds:.1f}", f"{gib:.2f}"])
            print(*rows[-1], flush=True)
    if server is not None:
        server.terminate()
    headers = ["where", "images", "processes", "start", "seconds", "GiB, all together"]
    print(tabulate(rows, headers=headers, tablefmt="github"))


def first_batch(data: DataConfig) -> object:
    split = open_split(data, "train")
    for index in range(0, len(split.annotations), len(split.annotations) // BATCH):
        split.images.read(split.annotations[index].file_name)
    return split


def parses(folder: Path, boxes: int) -> None:
    rows = []
    make_file(None, folder / "coco.json")
    write_boxes(folder / "boxes.json", boxes // 10, boxes)
    for path in (folder / "coco.json", folder / "boxes.json"):
        gib = {}
        for ranks in (1, 16):
            cache = folder / f"{path.stem}{ranks}"
            seconds, gib[ranks] = together(lambda path=path, cache=cache: CocoAnnotations.open(path, cache), ranks)
            count = len(CocoAnnotations.open(path, cache).columns["labels"])
            rows.append([f"{count:,}", ranks, f"{seconds:.1f}", f"{gib[ranks]:.2f}", f"{gib[ranks] / gib[1]:.2f}"])
            print(*rows[-1], flush=True)
    headers = ["annotations", "processes", "seconds", "GiB, all together", "times one's"]
    print(tabulate(rows, headers=headers, tablefmt="github"))


def name_of(number: int) -> str:
    return f"{number:012d}.jpg"


def write_boxes(path: Path, images: int, boxes: int) -> None:
    """A COCO file of boxes without masks."""
    with path.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "thing"}], "images": [')
        for i in range(images):
            comma = "," if i else ""
            file.write(f'{comma}\n{{"id": {i}, "file_name": "{name_of(i)}", "width": 640, "height": 480}}')
        file.write('], "annotations": [')
        for i in range(boxes):
            comma, image = "," if i else "", i * images // boxes
            file.write(
                f'{comma}\n{{"id": {i}, "image_id": {image}, "category_id": 1, "bbox": [{i % 600}.5, 20, 30.25, 40], '
                '"area": 1210.0, "iscrowd": 0}'
            )
        file.write("]}")


def serve_bucket(images: int, ports: multiprocessing.Queue) -> None:
    """An S3 of one folder, which lists its keys a thousand a page, and whose objects are zeros."""

    class Bucket(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            asked = urllib.parse.parse_qs(self.path.partition("?")[2])
            body = bytes(BYTES)
            if "list-type" in asked:
                first = int(asked.get("continuation-token", ["0"])[0])
                body = page_of_keys(asked["prefix"][0], first, min(first + 1000, images), images).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    ports.put(server.server_port)
    server.serve_forever()


def page_of_keys(prefix: str, first: int, end: int, images: int) -> str:
    contents = "".join(
        f"<Contents><Key>{prefix}{name_of(i)}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;0&quot;</ETag><Size>{BYTES}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for i in range(first, end)
    )
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < images else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix>{prefix}</Prefix><KeyCount>{end - first}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{contents}</ListBucketResult>"
    )


if __name__ == "__main__":
    main()
