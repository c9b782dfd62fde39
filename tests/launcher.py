"""Starts the processes of a run as torchrun does, but forks them from a process that has loaded the libraries.

    python launcher.py COUNT PROGRAM ARGUMENTS

That takes a third of torchrun's time. The processes draw no figures and write no report.
"""

import contextlib
import os
import runpy
import signal
import socket
import sys
import time

SECONDS = 30  # until a process that does not end by SIGTERM is killed


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def fork(rank, count, port):
    """The child's process id; 0 in the child, whose environment names its rank."""
    if process := os.fork():
        return process
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    groups = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in {**numbers, **groups, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    return 0


def wait_for_all(processes):
    """Exits with an error if a process fails, after the others have been stopped."""
    failed = False
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status and not failed:
            failed, deadline = True, time.monotonic() + SECONDS
            send(processes, signal.SIGTERM)
            while processes and time.monotonic() < deadline:
                ended, _ = os.waitpid(-1, os.WNOHANG)
                processes.discard(ended)
                time.sleep(0.02)
            send(processes, signal.SIGKILL)
    sys.exit(failed)


def send(processes, number):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main():
    count, (program, *arguments) = int(sys.argv[1]), sys.argv[2:]
    here, sys.path[0] = sys.path[0], ""
    import model_def  # noqa: F401 in the detector's folder, where this is started

    sys.path.append(here)
    from without_figures import leave_out_figures

    leave_out_figures()
    sys.argv = [program, *arguments]
    if count > 1:
        port, processes = free_port(), set()
        for rank in range(count):
            process = fork(rank, count, port)
            if process == 0:
                break
            processes.add(process)
        else:
            wait_for_all(processes)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
