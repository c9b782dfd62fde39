"""Several machines on one: a network between them, and a name and a disk for each, which no other machine sees.

Linux' namespaces make them. A user who may create user namespaces needs no other right.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from conftest import ROOT

NETWORK = "10.77.0"
_SECONDS = 20  # until a namespace is there
_IN_NAMESPACES = ("-U", "-n", "-m", "-u")
_OF_LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PET_", "TORCHELASTIC_")


class Machine:
    """A machine with a disk of its own.

    Attributes:
        name, address: in the network.
        disk: the folder where each machine sees its own disk.
        own: where a test sees this machine's disk.
    """

    def __init__(self, name: str, address: str, disk: Path, own: Path, holder: int):
        self.name, self.address, self.disk, self.own, self._holder = name, address, disk, own, holder
        self._log = own.with_suffix(".log")
        self.process: subprocess.Popen | None = None

    def start(self, *command: object, **variables: str) -> None:
        """Starts a program in the folder `code` of this machine's disk."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
        environment |= {"TMPDIR": str(self.disk / "tmp"), "XDG_CACHE_HOME": str(self.disk / "cache"), **variables}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [*_entering(self._holder), "sh", "-c", 'cd "$0" && exec "$@"', self.disk / "code", *map(str, command)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def torchrun(self, *arguments: object, options: tuple = (), **variables: str) -> None:
        """Starts torchrun with these options and the arguments of `model_def.py` or of a program that replaces it."""
        program = () if str(arguments[0]).endswith(".py") else ("model_def.py",)
        torchrun = (sys.executable, "-m", "torch.distributed.run", *options)
        self.start(*torchrun, *program, *arguments, **variables)

    @property
    def log(self) -> str:
        """The output of the program that started last."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 900) -> int:
        """The exit status of the program that started last."""
        return self.process.wait(seconds)

    def lose(self) -> None:
        """Kills all programs of this machine at once."""
        for each in self._programs():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes on this machine."""
        found = {}
        for each in self._programs():
            with contextlib.suppress(psutil.Error, KeyError):
                if "RANK" in each.environ() and each.ppid() == self.process.pid:
                    found[int(each.environ()["RANK"])] = each
        return found

    def _programs(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []


def why_none() -> str | None:
    """The reason why machines cannot be simulated here; None if they can."""
    for tool in ("unshare", "nsenter", "ip", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is missing"
    tried = subprocess.run(
        ["unshare", "-Urnmu", "sh", "-c", "ip link add left type veth peer name right && mount -t tmpfs none /mnt"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def machines(folder: Path, count: int = 2) -> Iterator[list[Machine]]:
    """Machines named node-0, node-1 …, whose disks are in `folder`."""
    disks, disk = folder / "disks", folder / "disk"
    disk.mkdir()
    names = [f"node-{number}" for number in range(count)]
    addresses = [f"{NETWORK}.{number + 1}" for number in range(count)]
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, addresses, names)))
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(_holder())
        _do(outside, "ip link add switch type bridge && ip link set switch up")
        made = []
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            own = disks / name
            for part in ("tmp", "cache", "code"):
                (own / part).mkdir(parents=True)
            holder = stack.enter_context(_holder(outside))
            _do(outside, f"ip link add port{number} type veth peer name eth0 netns {holder}")
            _do(outside, f"ip link set port{number} master switch up")
            _do(
                holder,
                f"hostname {name} && mount --bind {hosts} /etc/hosts && mount --bind {own} {disk} && "
                f"mount -t tmpfs none {disks} && ip link set lo up && ip addr add {address}/24 dev eth0 && "
                "ip link set eth0 up",
            )
            made.append(machine := Machine(name, address, disk, own, holder))
            stack.callback(lambda machine=machine: machine.process and machine.lose())
        yield made


@contextlib.contextmanager
def _holder(within: int | None = None) -> Iterator[int]:
    """A process that keeps new namespaces within those of another."""
    start = ["unshare", "-Urnmu"] if within is None else [*_entering(within), "unshare", "-nmu"]
    process = subprocess.Popen([*start, "sh", "-c", "echo ready && exec sleep infinity"], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _entering(holder: int) -> list[str]:
    return ["nsenter", "-t", str(holder), *_IN_NAMESPACES, "--preserve-credentials"]


def _do(holder: int, script: str) -> None:
    done = subprocess.run([*_entering(holder), "sh", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def copy_code(machine: Machine, detector: str, *others: Path) -> None:
    """Copies a detector's folder, and files beside it, as a user does for each machine."""
    ignored = shutil.ignore_patterns("__pycache__", "runs", "*.md")
    shutil.copytree(ROOT / detector, machine.own / "code", dirs_exist_ok=True, ignore=ignored)
    for other in others:
        copy = shutil.copytree if other.is_dir() else shutil.copy
        copy(other, machine.own / "code" / other.name)


def wait_until(happens: Callable[[], bool], seconds: float = 900, *, of: Sequence[Machine] = ()) -> None:
    """Waits until a condition holds. Fails when no program of these machines runs any more."""
    until = time.monotonic() + seconds
    while not happens():
        logs = "\n".join(machine.log for machine in of)
        assert time.monotonic() < until, logs
        assert not of or any(machine.process.poll() is None for machine in of), logs
        time.sleep(0.05)
