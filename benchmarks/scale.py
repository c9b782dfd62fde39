"""What each part of a training costs on 1 to 256 GPUs and 100,000 to 100 million annotations: measured small, fitted by
a straight line, checked at a larger size that is not in the fit, and put together in tables. No GPU is needed.

`python3 benchmarks/scale.py`, or only some of it (annotations, validation, ranks, checkpoint, bucket); the tables need
the first three. Sizes are bytes and counts, which depend on no other load of the machine. Times are CPU seconds, user
and system, of one process (of messages, of the chief's thread, without ZeroMQ's own): other load lengthens them too,
but by far less than the clock's.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import zmq
from determined.core import DistributedContext
from start import name_of, serve_bucket
from tabulate import tabulate

from shared.data.annotations import CocoAnnotations
from shared.data.remote import RemoteImages, StoreOptions
from shared.data.samplers import TrainingBatchSampler, labels_of, repeat_factors
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.experiment import DataConfig, Split, check_trainable, open_split
from shared.training.averaging import AveragedWeights
from shared.training.clock import Clock
from shared.training.exchange import Exchange
from shared.training.hang import Mark, Phase, Standing
from shared.training.manifest import write_manifest
from shared.training.processes import _free_ports
from shared.training.stopping import Stopping

GPUS, ANNOTATIONS, A_MACHINE = (1, 8, 64, 256), (10**5, 10**6, 10**7, 10**8), 8
AN_IMAGE, CATEGORIES = 10, 80  # boxes
OF_VALIDATION, DETECTIONS = 0.04, 100  # annotations to those of the training, as COCO has it; detections an image
NUMBERS = 40  # of a polygon
BATCH = 16  # images a GPU
MIB, GIB = 2**20, 2**30

# costs that the tables ask for
PARSE_MEMORY, COLUMNS = "first open: private memory, bytes", "columns on disk, mapped once a machine, bytes"
CHIEF_SECONDS, CHIEF_TRUTH = "the chief's metrics, CPU s", "the chief's truth, made once, CPU s"
CHIEF_MEMORY = "the chief's private memory for truth and metrics, bytes"
EPOCH_KEPT = "an epoch's numbers on 1 GPU, bytes"


@dataclass
class Line:
    """What something costs: `fixed` and `each` for one more. Fitted to all sizes but the largest, which checks it."""

    fixed: float
    each: float
    sizes: list[int]
    predicted: float
    measured: float

    def at(self, size: float) -> float:
        return max(self.fixed + self.each * size, 0.0)


def lines_of(measure: Callable[[int], dict[str, float]], sizes: tuple[int, ...]) -> dict[str, Line]:
    """A line for each cost that `measure` gives of a size."""
    measured = [measure(size) for size in sizes]
    lines = {}
    for name, largest in measured[-1].items():
        values = [costs[name] for costs in measured[:-1]]
        # by their ratio: a small size counts as much as a large one
        each, fixed = np.polyfit(sizes[:-1], values, 1, w=1 / np.maximum(np.abs(values), 1e-9))
        lines[name] = Line(fixed, each, list(sizes), fixed + each * sizes[-1], largest)
    return lines


# --- one measurement, in a process of its own ---------------------------------------------------------


def in_new_process(work: Callable, *arguments) -> dict[str, float]:
    """What `work(mark, *arguments)` returns, and as "peak" the most private memory since it called `mark`."""
    here, there = multiprocessing.get_context("fork").Pipe()

    def mark() -> None:
        there.send(None)
        there.recv()

    def child() -> None:
        there.send(work(mark, *arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    before = peak = _private(process.pid)
    while True:
        if here.poll(0.005):
            if (result := here.recv()) is not None:
                break
            before = peak = _private(process.pid)
            here.send(None)
        peak = max(peak, _private(process.pid))
        if process.exitcode:
            raise SystemExit("a measurement failed")
    process.join()
    return {**result, "peak": peak - before}


def _private(pid: int) -> int:
    """Bytes that are no file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in status else 0


