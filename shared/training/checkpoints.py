"""Reads checkpoints and weights without executing code in them.

Before torch 2.6, `torch.load(weights_only=True)` runs code from some files (CVE-2025-32434): TorchScript and tar
archives. The reader for it is the last part here. It knows two containers: the ZIP file, and the sequence of pickles
that `torch.save` wrote before torch 1.6 and that model zoos still publish. It calls only what builds tensors and plain
containers.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from shared.errors import UserError, problem_of
from shared.training.downloads import downloaded, find_checkpoint, forget, is_bucket
from shared.training.saving import check_manifest

CATEGORIES_FILE = "categories.json"


@dataclass
class Checkpoint:
    """A checkpoint of a `DetectionTrial`."""

    path: Path
    weights: dict[str, torch.Tensor]  # of the model that evaluates: the averaged one if the run had one
    training_weights: dict[str, torch.Tensor]  # of the model that was trained
    config: dict[str, Any]  # the experiment config
    hparams: dict[str, Any]  # its hyperparameters, as the run had them
    categories: list[dict]  # COCO categories; the position is the label
    batches: int  # trained so far
    optimizer_groups: list[dict[str, Any]]  # of the optimizer's state
    training: dict[str, Any]  # what the training kept besides weights, averaged weights and optimizer
    averaged_weights: dict[str, torch.Tensor] | None
    state: dict[str, Any]  # all of `state_dict.pth`
    counts: dict[str, Any]  # batches, epochs and the last validation, by the names of Determined's own loop
    trial_class: str  # the name of the detector's class

    @property
    def best_of_older_version(self) -> dict[str, Any]:
        """The best validation, as older versions saved it off a cluster; {} in newer checkpoints."""
        return self.state["callbacks"].get("local_run", {})


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's weights and what is saved with them. Raises UserError if it is not a checkpoint of this project,
    is cut off, changed, or holds code."""
    check_manifest(path)
    state = load_state(path / "state_dict.pth")
    pickles = {pickled.name: _plain_values(pickled) for pickled in path.glob("*.pkl")}
    try:
        load_data = json.loads((path / "load_data.json").read_text())
        metadata = json.loads((path / "metadata.json").read_text())
        training_weights = without_ddp(state["models_state_dict"][0])
        training = dict(state["callbacks"]["training"])
        averaged = training.pop("ema")
        return Checkpoint(
            path=path,
            weights=training_weights if averaged is None else averaged,
            training_weights=training_weights,
            config=load_data["experiment_config"],
            hparams=load_data["hparams"],
            categories=json.loads((path / CATEGORIES_FILE).read_text()),
            batches=int(metadata["steps_completed"]),
            optimizer_groups=state["optimizers_state_dict"][0]["param_groups"],
            training=training,
            averaged_weights=averaged,
            state=state,
            counts=pickles.get("trial_state.pkl", {}),
            trial_class=str(load_data.get("trial_cls_spec", "")).rpartition(":")[2],
        )
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint of this project: {error!r}. Fix: give another checkpoint"
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values only. Raises UserError if the file is cut off or would execute
    code."""
    try:
        if not _loads_weights_only():
            return read_torch_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is cut off or hostile fails in many ways
        called = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own words advise to execute it
        reason = f"it calls {called[1]}" if called else str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights ({reason}): it is truncated, or holds more than tensors. Fix: give "
            "another checkpoint"
        ) from error


def _loads_weights_only() -> bool:
    """Whether `torch.load(weights_only=True)` executes nothing: before 2.6 it does (CVE-2025-32434)."""
    return torch.__version__ >= "2.6"


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _plain_values(path: Path) -> Any:
    """The content of a checkpoint's own pickle. Raises UserError if it is more than plain values."""
    try:
        with path.open("rb") as file:
            return _PlainValues(file).load()
    except Exception as error:  # a pickle that is cut off or hostile fails in many ways
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated, or holds more than plain values. Fix: give another "
            "checkpoint"
        ) from error


def read_weights(source: str, key: str, choices: str) -> tuple[Mapping[str, Any], Checkpoint | None]:
    """The content of a file, a URL or one of our checkpoints: a state dict, or what a library wrote around one. Also
    the checkpoint, if it is one.

    Args:
        key, choices: for an error, the hyperparameter that names the source, and what else it may be.

    Raises:
        UserError: the source cannot be read, is cut off, or holds code.
    """
    if "://" in source and not is_bucket(source):
        try:
            return read_url(source), None
        except OSError as error:
            raise UserError(f"{key}: {source} cannot be downloaded: {error}. Fix: give a file") from error
    if Path(source).is_file():
        return read_weights_file(Path(source)), None
    try:
        checkpoint = read_checkpoint(find_checkpoint(source))
    except UserError as error:
        raise UserError(f"{key}: {problem_of(error)}. Fix: give {choices}, a file, a URL or a checkpoint") from error
    return checkpoint.weights, checkpoint


def read_url(url: str) -> Mapping[str, Any]:
    """The weights of a URL. A download that cannot be read is deleted.

    Raises:
        OSError: the download failed.
        UserError: the file is cut off, or holds code.
    """
    path = downloaded(url)
    try:
        return read_weights_file(path)
    except UserError:
        forget(url)
        raise


def read_weights_file(path: Path) -> Mapping[str, Any]:
    """The weights of a file: safetensors, or what `torch.save` wrote. Raises UserError as `load_state` does."""
    if path.suffix != ".safetensors":
        return load_state(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({error}): it is truncated, or not a safetensors file. Fix: download it "
            "again, or give another file"
        ) from error


