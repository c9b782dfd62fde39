"""The memory that work adds to a process, or to several processes together."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKERS = 4


def pss(processes: list[int]) -> float:
    """GiB of all processes. A page that several of them map counts once."""
    lines = (line for pid in processes for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**20


@contextmanager
def added_mib() -> Iterator[list[float]]:
    """A list to which the end appends the MiB that this process added at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, added = _mib("VmRSS"), []
    yield added
    added.append(_mib("VmHWM") - before)


def _mib(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**10


def in_process(function: Callable, *arguments: object, start: str = "fork") -> Any:
    """The result of a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as pool:
        return pool.submit(function, *arguments).result()


def read_all(records: Sequence) -> None:
    """Reads every record of a data set."""
    for index in range(len(records)):
        records[index]


def compare_memory(sides: dict[str, tuple[Callable, Callable]], ranks: int = 1) -> dict[str, float]:
    """Each side's seconds to open its data set, and the GiB that it adds, see `with_workers`."""
    found = {}
    for side, (opener, reader) in sides.items():
        seconds, gib = with_workers(opener, reader, ranks)
        found |= {f"{side}_open_seconds": round(seconds, 3), f"{side}_added_gib": round(gib, 3)}
    return found


def together(work: Callable[[], object], ranks: int, interval: float = 0.05) -> tuple[float, float]:
    """Forks processes that all start `work` at once and keep what it returns until the last has finished.

    Returns:
        Seconds until the last has finished, and the GiB that all added at their common peak.
    """
    context = multiprocessing.get_context("fork")
    ready, done, start, end = context.Semaphore(0), context.Semaphore(0), context.Event(), context.Event()

    def rank() -> None:
        ready.release()
        start.wait()
        kept = work()
        done.release()
        end.wait()
        del kept

    processes = [context.Process(target=rank, daemon=True) for _ in range(ranks)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    pids = [process.pid for process in processes]
    before = peak = pss(pids)
    started = time.perf_counter()
    start.set()
    for _ in processes:
        while not done.acquire(timeout=interval):
            peak = max(peak, pss(pids))
            if any(process.exitcode for process in processes):
                raise SystemExit("a process failed")
    seconds = time.perf_counter() - started
    peak = max(peak, pss(pids))
    end.set()
    for process in processes:
        process.join()
    return seconds, peak - before


def with_workers(opener: Callable, reader: Callable, ranks: int = 1) -> tuple[float, float]:
    """Opens a data set in `ranks` new processes, and reads all of it in four workers of each.

    Returns:
        Seconds to open, and the GiB that ranks and workers together add to the same processes without data.
    """
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(ranks)

    def worker(dataset: object, read: Callable, ready: object, done: object) -> None:
        read(dataset)
        ready.release()
        done.acquire()

    def measure(dataset: object, read: Callable) -> float:
        ready, done = context.Semaphore(0), context.Semaphore(0)
        workers = [context.Process(target=worker, args=(dataset, read, ready, done)) for _ in range(WORKERS)]
        for one in workers:
            one.start()
        for _ in workers:
            ready.acquire()
        barrier.wait()
        total = pss([os.getpid(), *(one.pid for one in workers)])
        barrier.wait()
        for _ in workers:
            done.release()
        for one in workers:
            one.join()
        return total

    def rank() -> None:
        without = measure(None, lambda _: None)
        started = time.perf_counter()
        dataset = opener()
        opened = time.perf_counter() - started
        queue.put((opened, measure(dataset, reader) - without))

    processes = [context.Process(target=rank) for _ in range(ranks)]
    for process in processes:
        process.start()
    seconds, added = zip(*(queue.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return max(seconds), sum(added)
