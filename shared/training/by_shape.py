"""What follows from the images' size alone, built once a size: anchors, points and which of them are valid."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch


class KeptByShape:
    """In the place of a function whose lists of tensors follow from its arguments; a tensor among them counts by its
    shape, data type and device. Its last results are kept, and given again.

    One that somebody wrote into is built anew. A copy of it, and so an averaged model's, starts with nothing kept.

    Args:
        function: gives a list of tensors, or of objects that hold one as `tensor`, as Detectron2's boxes do.
        count: results that are kept: of 200,000 anchors, as many as 800 × 1333 pixels have, 3 MB each.
    """

    def __init__(self, function: Callable[..., list[Any]], count: int = 32):
        self.function = function
        self.count = count
        self._kept: OrderedDict[Hashable, tuple[list[Any], list[int]]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.count)

    def __call__(self, *arguments: Any, **named: Any) -> list[Any]:
        # a tensor of inference mode is of no use to a training, and a program that is traced needs the operations
        if torch.is_inference_mode_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self.function(*arguments, **named)
        key = _key((arguments, tuple(sorted(named.items()))))
        results, versions = self._kept.get(key, ([], None))
        if versions != _versions(results):
            results = self.function(*arguments, **named)
            self._kept[key] = results, _versions(results)
            while len(self._kept) > self.count:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return [result if isinstance(result, torch.Tensor) else copy.copy(result) for result in results]


def _key(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value


def _versions(results: list[Any]) -> list[int]:
    """How often each tensor was written into, through views too."""
    return [getattr(result, "tensor", result)._version for result in results]
