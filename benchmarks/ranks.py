"""Memory of processes that do something together: what they add to what they have when they start."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path


def together(work: Callable[[], object], ranks: int, interval: float = 0.05) -> tuple[float, float]:
    """Forks the ranks, lets all work at once and keeps what `work` gives until all are done.

    Returns:
        Seconds until the last was done, and GiB: the highest sum of all their PSS meanwhile, above that before.
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
    before = peak = _pss(processes)
    started = time.perf_counter()
    start.set()
    for _ in processes:
        while not done.acquire(timeout=interval):
            peak = max(peak, _pss(processes))
            if any(process.exitcode for process in processes):
                raise SystemExit("a rank failed")
    seconds = time.perf_counter() - started
    peak = max(peak, _pss(processes))
    end.set()
    for process in processes:
        process.join()
    return seconds, (peak - before) / 2**20


def _pss(processes: list) -> int:
    """KiB of all, a page that several map counted once."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
