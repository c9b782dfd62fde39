"""What mmcv's compiled module `mmcv._ext` does, in PyTorch and torchvision, on any device.

`mmcv` 1.7 without `-full` is pure Python and has all of `mmcv/ops/*.py`; only the module that they load by name is
missing. `install` puts one in its place where no compiled one imports. Its functions have the names and the
arguments of mmcv's (mmcv/ops/csrc/pytorch/pybind.cpp): most write their result into a tensor that the caller made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch

_PARTS = [
    importlib.import_module(f"{__name__}.{name}")
    for name in (
        *("attention", "carafe", "deformable_convolution", "focal_loss", "masked_convolution", "overlaps"),
        *("region_pooling", "suppression", "sync_batch_norm"),
    )
]


def install() -> str | None:
    """Makes `mmcv.ops` importable; to be called before its first import.

    Returns:
        Why a compiled module that is there is not taken; None if it is absent or in use.
    """
    try:
        compiled = importlib.import_module("mmcv._ext")
    except ModuleNotFoundError as error:
        if error.name != "mmcv._ext":
            raise
        reason = None
    except (ImportError, OSError) as error:  # for another torch
        reason = str(error).strip().splitlines()[0]
    else:
        if compiled.get_compiling_cuda_version() != "not available" or not torch.cuda.is_available():
            return None
        reason = "compiled without CUDA, and there is a GPU"
    # with a loader: mmcv asks for it to see whether it has operations (mmcv.utils.ext_loader.check_ops_exist)
    sys.modules["mmcv._ext"] = importlib.util.module_from_spec(ModuleSpec("mmcv._ext", _Loader()))
    return reason


def are_compiled() -> bool:
    """Whether mmcv's operations are those of a compiled mmcv-full."""
    return not isinstance(importlib.import_module("mmcv._ext"), InPyTorch)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return InPyTorch()

    def exec_module(self, module: ModuleType) -> None:
        pass  # it has all from the start


class InPyTorch(ModuleType):
    """`mmcv._ext`; a missing operation raises when it is called, because mmcv asks for every name at import."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext", __doc__)
        for part in _PARTS:
            for name in part.__all__:
                setattr(self, name, getattr(part, name))

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*arguments: Any, **named: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operation {name} is not written in PyTorch here: compile mmcv-full 1.7.2, which has it "
                "(mmdetection/README.md, Compiled operations)"
            )

        return missing
