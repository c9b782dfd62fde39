"""Pickles of arrays and plain values, as Detectron's weights and proposals are, read without trusting them.

NumPy trusts the pickled state of an array and of its data type. A data type of Python objects can claim to hold none,
and NumPy then takes the file's bytes for addresses. So NumPy restores nothing here: each array is built from its bytes.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from shared.errors import UserError

_NUMBERS = "biufc"  # kinds of NumPy's data types: bool, int, unsigned, float, complex
_STATE_OF_NUMBERS = (None, None, None, -1, -1, 0)  # no fields, no size, no flags


def unpickle_arrays(path: Path) -> dict[str, Any]:
    """A pickled dict of arrays of numbers and of plain values.

    Raises:
        UserError: the file is damaged or holds anything else. Nothing that it names is called.
    """

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            make = _MAKERS.get((module.replace("numpy._core.", "numpy.core."), name))
            if make is None:
                raise _NotPlain(f"{module}.{name}, which could execute code")

            def call(*arguments: Any) -> Any:  # the file's own: a pickle can assign a function's attributes
                return make(*arguments)

            return call

    try:
        with path.open("rb") as file:
            loaded = ArraysOnly(file, encoding="latin1").load()
    except OSError:
        raise
    except _NotPlain as error:
        raise UserError(
            f"{path} holds more than arrays of numbers and plain values: {error}. Fix: give a file without it"
        ) from error
    except Exception as error:  # pickle raises what the broken bytes happen to say
        raise UserError(
            f"{path} is cut off, or not a pickle of weights: {error}. Fix: download it again, or give another file"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path} is not a pickle of weights: it holds a {type(loaded).__name__}. Fix: give a file of weights"
        )
    return loaded


class _NotPlain(Exception):
    """A pickle holds something else than arrays of numbers and plain values; says what."""


class _DType:
    """Stands for a pickled data type.

    Attributes:
        dtype: a data type of numbers.
    """

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        if not isinstance(code, str) or np.dtype(code).kind not in _NUMBERS:
            raise _NotPlain(f"an array of the data type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        version, order, *others = state
        if version != 3 or order not in ("<", ">", "|", "=") or tuple(others) != _STATE_OF_NUMBERS:
            raise _NotPlain(f"the data type {self.dtype} with the state {state!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """A pickled array, empty until its state is set."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, by_columns, content = state
        if version != 1 or not isinstance(dtype, _DType):
            raise _NotPlain(f"an array with a state of version {version!r} and {dtype!r}")
        content = _bytes(content)
        if any(type(size) is not int or size < 0 for size in shape):
            raise _NotPlain(f"an array of the shape {shape!r}")
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise _NotPlain(f"an array of {dtype.dtype} and the shape {shape!r} with {len(content)} bytes")
        super().__setstate__((1, tuple(shape), dtype.dtype, bool(by_columns), content))


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array(0, np.uint8)


def _scalar(dtype: _DType, content: Any) -> np.generic:
    (value,) = np.frombuffer(_bytes(content), dtype.dtype)
    return value


def _bytes(content: Any) -> bytes:
    if isinstance(content, str):  # Python 2's bytes
        return content.encode("latin1")
    if not isinstance(content, bytes):
        raise _NotPlain(f"an array's content as {type(content).__name__}")
    return content


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):  # as Python 3 pickles bytes for Python 2
        raise _NotPlain(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _ndarray(*_: Any) -> None:
    raise _NotPlain("a call of numpy.ndarray")  # the class is an argument of `_reconstruct` and is not called


# the names that a file may use, and the functions that replace them
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # as Python 3 pickles no bytes for Python 2
    ("collections", "OrderedDict"): dict,
    ("detectron2.structures.boxes", "BoxMode"): lambda value: int(BoxMode(value)),  # of proposals
}
