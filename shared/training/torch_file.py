"""Reads what `torch.save` wrote without `torch.load`, for torch before 2.6.

Before 2.6, `torch.load(weights_only=True)` runs code from some files (CVE-2025-32434): TorchScript and tar archives.
This reader knows two containers: the ZIP file, and the sequence of pickles that `torch.save` wrote before torch 1.6 and
that model zoos still publish. It calls only what builds tensors and plain containers.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

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
    """What `torch.save` wrote, on the CPU, with the same bits as `torch.load` gives.

    Raises:
        Exception: of any kind, if the file is cut off, damaged or holds more than tensors and plain values.
    """
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
    """
    Args:
        most_bytes: of all storages together.
        made: called with the key of each storage and the storage, once.
    """

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
