"""OpenMP's waiting threads sleep, and are at most as many as the cores, unless the user sets otherwise."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from shared import environment


@pytest.fixture
def nothing_said(monkeypatch):
    """No settings of threads by the user, and one process on the machine."""
    for name in (*environment.WAITING, *environment.COUNTS, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")


def spins(stderr: str) -> set[str]:
    """How often a waiting thread looks before it sleeps, as GNU's OpenMP reports it."""
    return set(re.findall(r"GOMP_SPINCOUNT *= *'(\d+)'", stderr))


@pytest.mark.parametrize("model_def", ROOT.glob("*/model_def.py"), ids=lambda path: path.parent.name)
def test_every_model_def_reads_the_command_line_before_it_loads_torch(model_def, nothing_said):
    before = model_def.read_text().partition("\ncommand = read_command(__name__")[0]
    program = before + "\nimport sys; assert 'torch' not in sys.modules; import torch"
    done = subprocess.run([sys.executable, "-c", program], cwd=model_def.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert spins(done.stderr) == {"3000"}, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("OMP_WAIT_POLICY", "ACTIVE", "30000000000"), ("GOMP_SPINCOUNT", "5000", "5000")]
)
def test_the_user_s_own_wait_policy_stays(name, value, expected, nothing_said):
    command = [sys.executable, "-c", "from shared.environment import prepare_process; prepare_process(); import torch"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True)
    assert spins(done.stderr) == {expected}, done.stderr


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (64, 2)])
def test_torch_has_no_more_threads_than_there_are_cores(cores, expected, nothing_said, two_threads, monkeypatch):
    monkeypatch.setattr(environment, "available_cores", lambda: cores)
    environment.use_available_cores()
    assert torch.get_num_threads() == expected


def test_the_user_s_number_of_threads_stays(nothing_said, two_threads, monkeypatch):
    monkeypatch.setattr(environment, "available_cores", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment.use_available_cores()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),  # half a core
        ("0::/job/task\n", {"job/cpu.max": "300000 100000", "job/task/cpu.max": "800000 100000"}, 3),
        ("0::/docker/of-the-host\n", {"cpu.max": "250000 100000"}, 2),
        ("3:cpuset:/\n2:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("1:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}, 5),
    ],
)
def test_available_are_the_cores_that_affinity_and_control_groups_give(
    groups, files, expected, nothing_said, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name, text in (("proc/self/cgroup", groups), *((f"sys/fs/cgroup/{name}", files[name]) for name in files)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert environment.available_cores(tmp_path) == expected


def test_the_processes_of_a_machine_share_its_cores(nothing_said, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert environment.available_cores(tmp_path) == 5


def test_a_reader_that_closes_the_output_is_no_error():
    script = "from shared.environment import quiet_if_output_is_closed\nwith quiet_if_output_is_closed():\n"
    script += "    for i in range(100000): print(i)"
    program = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout.readline() == "0\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait(60) == 141
    program.stderr.close()


def test_a_missing_package_names_its_pip_line():
    script = "from shared.environment import prepare_process\nprepare_process()\n"
    script += "raise ModuleNotFoundError('no module', name='yaml.cyaml')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert f"Fix: {sys.executable} -m pip install PyYAML. Or: `make demo`" in done.stderr