def cost_of(work: Callable[[], object]) -> tuple[float, int, int]:
    """CPU seconds; bytes at the peak, and kept by what it returns."""
    started = time.process_time()
    work()
    seconds = time.process_time() - started
    tracemalloc.start()
    kept = work()
    of_result, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return seconds, peak, of_result


# --- annotations --------------------------------------------------------------------------------------


def write_coco(path: Path, boxes: int, numbers: int = 0) -> None:
    """A COCO file: so many boxes, each with a polygon of `numbers`."""
    images = boxes // AN_IMAGE
    polygon = f', "segmentation": [[{", ".join("123.45" for _ in range(numbers))}]]' if numbers else ""

    def pieces() -> Iterator[str]:
        categories = [{"id": i + 1, "name": f"category {i + 1}"} for i in range(CATEGORIES)]
        yield f'{{"categories": {json.dumps(categories)}, "images": ['
        for i in range(images):
            comma = "," if i else ""
            yield f'{comma}\n{{"id": {i}, "file_name": "{name_of(i)}", "width": 640, "height": 480}}'
        yield '], "annotations": ['
        for i in range(boxes):
            comma, category = "," if i else "", 1 + i * i % 6007 % CATEGORIES
            yield (
                f'{comma}\n{{"id": {i}, "image_id": {i // AN_IMAGE}, "category_id": {category}, '
                f'"bbox": [{i % 600}.5, 20, 30.25, 40], "area": 1210.0, "iscrowd": 0{polygon}}}'
            )
        yield "]}"

    with path.open("w") as file:
        file.writelines(pieces())


def parse(mark: Callable, path: Path, cache: Path) -> dict[str, float]:
    mark()
    started = time.process_time()
    CocoAnnotations.open(path, cache)
    return {"seconds": time.process_time() - started}


def start_again(mark: Callable, path: Path, cache: Path) -> dict[str, float]:
    """What every process does at each start, the images' look aside; then all records are read."""
    data = DataConfig(train=Split(str(path), str(path.parent)), cache_dir=str(cache), check_images=False)

    def start() -> object:
        split = open_split(data, "train")
        check_trainable(split.annotations)
        return split

    seconds, peak, kept = cost_of(start)
    annotations = start().annotations
    rare = cost_of(lambda: repeat_factors(*labels_of(annotations), len(annotations), 0.1))
    mark()
    before = _private(os.getpid())
    for index in range(len(annotations)):
        annotations[index]
    costs = {"start_seconds": seconds, "start_peak": peak, "start_kept": kept, "read": _private(os.getpid()) - before}
    return {**costs, "rare_seconds": rare[0], "rare_peak": rare[1]}


def annotations_of(folder: Path, numbers: int = 0) -> Callable[[int], dict[str, float]]:
    def measure(boxes: int) -> dict[str, float]:
        path, cache = folder / f"{boxes}.json", folder / f"cache{boxes}"
        write_coco(path, boxes, numbers)
        parsed = in_new_process(parse, path, cache)
        files = [file for file in cache.rglob("*") if file.is_file()]
        costs = {
            "JSON file, bytes": path.stat().st_size,
            "first open: parse, CPU s": parsed["seconds"],
            PARSE_MEMORY: parsed["peak"],
            COLUMNS: sum(file.stat().st_size for file in files),
        }
        if not numbers:
            again = in_new_process(start_again, path, cache)
            costs |= {
                "later start with all checks, CPU s": again["start_seconds"],
                "later start: private memory for a moment, bytes": again["start_peak"],
                "repeat factors, CPU s": again["rare_seconds"],
                "repeat factors: private memory for a moment, bytes": again["rare_peak"],
                "private memory after all records were read, bytes": max(again["read"], 0) + again["start_kept"],
            }
        path.unlink()
        shutil.rmtree(cache)
        return costs

    return measure


