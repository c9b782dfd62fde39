"""Files of weights, whatever is in them: no code is executed."""

import io
import os
import pickle
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.training.checkpoints import load_state, read_weights_file

CONTAINERS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before torch 1.6"])


@pytest.fixture(params=["this torch", "torch 2.3"])
def any_torch(request, monkeypatch):
    """This torch, and one whose `torch.load` hands archives that may hold code to their readers, as before 2.6."""
    if request.param == "this torch":
        return

    def load(path, **_):
        if zipfile.is_zipfile(path):
            return torch.jit.load(path)
        with tarfile.open(path, "r:") as archive:
            return pickle.load(archive.extractfile("pickle"))

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(torch, "__version__", "2.3.1")


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@CONTAINERS
def test_weights_with_code_are_refused_on_any_torch(tmp_path, as_zip):
    torch.save({"a": Hostile(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"w.pth cannot be read as weights .*mkdir"):
        load_state(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_torchscript_is_refused_on_any_torch(tmp_path, any_torch):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"cannot be read as weights \([^)]*TorchScript [^)]*\): it is"):
        load_state(tmp_path / "w.pth")


def test_a_tar_archive_is_refused_on_any_torch(tmp_path, any_torch):
    with tarfile.open(tmp_path / "w.pth", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Hostile(tmp_path / "ran"))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match="cannot be read as weights") as refused:
        load_state(tmp_path / "w.pth")
    assert "weights_only` set to" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_files_read_by_many_threads_leave_tarfile_usable(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    opens = tarfile.open
    begun = threading.Barrier(8)

    def load(_):
        begun.wait()
        for _ in range(20):
            load_state(tmp_path / "w.pth")

    for version in (torch.__version__, "2.3.1"):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch, "load", lambda path, **_: time.sleep(0.0005))
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(load, range(8)))
        assert tarfile.open is opens


@CONTAINERS
def test_a_file_that_is_cut_off_is_refused(tmp_path, as_zip):
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=as_zip)
    whole = (tmp_path / "w.pth").read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match="it is truncated, or holds more than tensors"):
            load_state(tmp_path / "w.pth")


def test_safetensors_that_are_cut_off_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(9)}, tmp_path / "w.safetensors")
    assert read_weights_file(tmp_path / "w.safetensors")["a"].sum() == 9
    whole = Path(tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"w.safetensors cannot be read as weights"):
        read_weights_file(tmp_path / "w.safetensors")
