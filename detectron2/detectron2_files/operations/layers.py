"""Gives `detectron2.layers` its deformable convolutions where Detectron2 was not compiled."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

from detectron2_files.operations.deform_conv import deform_conv, modulated_deform_conv

_NAME = "detectron2._C"


def complete_layers() -> None:
    """Imports `detectron2.layers` with the real classes `DeformConv` and `ModulatedDeformConv`, over our functions.

    The module makes dummies of them where `from detectron2 import _C` fails: so it finds a stand-in, during the
    import. Afterwards the stand-in is removed, so that detectron2.evaluation falls back to pycocotools.
    """
    early = "detectron2.layers" in sys.modules
    with _stand_in():
        import detectron2.layers.deform_conv as module

        if early:
            dummies = {name: getattr(module, name) for name in ("DeformConv", "ModulatedDeformConv")}
            importlib.reload(module)
            _replace({dummies[name]: getattr(module, name) for name in dummies})
    module.deform_conv = deform_conv
    module.modulated_deform_conv = modulated_deform_conv


def _replace(classes: dict[type, type]) -> None:
    """In all of the library's modules that imported them already."""
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and module is not None:
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value in classes:
                    setattr(module, key, classes[value])


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    import detectron2

    before = {_NAME: sys.modules[_NAME]} if _NAME in sys.modules else {}  # None where it does not load
    module = ModuleType(_NAME, "Stands in for Detectron2's compiled part.")
    module.__getattr__ = _missing
    sys.modules[_NAME] = detectron2._C = module
    try:
        yield
    finally:
        del sys.modules[_NAME], detectron2._C
        sys.modules.update(before)


def _missing(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"detectron2._C.{name} is not there: only the compiled Detectron2 has it")

    return missing
