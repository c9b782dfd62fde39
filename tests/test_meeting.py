"""How the processes of a run find each other, and how a missing one is named."""

import socket

import pytest
from in_threads import on_all

from shared.errors import UserError
from shared.training import meeting
from shared.training.meeting import Arrival, lost_connection_as_error, open_store, place_of, roll_call

SECONDS = 20.0


@pytest.fixture
def port(monkeypatch):
    """A free port of this machine, known to all ranks."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        number = any_port.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


@pytest.fixture
def stores(port):
    """Each of three ranks' view of the store that rank 0 opens."""
    return [open_store(rank, SECONDS, opens=rank == 0) for rank in range(3)]


def meet(stores, size=3, seconds=SECONDS, first=0):
    """The result of each rank that comes: the start and the ranks, or its error."""

    def come(rank, store):
        try:
            return roll_call(store, rank, size, seconds)
        except UserError as error:
            return str(error)

    return on_all(come, list(range(first, first + len(stores))), stores)


def test_ranks_that_come_know_each_other(stores):
    found = meet(stores)
    assert found[0] == found[1] == found[2]
    assert {arrival.host for arrival in found[0][1]} == {socket.gethostname()}
    assert len({arrival.token for arrival in found[0][1]}) == 3


def test_a_restart_does_not_take_the_answers_of_an_earlier_start(stores):
    first, second = meet(stores), meet(stores)
    assert first[0][0] != second[0][0]
    assert second[0] == second[1] == second[2]


def test_a_rank_that_never_comes_is_named_on_every_rank(stores):
    found = meet(stores[:2], seconds=1.0)
    assert found[0] == found[1]
    assert found[0].startswith("WORLD_SIZE: rank 2 of 3 did not come within 1 second; the others are on ")
    assert "Fix: look at the output of the missing processes" in found[0]


def test_a_chief_that_never_comes_is_named(stores, monkeypatch):
    monkeypatch.setattr(meeting, "_SECONDS_FOR_CHIEF", 0)
    (line, _) = meet(stores[1:], seconds=0.5, first=1)
    assert line.startswith("WORLD_SIZE: rank 0 did not come to 127.0.0.1 within ")


def test_a_chief_whose_machine_does_not_answer_is_named(port):
    with pytest.raises(UserError, match=rf"MASTER_ADDR: rank 0 at 127.0.0.1:{port} does not answer rank 1 on "):
        open_store(1, 0.5)


def test_a_port_that_is_in_use_is_one_error(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(UserError, match=rf"MASTER_PORT: rank 0 cannot open port {port} .*Fix: set MASTER_PORT"):
            open_store(0, 1.0, opens=True)


def arrivals(*machines):
    return [Arrival(name, name, f"10.0.0.{rank}", "10.0.0.0", str(rank)) for rank, name in enumerate(machines)]


def test_the_place_of_a_rank_follows_from_the_machines_of_all():
    ranks = arrivals("a", "b", "a", "b", "b")  # as mpirun places them by node
    places = [place_of(rank, ranks)[2:6] for rank in range(5)]
    assert places == [(0, 2, 0, 2), (0, 3, 1, 2), (1, 2, 0, 2), (1, 3, 1, 2), (2, 3, 1, 2)]


def test_the_place_that_torchrun_gives_counts(monkeypatch):
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    for name, value in zip(names, (0, 1, 1, 2), strict=True):
        monkeypatch.setenv(name, str(value))
    assert place_of(1, arrivals("a", "a"))[2:6] == (0, 1, 1, 2)  # two containers with one name


def test_a_chief_s_own_loopback_name_is_not_its_address():
    ranks = [Arrival("a", "a", "127.0.1.1", "127.0.1.1", "0"), Arrival("b", "b", "10.0.0.8", "10.0.0.7", "1")]
    assert [place_of(rank, ranks).chief for rank in (0, 1)] == ["10.0.0.7"] * 2
    assert place_of(0, ranks[:1]).chief == ""
    assert place_of(0, ranks).names == {"127.0.1.1": "a", "10.0.0.7": "a", "10.0.0.8": "b"}


@pytest.mark.parametrize(
    ("of_torch", "named"),
    [
        ("[…/pair.cc:545] Read error [10.0.0.8]:9912: Connection reset by peer. GLHF!", "a process on node-b is lost"),
        ("[…/pair.cc:553] Connection closed by peer [10.0.0.9]:9912", "a process on 10.0.0.9 is lost"),
        ("[…/pair.cc:553] Connection closed by peer [127.0.0.1]:9912", "another process is lost"),
        ("NCCL error: … ncclRemoteError: A call failed possibly due to a network error", "another process is lost"),
    ],
)
def test_a_process_that_is_gone_is_one_error_that_names_its_machine(of_torch, named):
    message = rf"^rank 0: the connection to {named}.*Fix: look at its own output"
    with pytest.raises(UserError, match=message), lost_connection_as_error(0, {"10.0.0.8": "node-b"}):
        raise RuntimeError(of_torch)


def test_another_error_of_torch_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2$"), lost_connection_as_error(0, {}):
        raise RuntimeError("mat1 and mat2")