def sampler(images: int) -> dict[str, float]:
    def draw(mark: Callable, groups: int, repeats: float | None) -> dict[str, float]:
        of_images = (np.arange(images) % groups).astype(np.uint8)
        often = None if repeats is None else np.full(images, repeats)

        def first_batch() -> object:
            batches = iter(TrainingBatchSampler(of_images, BATCH, 0, repeats=often))
            return batches, next(batches)

        seconds, peak, kept = cost_of(first_batch)
        return {"seconds": seconds, "most": peak, "kept": kept}

    plain, groups = in_new_process(draw, 1, None), in_new_process(draw, 2, 1.3)
    return {
        "an epoch drawn, CPU s": plain["seconds"],
        "an epoch drawn: private memory for a moment, bytes": plain["most"],
        EPOCH_KEPT: plain["kept"],
        "an epoch drawn of two aspect ratios with repeats, CPU s": groups["seconds"],
        "the same: private memory for a moment, bytes": groups["most"],
    }


# --- validation ---------------------------------------------------------------------------------------


def detect(annotations: CocoAnnotations, indices: range) -> list[Detections]:
    """The boxes of the truth, moved a little, and noise."""
    rng, found = np.random.default_rng(indices.start), []
    for index in indices:
        record = annotations[index]
        noise = DETECTIONS - len(record.boxes)
        corners = rng.uniform(0, 400, (noise, 2))
        boxes = np.concatenate([record.boxes, np.hstack([corners, corners + rng.uniform(8, 200, (noise, 2))])])
        labels = np.concatenate([record.labels, rng.integers(CATEGORIES, size=noise)])
        found.append(Detections(record.image_id, boxes + rng.normal(size=boxes.shape), rng.uniform(size=100), labels))
    return found


def validate(mark: Callable, path: Path, cache: Path, ranks: int) -> dict[str, float]:
    """From what the ranks have found, as Determined's sockets send it, to the metrics on the chief."""
    annotations = CocoAnnotations.open(path, cache)
    chief, messages = CocoEvaluator(annotations), []
    for rank in range(ranks):
        evaluator = CocoEvaluator(annotations)
        evaluator.update(detect(annotations, range(rank, len(annotations), ranks)))
        messages.append(pickle.dumps(evaluator.share(), pickle.HIGHEST_PROTOCOL))
        del evaluator
    mark()
    started = time.process_time()
    chief.open_truth()
    truth_seconds, started = time.process_time() - started, time.process_time()
    chief.metrics_of([pickle.loads(message) for message in messages])
    return {
        "sent": sum(map(len, messages)),
        "truth": truth_seconds,
        "metrics": time.process_time() - started,
    }


def validation_of(folder: Path, images: int | None = None) -> Callable[[int], dict[str, float]]:
    """By images, of 8 ranks; by ranks, where the images are given."""

    def measure(size: int) -> dict[str, float]:
        count, ranks = (size, 8) if images is None else (images, size)
        path, cache = folder / f"val{count}.json", folder / f"val{count}"
        write_coco(path, count * AN_IMAGE)
        costs = in_new_process(validate, path, cache, ranks)
        of_chief = {
            "detections sent to the chief, bytes": costs["sent"],
            CHIEF_SECONDS: costs["metrics"],
            CHIEF_MEMORY: costs["peak"],
        }
        return of_chief if images else {**of_chief, CHIEF_TRUTH: costs["truth"]}

    return measure


# --- processes ----------------------------------------------------------------------------------------


MEETING, TICK = "a meeting", "a tick of the watch"


def meet(ranks: int) -> dict[str, float]:
    costs = in_new_process(_meet, ranks, 20)
    return {name: cost for name, cost in costs.items() if name != "peak"}


