"""What modules keep in plain attributes while they train, for a resume that is exact."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def python_state(model: nn.Module, attributes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a resumed run needs of the model beside its weights and buffers, as plain numbers.

    Args:
        attributes: for the name of a module's class, the dotted attributes that it keeps; one that is not there yet is
            left out.
    """
    state = {}
    for name, module in model.named_modules():
        for path in attributes.get(type(module).__name__, ()):
            try:
                state[f"{name}:{path}"] = _plain(operator.attrgetter(path)(module))
            except AttributeError:
                continue
    return state


def restore_python_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Takes back what `python_state` gave."""
    for key, value in state.items():
        name, path = key.split(":")
        *owners, attribute = path.split(".")
        owner = model.get_submodule(name)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value