def without_ddp(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefix that DistributedDataParallel gives its keys, also in `_metadata`: modules use
    these versions to load older names."""
    plain = OrderedDict(weights)
    if versions := getattr(weights, "_metadata", None):
        plain._metadata = OrderedDict(versions)
    consume_prefix_in_state_dict_if_present(plain, "module.")
    return plain


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Loads all of a state dict.

    Raises:
        UserError: the weights are another model's. The message names parameters that differ.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{len(names)} {what} (the first is {sorted(names)[0]})"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        raise UserError(
            f"{source} holds the weights of another model, of {len(own)} parameters and buffers: {', '.join(parts)}. "
            "Fix: use the config that it was trained with"
        )
    model.load_state_dict(weights)


# --- what `torch.save` wrote, without `torch.load` --------------------------------------------------

_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the sequence of pickles
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


@dataclass
class _Storage:
    """The numbers that tensors are views of."""

    dtype: torch.dtype
    count: int

    def __post_init__(self) -> None:
        self.bytes = torch.empty(self.count * self.dtype.itemsize, dtype=torch.uint8)

    def fill(self, file: IO[bytes]) -> None:
        buffer = memoryview(self.bytes.numpy())
        while buffer:
            if not (read := file.readinto(buffer)):
                raise EOFError("it is cut off")
            buffer = buffer[read:]

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a storage")


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, with the same bits as `torch.load` gives. Raises an exception of any kind
    if the file is cut off, damaged or holds more than tensors and plain values."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            return _read_zip(file, size)
        file.seek(0)
        return _read_pickles(file, size)


def _read_zip(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        root = next(iter(records)).partition("/")[0]
        if f"{root}/constants.pkl" in records:
            raise pickle.UnpicklingError("it is a TorchScript archive, which holds code")
        plain = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
        if not plain or sum(record.file_size for record in records.values()) > size:
            raise pickle.UnpicklingError("it unpacks to more than its own size, which torch.save never writes")
        if f"{root}/byteorder" in records and archive.read(f"{root}/byteorder") != b"little":
            raise pickle.UnpicklingError("it is of a big-endian machine")

        def filled(key: str, storage: _Storage) -> None:
            record = records[f"{root}/data/{key}"]
            if record.file_size != len(storage.bytes):
                raise pickle.UnpicklingError(f"storage {key} has {record.file_size} bytes, not {len(storage.bytes)}")
            with archive.open(record) as content:
                storage.fill(content)

        with archive.open(f"{root}/data.pkl") as content:
            return _TensorUnpickler(content, size, filled).load()


def _read_pickles(file: IO[bytes], size: int) -> Any:
    """Magic number, protocol, the system, the object, its storages' keys; then each storage's count and bytes."""

    def plain_value() -> Any:
        return _TensorUnpickler(file, 0, lambda key, storage: None).load()

    if plain_value() != _MAGIC_NUMBER or plain_value() != _PROTOCOL:
        raise pickle.UnpicklingError("torch.save did not write it")
    if plain_value().get("little_endian") is not True:
        raise pickle.UnpicklingError("it is of a big-endian machine")
    storages: dict[str, _Storage] = {}
    loaded = _TensorUnpickler(file, size, storages.__setitem__).load()
    if set(keys := plain_value()) != storages.keys():
        raise pickle.UnpicklingError("it does not hold the storages of its tensors")
    for key in keys:
        if struct.unpack("<q", file.read(8))[0] != storages[key].count:
            raise pickle.UnpicklingError(f"storage {key} does not have the size of its tensors")
        storages[key].fill(file)
    return loaded


class _TensorUnpickler(pickle.Unpickler):
    """Reads storages of `most_bytes` together. Calls `made` with the key of each, and the storage."""

    def __init__(self, file: IO[bytes], most_bytes: int, made: Callable[[str, _Storage], None]):
        super().__init__(file, encoding="utf-8")
        self.left, self.made = most_bytes, made
        self.storages: dict[str, _Storage] = {}
        self.known = _callables()  # new ones for each file: a pickle can set attributes of what it is given

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) in self.known:
            return self.known[module, name]
        raise pickle.UnpicklingError(f"it calls {module}.{name}")

    def persistent_load(self, saved: Any) -> _Storage:
        kind, dtype, key, _, count, *view = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"it refers to {saved!r}, which is no storage")
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if count < 0 or self.left < 0:
                raise pickle.UnpicklingError("its tensors are larger than the file")
            self.storages[key] = _Storage(dtype, count)
            self.made(key, self.storages[key])
        return self.storages[key]


def _callables() -> dict[tuple[str, str], Callable]:
    """The functions that a file may call, by its names for them."""

    def tensor(
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        if not isinstance(storage, _Storage) or metadata or min((offset, *size, *stride)) < 0:
            raise pickle.UnpicklingError("it holds a tensor of an unknown kind")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.count:
            raise pickle.UnpicklingError("a tensor lies outside its storage")
        view = torch.empty(0, dtype=storage.dtype)
        view.set_(storage.bytes.untyped_storage(), offset, tuple(size), tuple(stride))
        return view.requires_grad_(requires_grad)

    def parameter(data: torch.Tensor, requires_grad: bool, hooks: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(data, requires_grad)

    def encoded(text: str, encoding: str) -> bytes:  # how pickle's protocol 2 writes bytes
        return text.encode("latin1")

    return {
        ("__builtin__", "set"): set,
        ("_codecs", "encode"): encoded,
        ("builtins", "set"): set,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
    }
