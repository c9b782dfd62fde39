"""What detectors of a library with configs of its own have in common: configs, modules of the user's, weights."""

from __future__ import annotations

import copy
import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from shared.errors import UserError, nearest

logger = logging.getLogger(__name__)

_LEAST = 0.25  # of a model's weights: a backbone is more


def find_library_config(name: str, submitted: Path, shipped: Path, key: str) -> Path:
    """The path of a detector library's config: in the folder submitted, else among those that the library ships. If it
    is in neither, a UserError names the nearest."""
    for place in (submitted, shipped):
        if (place / name).is_file():
            return (place / name).absolute()
    places = ((submitted, submitted / "configs"), (shipped, shipped))
    files = [(path, root) for root, folder in places for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    known = {str(path.relative_to(root)) for path, root in files}
    alike = [other for other in known if Path(other).stem == Path(name).stem]
    by_file_name = sorted(alike, key=lambda other: (Path(other).suffix != Path(name).suffix, other))
    listed = f"give one of {shipped}"
    near = f"; did you mean {by_file_name[0]!r}?" if by_file_name else nearest(name, known, otherwise=listed)
    raise UserError(f"hyperparameters.{key}: {name} is neither in {submitted} nor in {shipped}{near}")


def import_custom_modules(names: Iterable[str]) -> list[ModuleType]:
    """The user's own modules, of `hyperparameters.custom_imports`: files of the folder submitted (`my_data.py`), or
    names of modules. Raises UserError if one cannot be imported."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name.removesuffix(".py").replace("/", ".")))
        except Exception as error:  # the user's own module may raise anything
            raise UserError(
                f"hyperparameters.custom_imports: {name} cannot be imported: {type(error).__name__}: {error}. Fix: put "
                "it into the detector's folder, or install it"
            ) from error
    return modules


def log_loaded(loaded: int, total: int, source: str, anew: Mapping[str, list[str]]) -> None:
    """One line of how many of a model's weights came from `source`, and which start anew.

    Args:
        anew: names of weights, by the reason.

    Raises:
        UserError: they are so few that the weights are another model's, and some names are the same by chance.
    """
    parts = [
        f"; {len(names)} {reason} and start anew ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for reason, names in anew.items()
        if names
    ]
    if loaded < _LEAST * total:
        raise UserError(
            f"{source} is of another model: only {loaded} of this one's {total} weights are in it{''.join(parts)}. "
            "Fix: use the config that it was trained with"
        )
    logger.info("weights: %d of the model's %d from %s%s", loaded, total, source, "".join(parts))


class KeptByShape:
    """Replaces a function whose lists of tensors follow from its arguments; a tensor among them counts by its
    shape, data type and device. Its last results are kept, and given again.

    One that somebody wrote into is built anew. A copy of it, and so an averaged model's, starts with nothing kept.

    Args:
        function: gives a list of tensors, or of objects that hold one as `tensor`.
        count: results that are kept: of 200,000 anchors, as many as 800 × 1333 pixels have, 3 MB each.
    """

    def __init__(self, function: Callable[..., list[Any]], count: int = 32):
        self.function, self.count = function, count
        self._kept: OrderedDict[Hashable, tuple[list[Any], list[int]]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.count)

    def __call__(self, *arguments: Any, **named: Any) -> list[Any]:
        # a tensor of inference mode is of no use to training, and a program that is traced needs the operations
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


# ids from 1 to 90; COCO does not use ten of them
COCO_CATEGORIES = [
    {"id": category_id, "name": name}
    for category_id, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
]
