"""The copy of a run's state that a thread writes during the training."""

import functools
import threading
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

from shared.training.loggers import Loggers
from shared.training.run import LocalRun
from shared.training.run_folder import RunFolder
from shared.training.saving import Background, HostCopy, Snapshot


def trained(model, optimizer):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {"models": [model.state_dict()], "optimizers": [optimizer.state_dict()], "lr": 0.1, "begun": [[1, 2.5]]}


@pytest.fixture
def training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_training_after_a_copy_does_not_change_the_copy(training, tmp_path):
    state = trained(*training)
    torch.save(state, tmp_path / "then.pth")
    copied = HostCopy().of(state)
    trained(*training)
    state["begun"][0].append(3)
    then = torch.load(tmp_path / "then.pth", weights_only=True)
    assert copied["begun"] == [[1, 2.5]]
    assert copied["optimizers"][0]["param_groups"] == then["optimizers"][0]["param_groups"]
    for name, value in then["models"][0].items():
        assert torch.equal(copied["models"][0][name], value)
    for number, of_parameter in then["optimizers"][0]["state"].items():
        for name, value in of_parameter.items():
            assert torch.equal(copied["optimizers"][0]["state"][number][name], value)
    # the versions of modules, by which they know names of theirs that have changed
    assert copied["models"][0]._metadata == state["models"][0]._metadata


def test_tensors_that_share_memory_share_it_in_the_copy():
    weight = torch.arange(6.0)
    copied = HostCopy().of(
        {"one": weight, "same": weight.detach(), "transposed": weight.view(2, 3).T, "none": weight[:0]}
    )
    weight.zero_()
    assert copied["one"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["none"].shape == (0,)
    assert len({tensor.untyped_storage().data_ptr() for tensor in copied.values()}) == 1


def test_the_next_copy_takes_the_memory_of_the_last():
    host_copy, state = HostCopy(), OrderedDict(weight=torch.ones(1000), count=torch.tensor(3))
    addresses = [[tensor.data_ptr() for tensor in host_copy.of(state).values()] for _ in range(3)]
    assert addresses[0] == addresses[1] == addresses[2]


def leave_after_a_failure(background, error=None):
    def fail():
        raise OSError("no space")

    with background:
        background.begin(fail)
        if error is not None:
            raise error


def test_an_error_beside_the_training_is_raised_once():
    background = Background()
    with pytest.raises(OSError, match="no space"):
        leave_after_a_failure(background)
    background.raise_if_failed()


def test_an_error_in_the_background_is_logged_if_another_stops_the_run(caplog):
    with pytest.raises(ValueError, match="the loss"):
        leave_after_a_failure(Background(), ValueError("the loss"))
    assert "saving failed: OSError: no space" in caplog.text


def test_background_work_finishes_before_the_next_and_before_the_end():
    done, may_go_on = [], threading.Event()

    def first():
        may_go_on.wait(600)
        done.append(1)

    with Background() as background:
        assert background.is_idle
        background.begin(first)
        assert not background.is_idle
        assert done == []
        may_go_on.set()
        background.begin(lambda: done.append(2))
    assert done == [1, 2]


def test_no_thread_frees_tensors_after_the_end_of_background_work():
    """Python aborts a program that exits at such a moment."""
    threads = []

    class Tensors:
        def __del__(self):
            time.sleep(0.2)
            threads.append(threading.current_thread())

    with Background() as background:
        background.begin(functools.partial(id, Tensors()))
    assert threads
    assert not threads[0].is_alive()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "code").mkdir()
    folder.prepare(tmp_path / "code")

    def fill_the_disk(path):
        raise OSError("no space")

    snapshot = Snapshot({}, {}, {}, {"steps_completed": 4}, is_best=True, write_own=fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        LocalRun(folder, Loggers(), "best").store(snapshot)
    assert list(folder.checkpoints.iterdir()) == []