def _meet(mark: Callable, ranks: int, rounds: int) -> dict[str, float]:
    """Ranks as threads, over the sockets that they have as processes: `Stopping`'s meetings and `Watch`'s exchange."""
    ports, together, of_chief = _free_ports(2), threading.Barrier(ranks), {}
    sent, send, send_parts = [0], zmq.Socket.send, zmq.Socket.send_multipart

    def counting(socket, data, *rest, **options):
        if socket.type == zmq.PUB:  # the chief's, to each of the others
            sent[0] += len(data) * (ranks - 1)
        return send(socket, data, *rest, **options)

    def counting_parts(socket, parts, *rest, **options):
        if socket.type == zmq.ROUTER:
            sent[0] += len(parts[-1])
        return send_parts(socket, parts, *rest, **options)

    def rank_thread(rank: int) -> None:
        distributed = DistributedContext(
            rank=rank,
            size=ranks,
            local_rank=0,
            local_size=1,
            cross_rank=rank,
            cross_size=ranks,
            chief_ip="127.0.0.1",
            pub_port=ports[0],
            pull_port=ports[1],
        )
        stopping = Stopping(distributed, clock=Clock(max_hours=1.0))
        exchange = Exchange(distributed)
        standing = Standing(
            rank, Mark(Phase.BACKWARD, 12_345, 67_890), 1.5, 600.0, 12_345, True, "trial_step.py:99 in x"
        )

        def tick() -> None:
            together.wait()
            exchange.swap(standing)

        for name, one in (("meeting", lambda: stopping.after_batch(10)), ("tick", tick)):
            one(), one()  # who has connected is known from then on
            together.wait()
            before, seconds = sent[0], []
            for _ in range(rounds):
                started = time.thread_time()
                one()
                seconds.append(time.thread_time() - started)
            if rank == 0:
                of_chief[name] = statistics.median(seconds), (sent[0] - before) / rounds
            together.wait()
        exchange.close()
        distributed.close()

    zmq.Socket.send, zmq.Socket.send_multipart = counting, counting_parts
    threads = [threading.Thread(target=rank_thread, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    costs = {}
    for what, name in (("meeting", MEETING), ("tick", TICK)):
        seconds, sent_bytes = of_chief[what]
        costs[f"{name}, the chief's CPU s"] = seconds
        costs[f"{name}, to each other process, bytes"] = sent_bytes / (ranks - 1)  # the square of the ranks in all
    return costs


# --- checkpoint and bucket ----------------------------------------------------------------------------


def checkpoint_of(folder: Path) -> Callable[[int], dict[str, float]]:
    def save(mark: Callable, parameters: int) -> dict[str, float]:
        model = torch.nn.ModuleList(torch.nn.Linear(1000, 1000) for _ in range(parameters // 10**6))
        average = AveragedWeights(model, 0.9998)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [model.state_dict(), optimizer.state_dict(), average.module.state_dict()]
        place = Path(tempfile.mkdtemp(dir=folder))
        started = time.process_time()
        torch.save(state, place / "state_dict.pth")
        saved = time.process_time()
        write_manifest(place)
        hashed = time.process_time()
        size = (place / "state_dict.pth").stat().st_size
        shutil.rmtree(place)
        return {"bytes": size, "save": saved - started, "hash": hashed - saved}

    def measure(parameters: int) -> dict[str, float]:
        costs = in_new_process(save, parameters)
        return {
            "checkpoint with AdamW and averaged weights, bytes": costs["bytes"],
            "checkpoint written, CPU s": costs["save"],
            "checkpoint hashed, CPU s": costs["hash"],
        }

    return measure


def bucket(images: int) -> dict[str, float]:
    def look(mark: Callable, port: int) -> dict[str, float]:
        names = np.array([name_of(i).encode() for i in range(images)])
        options = StoreOptions(endpoint_url=f"http://127.0.0.1:{port}", anonymous=True)
        started = time.process_time()
        found = RemoteImages("s3://bucket/images", options).look(names)
        assert not found.missing
        return {"seconds": time.process_time() - started}

    ports = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve_bucket, args=(images, ports), daemon=True)
    server.start()
    costs = in_new_process(look, ports.get())
    server.terminate()
    return {"a bucket listed, a request a thousand names: CPU s": costs["seconds"]}


# --- what is printed ----------------------------------------------------------------------------------


def checks(title: str, per: str, lines: dict[str, Line]) -> None:
    rows = [
        [
            name.removesuffix(", bytes").removesuffix(", CPU s"),
            f"{_amount(line.fixed, name)} + {_amount(line.each, name)} a {per}",
            _amount(line.predicted, name),
            _amount(line.measured, name),
            f"{line.predicted / line.measured:.2f}" if line.measured else "",
        ]
        for name, line in lines.items()
    ]
    *fitted, checked = next(iter(lines.values())).sizes
    print(f"\n{title}: fitted to {', '.join(f'{size:,}' for size in fitted)}, checked at {checked:,}\n")
    print(tabulate(rows, headers=["cost", "fit", "predicted", "measured", "ratio"], tablefmt="github"), flush=True)


def _amount(value: float, name: str) -> str:
    if "CPU s" in name:
        return f"{1e6 * value:.3g} µs" if abs(value) < 1e-3 else f"{value:.3g} s"
    if abs(value) < 1000:
        return f"{value:.3g} B"
    return f"{value / 1024:.3g} KiB" if abs(value) < MIB else f"{value / MIB:,.4g} MiB"


def tables(
    of: dict[str, Line],
    masks: dict[str, Line],
    by_images: dict[str, Line],
    found: dict[str, Line],
    ranks: dict[str, Line],
) -> None:
    columns = of[COLUMNS]
    rows = [
        [
            f"{n:,}",
            f"{of['JSON file, bytes'].at(n) / GIB:.2f}",
            f"{of['first open: parse, CPU s'].at(n):.1f}",
            f"{of[PARSE_MEMORY].at(n) / GIB:.2f} ({masks[PARSE_MEMORY].at(n) / GIB:.2f})",
            f"{columns.at(n) / GIB:.2f} ({masks[COLUMNS].at(n) / GIB:.2f})",
            f"{of['later start with all checks, CPU s'].at(n):.2f}",
            f"{by_images['an epoch drawn, CPU s'].at(n / AN_IMAGE):.2f}",
            f"{of['repeat factors, CPU s'].at(n):.1f}",
            f"{found['detections sent to the chief, bytes'].at(_validated(n)) / MIB:,.1f}",
            f"{found[CHIEF_SECONDS].at(_validated(n)) + found[CHIEF_TRUTH].at(_validated(n)):.1f}",
            f"{found[CHIEF_MEMORY].at(_validated(n)) / GIB:.2f}",
        ]
        for n in ANNOTATIONS
    ]
    headers = ["annotations", "JSON, GiB", "parse, CPU s", "parse, GiB (with polygons)"]
    headers += ["mapped, GiB (with polygons)", "later start, CPU s"]
    headers += ["an epoch drawn, CPU s", "repeat factors, CPU s", "to the chief, MiB"]
    headers += ["chief evaluates, CPU s", "chief evaluates, GiB"]
    print(f"\nBy annotations, {AN_IMAGE} an image; the same for any number of GPUs\n")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

    rows = []
    for gpus in GPUS:
        row = [gpus, -(-gpus // A_MACHINE)]
        for name in (MEETING, TICK):
            seconds = ranks[f"{name}, the chief's CPU s"].at(gpus) if gpus > 1 else 0.0
            sent = (gpus - 1) * ranks[f"{name}, to each other process, bytes"].at(gpus)
            row += [f"{1000 * seconds:.2f}", f"{sent / 1024:,.1f}"]
        rows.append(row)
    headers = ["GPUs", "machines that parse", "a meeting: chief's CPU ms", "chief sends, KiB"]
    headers += ["a tick of the watch: chief's CPU ms", "chief sends, KiB"]
    print("\nBy GPUs; the same for any number of annotations\n")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

    rows = []
    for n in ANNOTATIONS:
        for gpus in GPUS:
            images, here = n / AN_IMAGE, min(gpus, A_MACHINE)
            moment = max(
                of["later start: private memory for a moment, bytes"].at(n),
                by_images["an epoch drawn: private memory for a moment, bytes"].at(images),
            )
            rows.append(
                [
                    f"{n:,}",
                    gpus,
                    f"{columns.at(n) / MIB:,.0f}",
                    f"{here * by_images[EPOCH_KEPT].at(images) / gpus / MIB:,.1f}",
                    f"{here * moment / MIB:,.0f}",
                    f"{here * of['repeat factors: private memory for a moment, bytes'].at(n) / MIB:,.0f}",
                    f"{-(-int(images) // (gpus * BATCH)):,}",
                    f"{found['detections sent to the chief, bytes'].at(_validated(n)) / gpus / MIB:,.2f}",
                ]
            )
    headers = ["annotations", "GPUs", "mapped, once, MiB", "an epoch's numbers, MiB", "for a moment, MiB"]
    headers += ["with repeats, MiB", "batches an epoch", "a rank to the chief, MiB"]
    print(f"\nBy both, {BATCH} images a GPU: memory of a machine of up to {A_MACHINE} GPUs, and a rank's part\n")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True), flush=True)


def _validated(annotations: int) -> float:
    """Images of the validation."""
    return annotations * OF_VALIDATION / AN_IMAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="annotations|validation|ranks|checkpoint|bucket")
    parser.add_argument("--folder", type=Path, help="where the files are made, for a time")
    parser.add_argument("--small", action="store_true", help="a tenth of the sizes")
    arguments = parser.parse_args()
    what = arguments.what or ["annotations", "validation", "ranks", "checkpoint", "bucket"]
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    torch.set_num_threads(1)
    of: dict[str, dict[str, Line]] = {}

    def fit(name: str, title: str, per: str, measure: Callable[[int], dict[str, float]], *sizes: int) -> None:
        sizes = tuple(size // 10 for size in sizes) if arguments.small and per != "rank" else sizes
        of[name] = lines_of(measure, sizes)
        checks(title, per, of[name])

    try:
        if "annotations" in what:
            fit("boxes", "Annotations", "box", annotations_of(folder), 5 * 10**5, 10**6, 2 * 10**6, 4 * 10**6)
            title = f"With a polygon of {NUMBERS} numbers each"
            fit("masks", title, "object", annotations_of(folder, NUMBERS), 50_000, 150_000, 300_000, 10**6)
            fit("sampler", "Epochs", "image", sampler, 10**6, 2 * 10**6, 4 * 10**6, 10**7)
        if "validation" in what:
            title = f"Validation, {DETECTIONS} detections an image, 8 ranks"
            fit("validation", title, "image", validation_of(folder), 500, 1000, 2000, 8000)
            fit("slots", "The same on 1,000 images", "rank", validation_of(folder, 1000), 1, 8, 64, 256)
        if "ranks" in what:
            fit("ranks", "Processes", "rank", meet, 8, 16, 32, 64, 160)
        if "checkpoint" in what:
            sizes = (10**6, 4 * 10**6, 16 * 10**6, 48 * 10**6)
            of["checkpoint"] = lines_of(checkpoint_of(folder), sizes)
            checks("Checkpoint", "parameter", of["checkpoint"])
        if "bucket" in what:
            fit("bucket", "Bucket", "image", bucket, 10_000, 20_000, 40_000, 150_000)
        if {"boxes", "validation", "ranks"} <= of.keys():
            tables(*(of[name] for name in ("boxes", "masks", "sampler", "validation", "ranks")))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
