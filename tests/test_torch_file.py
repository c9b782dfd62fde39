"""Weights and checkpoints on torch before 2.6, whose `weights_only` executes code: bit-for-bit equal, without code."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import other_detectors_are_slow
from tiny_models import CONFIGS, trial_classes
from torch.torch_version import TorchVersion

from shared.errors import UserError
from shared.training.checkpoints import load_state, read_weights_file


@pytest.fixture
def old_torch(monkeypatch):
    """Pretends the torch version of Determined's default image."""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.3.0a0+ebedce2"))


def weights():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    matrix = torch.randn(4, 6)
    return {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "views of one storage": [matrix, matrix.t(), matrix[1:3, ::2]],
        "not numbers": torch.tensor([float("nan"), -float("inf"), -0.0]),
        "shapes": [torch.tensor(3), torch.empty(0, 4)],
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in (torch.half, torch.bfloat16, torch.bool, torch.uint8)],
        "plain": [None, True, -5, 2**70, 1.5, "é", b"\xff\0", (1, (2,)), {3}, torch.Size([1, 2]), torch.float32],
    }


def assert_same_bits(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        bits = [tensor.detach().flatten().contiguous().view(torch.uint8) for tensor in (a, b)]
        assert torch.equal(*bits)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same_bits(*pair)
    else:
        assert a == b


CONTAINERS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before torch 1.6"])


@CONTAINERS
def test_weights_are_read_bit_for_bit_on_old_torch(tmp_path, old_torch, as_zip):
    saved = weights()
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=as_zip)
    loaded = load_state(tmp_path / "w.pth")
    assert_same_bits(loaded, saved)
    matrix, transposed, _ = loaded["views of one storage"]
    assert matrix.data_ptr() == transposed.data_ptr()


@other_detectors_are_slow
def test_a_checkpoint_resumes_bit_for_bit_on_old_torch(detector, shapes, train, without_figures, monkeypatch):
    config = CONFIGS[detector](shapes)
    config["data"]["workers"] = 0
    config["min_validation_period"] = {"batches": 2}
    config["searcher"]["max_length"] = {"batches": 4}
    trial_class = trial_classes()[detector]
    states = []
    for is_old in (False, True):

        class Stopped(trial_class):
            def after_batch(self, number):
                super().after_batch(number)
                if number == 2:
                    raise RuntimeError("crash")

        Stopped.__module__ = trial_class.__module__
        name = f"old {is_old}"
        with pytest.raises(RuntimeError, match="crash"):
            train(Stopped, config, name)
        with monkeypatch.context() as patch:
            if is_old:
                patch.setattr(torch, "__version__", TorchVersion("2.3.0a0+ebedce2"))
                patch.setattr(torch, "load", None)
            run = train(trial_class, config, name, "last")
        state = load_state(run / "checkpoints/last/state_dict.pth")
        states.append({name: state[name] for name in ("models_state_dict", "optimizers_state_dict")})
    assert_same_bits(*states)


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("version", ["2.3.1", "2.5.1", "2.6.0"])
@CONTAINERS
def test_weights_with_code_are_refused_on_any_torch(tmp_path, monkeypatch, version, as_zip):
    torch.save({"a": Hostile(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=as_zip)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(UserError, match=r"w.pth cannot be read as weights .*mkdir"):
        load_state(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_torchscript_is_refused_on_old_torch(tmp_path, old_torch):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "w.pth")
    with pytest.raises(UserError, match="TorchScript archive, which holds code"):
        load_state(tmp_path / "w.pth")


def test_a_tar_archive_is_refused_on_old_torch(tmp_path, old_torch):
    with tarfile.open(tmp_path / "w.pth", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Hostile(tmp_path / "ran"))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_state(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@CONTAINERS
def test_a_file_that_is_cut_off_is_refused_on_old_torch(tmp_path, old_torch, as_zip):
    torch.save(weights(), tmp_path / "w.pth", _use_new_zipfile_serialization=as_zip)
    whole = (tmp_path / "w.pth").read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match="it is truncated, or holds more than tensors"):
            load_state(tmp_path / "w.pth")


def packed(pickled: bytes, storage: bytes = b"\0" * 8, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file in the format of `torch.save`, from a pickle and one storage, "0"."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/data/0", storage)
    return content.getvalue()


def tensor_of(count: int, offset: int = 0, size: int = 2, change: bytes = b"") -> bytes:
    """The pickle of a float32 tensor at `offset` of a storage that states `count` numbers."""

    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ" + change
    arguments = b"(" + storage + number(offset) + number(size) + b"\x85" + number(1) + b"\x85" + b"\x89Nt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_hand_made_weights_of_an_honest_kind_are_read(tmp_path, old_torch):
    (tmp_path / "w.pth").write_bytes(packed(tensor_of(2), struct.pack("<2f", 1.5, -2)))
    assert load_state(tmp_path / "w.pth").tolist() == [1.5, -2.0]


DISHONEST = {
    "a tensor lies outside its storage": packed(tensor_of(2, size=3)),
    "it holds a tensor of an unknown kind": packed(tensor_of(2, offset=-1)),
    "its tensors are larger than the file": packed(tensor_of(2**40)),
    "storage 0 has 8 bytes, not 12": packed(tensor_of(3)),
    "it unpacks to more than its own size": packed(tensor_of(2), b"\0" * 2**20, zipfile.ZIP_DEFLATED),
    "it changes a storage": packed(tensor_of(2, change=b"}X\x05\0\0\0count\x8a\x04\xff\xff\xff\x7fsb")),
    "it calls posix.mkdir": packed(b"\x80\x02cposix\nmkdir\nX\x03\0\0\0ran\x85R."),
    "it calls torch.load": packed(b"\x80\x02ctorch\nload\nX\x03\0\0\0ran\x85R."),
}


@pytest.mark.parametrize("reason", DISHONEST)
def test_hand_made_weights_that_would_leave_their_bounds_are_refused(tmp_path, old_torch, reason):
    (tmp_path / "w.pth").write_bytes(DISHONEST[reason])
    with pytest.raises(UserError, match=reason):
        load_state(tmp_path / "w.pth")


def test_safetensors_that_are_cut_off_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(9)}, tmp_path / "w.safetensors")
    assert read_weights_file(tmp_path / "w.safetensors")["a"].sum() == 9
    whole = Path(tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"w.safetensors cannot be read as weights"):
        read_weights_file(tmp_path / "w.safetensors")
