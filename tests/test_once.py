"""Work that processes share: one of them does it, even after a failure."""

import multiprocessing
import os
import signal
import time

from shared.durable import once

CONTEXT = multiprocessing.get_context("fork")


def counted(folder, seconds=0.2):
    """Functions to find and to make a file that processes share. Each call of the second adds a line to `made`."""

    def find():
        result = folder / "result"
        return result.read_text() if result.exists() else None

    def make():
        with (folder / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / "result").write_text("the result")
        return "the result"

    return find, make


def in_processes(count, work):
    results = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=lambda: results.put(work())) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_one_of_the_processes_makes_what_all_need(tmp_path):
    assert in_processes(6, lambda: once([tmp_path / "new/lock"], *counted(tmp_path))) == ["the result"] * 6
    assert len((tmp_path / "made").read_text().splitlines()) == 1


def test_a_process_that_is_killed_while_it_makes_holds_nobody_up(tmp_path):
    started = CONTEXT.Event()

    def forever():
        started.set()
        time.sleep(600)

    lock = [tmp_path / "lock"]
    process = CONTEXT.Process(target=once, args=(lock, lambda: None, forever))
    process.start()
    assert started.wait(600)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert in_processes(1, lambda: once(lock, *counted(tmp_path))) == ["the result"]


def test_the_next_makes_it_where_the_first_one_failed(tmp_path):
    find, make = counted(tmp_path)

    def fail():
        raise ValueError("no")

    for attempt, expected in ((fail, "no"), (make, "the result")):
        try:
            outcome = once([tmp_path / "lock"], find, attempt)
        except ValueError as error:
            outcome = str(error)
        assert outcome == expected


def test_without_a_place_to_lock_in_each_makes_its_own(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert once([tmp_path / "file/lock"], lambda: None, lambda: "made") == "made"
    assert once([], lambda: None, lambda: "made") == "made"
    find, make = counted(tmp_path)
    assert once([tmp_path / "file/lock", tmp_path / "lock"], find, make) == "the result"
    assert (tmp_path / "lock").exists()
