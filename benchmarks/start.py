"""How long a training takes to start: to its first batch, in a new container, and with very many images."""

import http.server
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from command_line import DETECTORS, ROOT, main
from tabulate import tabulate
from web_server import served

BYTES = 1000  # of each image in the bucket
BATCH = 16


# --- the first batch ----------------------------------------------------------------------------------------


def batch(data: Path = Path("/data/bccd"), only: list[str] = DETECTORS, turns: int = 3) -> None:
    """From the command to the first trained batch of each detector's `bccd.yaml`, with a warm cache.

    Reported are the medians of wall seconds and of the CPU seconds of all the command's processes. The latter tell more
    on a busy machine.

    data: BCCD's folder; default /data/bccd
    only: detectors; default all
    """
    rows = []
    for detector in only:
        first_batch(ROOT / detector, data)  # parses the annotations
        measured = [first_batch(ROOT / detector, data) for _ in range(turns)]
        rows.append([detector, *(statistics.median(column) for column in zip(*measured, strict=True))])
    print(tabulate(rows, headers=["", "wall s", "CPU s"], floatfmt=".1f"))


def on_bccd(data: Path) -> list[str]:
    """The arguments of `train bccd.yaml` that name the data: BCCD's folder, or that of synthetic data."""
    folder, arguments = data.absolute(), []
    for split in ("train", "val"):
        images = folder / ("images" if (folder / "images").exists() else split)
        paths = f"{{annotations: {folder / 'annotations' / split}.json, images: {images}}}"
        arguments += ["--set", f"data.{split}={paths}"]
    return arguments


def first_batch(detector: Path, data: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one start in a detector's folder. The training is stopped then."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "model_def.py", "train", "bccd.yaml", "--output-dir", str(run), *on_bccd(data)]
        command += ["--set", "scheduling_unit=1"]  # a report per batch
        with Path(folder, "log").open("w+") as log:
            started = time.monotonic()
            process = psutil.Popen(command, cwd=detector, stdout=log, stderr=subprocess.STDOUT)
            while not (run / "metrics.jsonl").exists():
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{' '.join(command[:3])}: exit status {process.returncode}\n{log.read()[-2000:]}")
                time.sleep(0.02)
            seconds = time.monotonic() - started
            family = [process, *process.children(recursive=True)]
            busy = sum(sum(each.cpu_times()[:2]) for each in family)
            for each in family:
                each.kill()
            process.wait()
    return seconds, busy


# --- a container --------------------------------------------------------------------------------------------


def container(only: list[str] = DETECTORS, compiled: bool = False, folder: Path | None = None) -> None:
    """From a container's start to the first batch of `const_fake.yaml`, by startup-hook.sh and the training.

    The container is a new environment with Python, torch, torchvision and determined alone, in the versions of
    constraints.txt.

    only: detectors; default all
    compiled: compiles the operations, with an empty cache of pip and again with what pip cached; minutes for each
    folder: for the environments (11 GB), which are deleted at the end
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        image, rows = make_image(Path(name) / "image"), []
        for detector in only:
            cached = {"COMPILED_OPERATIONS": "1", "PIP_CACHE_DIR": f"{name}/{detector}-cache"}
            for way, environment in (
                {"compiled": cached, "from pip's cache": cached}.items() if compiled else [("", {})]
            ):
                rows.append([detector, way, *start_container(ROOT / detector, image, environment)])
                print(*rows[-1], flush=True)
    headers = ["detector", "operations", "startup-hook.sh, s", "CPU s", "until the first batch, s", "in all, s"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".0f"))


def make_image(home: Path) -> Path:
    """An environment of torch, torchvision and determined."""
    subprocess.run(["python3", "-m", "venv", "--copies", home], check=True)
    pip = [home / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch", "torchvision", "determined", "numpy"], check=True)
    return home


def start_container(detector: Path, image: Path, environment: dict[str, str]) -> tuple[float, float, float, float]:
    """Seconds of the hook, of its CPU, of the training of one batch, and of hook and training together."""
    kept = image.with_name("image-as-it-was")
    shutil.copytree(image, kept, symlinks=True)
    task = {**os.environ, **environment, "PATH": f"{image / 'bin'}:{os.environ['PATH']}"}
    train = f"python3 model_def.py train const_fake.yaml --output-dir {tempfile.mkdtemp(dir=image.parent)}/run"
    train += " --set searcher.max_length.batches=1 --set min_validation_period.batches=0"
    try:
        began, used = time.perf_counter(), os.times()
        subprocess.run(["bash", "-ec", ". ./startup-hook.sh"], cwd=detector, env=task, check=True)
        ready, since = time.perf_counter(), os.times()
        subprocess.run(train.split(), cwd=detector, env=task, check=True, capture_output=True)
        first = time.perf_counter()
    finally:
        shutil.rmtree(image)
        kept.rename(image)
    cpu = sum(getattr(since, of) - getattr(used, of) for of in ("children_user", "children_system"))
    return ready - began, cpu, first - ready, first - began


# --- many images --------------------------------------------------------------------------------------------


def disk(images: int = 2_000_000, folder: Path | None = None) -> None:
    """From the start to the read files of a batch, by 1 and 8 processes, and their memory; `again`: at most 5 s.

    images: empty files; they need as many inodes
    folder: for the files, which are deleted at the end
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "images").mkdir()
        for number in range(images):
            os.mknod(f"{name}/images/{number:012d}.jpg")
        _open_with_many("disk", f"{name}/images", Path(name), images)


def bucket(images: int = 2_000_000) -> None:
    """The same with a bucket, which a server on loopback lists a thousand keys at a time, as S3 does."""
    with tempfile.TemporaryDirectory() as name, served(bucket_of(images)) as url:
        _open_with_many("bucket", "s3://bucket/images", Path(name), images, endpoint_url=url)


def _open_with_many(place: str, where: str, folder: Path, images: int, **options) -> None:
    from annotations import write_boxes
    from memory import together

    from shared.config.schema import DataConfig, Split
    from shared.data.open import open_split

    def open_and_read(data: DataConfig) -> object:
        split = open_split(data, "train")
        for index in range(0, len(split.annotations), len(split.annotations) // BATCH):
            split.images.read(split.annotations[index].file_name)
        return split

    write_boxes(folder / "train.json", images, images)
    split, rows = Split(str(folder / "train.json"), where), []
    for ranks in (1, 8):
        for start in ("first", "again", "check_images: false"):
            checks, cache = start != "check_images: false", str(folder / f"cache{ranks}")
            data = DataConfig(train=split, anonymous=True, cache_dir=cache, check_images=checks, **options)
            rows.append([place, f"{images:,}", ranks, start, *together(lambda data=data: open_and_read(data), ranks)])
    headers = ["where", "images", "processes", "start", "seconds", "GiB, all together"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", "", "", "", ".1f", ".2f")))


def bucket_of(images: int) -> type[http.server.BaseHTTPRequestHandler]:
    """Answers as an S3 of one folder, which lists its keys a thousand per page, and whose objects are zeros."""

    class Bucket(http.server.BaseHTTPRequestHandler):
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

    return Bucket


def page_of_keys(prefix: str, first: int, end: int, images: int) -> str:
    contents = "".join(
        f"<Contents><Key>{prefix}{i:012d}.jpg</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
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
    main(__doc__, batch, container, disk, bucket)
