"""The device of each process, work that one of them does for all, and who can reach them. `torch.cuda` is replaced."""

import json
import logging
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_model_def
from in_threads import listening, on_all, strangers
from in_threads import processes as processes_in_threads

from shared.errors import UserError
from shared.training import meeting
from shared.training.meeting import Arrival, choose_device, local_processes
from shared.training.processes import broadcast_from_chief, first_on_each_machine


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs. Returns the calls to it, in order."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set_device", device)))
    return asked


def join(monkeypatch, asked, **environment):
    """Sets torchrun's variables and joins a group."""
    for name in ("USE_TORCH_DISTRIBUTED", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {**environment, "GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    collective = torch.distributed
    monkeypatch.setattr(collective, "init_process_group", lambda backend, **_: asked.append(("init", backend)))
    monkeypatch.setattr(collective, "new_group", lambda backend, **_: asked.append(("group", backend)))
    monkeypatch.setattr(collective, "destroy_process_group", lambda: None)
    arrivals = [
        Arrival("node", "node", "127.0.0.1", "127.0.0.1", str(rank)) for rank in range(environment["WORLD_SIZE"])
    ]
    monkeypatch.setattr(meeting, "open_store", lambda *_: torch.distributed.HashStore())
    monkeypatch.setattr(meeting, "roll_call", lambda *_: ("start", arrivals))
    context = SimpleNamespace(rank=environment["RANK"], close=lambda: None)
    monkeypatch.setattr(meeting, "ProcessContext", lambda *_: context)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_has_its_own_device_before_the_first_collective(gpus, monkeypatch, rank):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    join(monkeypatch, gpus, GROUP_WORLD_SIZE=1, **environment)
    with local_processes() as (_, device):
        assert device == torch.device("cuda", rank)
    assert gpus == [("set_device", device), ("init", "nccl"), ("group", "gloo")]


@pytest.mark.parametrize(("machines", "interface"), [(1, meeting.interface_towards("127.0.0.1")), (2, None)])
def test_torch_s_own_exchange_stays_on_one_machine(gpus, monkeypatch, machines, interface):
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2 * machines, "LOCAL_WORLD_SIZE": 2}
    join(monkeypatch, gpus, GROUP_WORLD_SIZE=machines, **ranks)
    with local_processes():
        assert [os.environ.get(f"{library}_SOCKET_IFNAME") for library in ("GLOO", "NCCL")] == [interface] * 2


def test_more_processes_than_gpus_are_refused(gpus):
    with pytest.raises(UserError, match="3 processes start on a machine where torch sees 2 GPUs"):
        choose_device(0, 3)


def without_gpus(monkeypatch, error=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init():
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("error", "environment", "reason"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Update"), None, "too old"),
        (None, "", "CUDA_VISIBLE_DEVICES hides the GPUs"),
        (None, None, "torch finds no GPU"),
    ],
)
def test_one_line_says_that_it_trains_on_the_cpu_and_why(monkeypatch, caplog, error, environment, reason):
    without_gpus(monkeypatch, error)
    if environment is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    with caplog.at_level(logging.INFO):
        assert choose_device(0, 1) == torch.device("cpu")
    (line,) = caplog.messages
    assert line.startswith("device: the CPU (")
    assert reason in line


def test_gpus_of_a_cluster_that_torch_cannot_use_are_an_error(monkeypatch):
    without_gpus(monkeypatch, RuntimeError("The NVIDIA driver on your system is too old"))
    with pytest.raises(UserError, match="gave this task 2 GPUs, and torch cannot use them: The NVIDIA driver"):
        choose_device(0, 1, gpus_given=2)


class Machine:
    """The processes of one machine, one after the other. Their messages go through `told`."""

    def __init__(self, local_rank, told):
        self.local_rank, self.told = local_rank, told

    def allgather(self, error):
        if self.local_rank == 0:
            self.told.append(error)
        return self.told


def test_shared_work_is_done_by_the_first_process_only():
    told, calls = [], []
    for rank in (0, 1, 2):
        assert first_on_each_machine(Machine(rank, told), lambda rank=rank: calls.append(rank) or rank) == rank
    assert calls == [0, 1, 2]


def test_an_error_on_the_first_process_is_raised_on_all():
    told, calls = [], []

    def refuse():
        calls.append(1)
        raise UserError("/x/train.json does not exist")

    for rank in (0, 1, 2):
        with pytest.raises(UserError, match="does not exist"):
            first_on_each_machine(Machine(rank, told), refuse)
    assert calls == [1]


@pytest.mark.parametrize("machines", [1, 2])
def test_each_process_gets_what_the_others_send_in_their_order(machines):
    with processes_in_threads(4, machines) as contexts:
        ranks = [context.get_rank() for context in contexts]
        assert [(context.get_size(), context.get_num_agents()) for context in contexts] == [(4, machines)] * 4
        for _ in range(2):
            assert on_all(lambda context: context.allgather(context.rank), contexts) == [ranks] * 4
            assert on_all(lambda context: context.gather(context.rank), contexts) == [ranks, None, None, None]
            assert on_all(lambda context: context.broadcast(context.rank), contexts) == [0] * 4
        local = [context.get_local_rank() for context in contexts]
        of_machine = 4 // machines
        assert local == list(range(of_machine)) * machines
        firsts = [rank - rank % of_machine for rank in ranks]
        neighbours = [list(range(first, first + of_machine)) for first in firsts]
        assert on_all(lambda context: context.allgather_local(context.rank), contexts) == neighbours
        assert on_all(lambda context: context.broadcast_local(context.rank), contexts) == firsts
        gathered = on_all(lambda context: context.gather_local(context.rank), contexts)
        assert [each is None for each in gathered] == [rank > 0 for rank in local]


class Code:
    """An object that a stranger wants to have unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_stranger_cannot_have_a_process_run_code(machines, tmp_path):
    before = listening()
    with processes_in_threads(2, machines) as contexts:
        with strangers(listening().keys() - before.keys()) as sockets:
            assert sockets
            for socket in sockets:
                socket.send(pickle.dumps(Code(tmp_path / "code has run")))
            time.sleep(0.5)  # until it is there
            assert on_all(lambda context: context.allgather(context.rank), contexts) == [[0, 1]] * 2
        assert not list(tmp_path.iterdir())


LISTENING = """
import json, os, sys, psutil
sys.path[:0] = [ROOT]
from shared.training.hang import watching
from shared.training.meeting import local_processes

with local_processes() as (distributed, _), watching(distributed, 10):
    distributed.allgather(None)
    sockets = psutil.Process().net_connections("tcp")
    listening = [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]
    # torch 2.3 opens its store in rank 0 as torchrun does, on all interfaces: see SECURITY.md
    addresses = [address.ip for address in listening if address.port != int(os.environ["MASTER_PORT"])]
    for addresses in filter(None, [distributed.gather(addresses)]):
        print(json.dumps(addresses))
"""


def test_on_one_machine_no_process_listens_to_the_network(tmp_path):
    script = tmp_path / "listening.py"
    script.write_text(LISTENING.replace("ROOT", repr(str(ROOT))))
    addresses = json.loads(run_model_def(processes=2, torchrun=True, script=script).stdout)
    assert len(addresses) == 2
    assert all(addresses)
    assert {address for each in addresses for address in each} == {"127.0.0.1"}


def buffers(value):
    """Buffers of three data types and both memory formats."""
    images = torch.full((2, 3, 4, 5), float(value)) + torch.arange(5)
    images = images.to(memory_format=torch.channels_last) if value else images
    count, flag = torch.tensor(value), torch.tensor([bool(value), True])
    return [images, count, torch.full((3,), value + 0.5), flag, torch.tensor(value * 10), torch.zeros(0)]


def test_buffers_take_the_chief_s_values_in_one_broadcast_per_data_type(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.clone()))
    broadcast_from_chief(buffers(7))
    assert [tensor.dtype for tensor in sent] == [torch.float32, torch.int64, torch.bool]
    others = buffers(0)
    places = [tensor.data_ptr() for tensor in others]
    received = iter(sent)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.copy_(next(received)))
    broadcast_from_chief(others)
    for found, expected, place in zip(others, buffers(7), places, strict=True):
        assert torch.equal(found, expected)
        assert found.data_ptr() == place
