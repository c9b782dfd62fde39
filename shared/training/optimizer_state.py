"""How a resumed run continues its optimizer: what it takes from the checkpoint, and what from its own config.

Training changes some options of an optimizer itself, such as the learning rate. A config changes others. A checkpoint
therefore also holds the options as its run's config built them. If an option differs from them, the config changed it,
and this run's value wins. Every other option continues with its saved value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shared.errors import UserError

# what schedulers copy from an option before they change it, by the options that it is copied from
_COPIES = {"initial_lr": {"lr"}, "initial_momentum": {"momentum", "betas"}}
# what a config says and most schedules leave alone; older checkpoints do not hold what their config built
_OF_CONFIG = ("weight_decay", "momentum", "betas", "eps")


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer as a config builds it, before the first step: plain values, for a checkpoint.

    Attributes:
        kinds: names of its class and base classes; also those of an optimizer that it wraps.
        parameters: names of the model's parameters, per group.
        options: the other entries of each group.
    """

    kinds: list[list[str]]
    parameters: list[list[str]]
    options: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer, model: nn.Module) -> BuiltOptimizer:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        return cls(
            kinds=[_kind(each) for each in (optimizer, *vars(optimizer).values()) if isinstance(each, Optimizer)],
            parameters=[[names[id(parameter)] for parameter in group["params"]] for group in groups],
            options=[deepcopy({name: group[name] for name in group if name != "params"}) for group in groups],
        )

    @property
    def name(self) -> str:
        return " over ".join(kind[0] for kind in self.kinds)

    def resumed(self, saved: dict[str, Any], began: BuiltOptimizer | None) -> dict[str, Any]:
        """The state to load: that of each parameter by its name, and the options.

        Parameters that the checkpoint's run did not train have no state yet.

        Args:
            saved: the checkpoint's optimizer state.
            began: the checkpoint's optimizer as its config built it; None in older checkpoints.

        Raises:
            ValueError: this optimizer cannot continue from the state.
        """
        began = began or self._as_began(saved["param_groups"])
        if len(began.kinds) != len(self.kinds) or not all(map(_share_a_class, began.kinds, self.kinds)):
            raise ValueError(f"{self.name} cannot continue from the state of {began.name}, the checkpoint's optimizer")
        group_of, index_of = {}, {}
        for number, (names, group) in enumerate(zip(began.parameters, saved["param_groups"], strict=True)):
            group_of.update(dict.fromkeys(names, number))
            index_of.update(zip(names, group["params"], strict=True))
        state, groups = {}, []
        for names, options in zip(self.parameters, self.options, strict=True):
            begin = sum(len(group["params"]) for group in groups)
            for index, name in enumerate(names, begin):
                if index_of.get(name) in saved["state"]:
                    state[index] = saved["state"][index_of[name]]
            source = next((group_of[name] for name in names if name in group_of), None)
            if source is not None:
                options = _resumed_options(options, began.options[source], saved["param_groups"][source])
            groups.append({**options, "params": list(range(begin, begin + len(names)))})
        return {"state": state, "param_groups": groups}

    def _as_began(self, groups: list[dict[str, Any]]) -> BuiltOptimizer:
        """How an older checkpoint's optimizer was built, as far as its state shows it."""
        if [len(names) for names in self.parameters] != [len(group["params"]) for group in groups]:
            raise ValueError(
                "hyperparameters.freeze or the weight decay changed which parameters are in which group, and this "
                "checkpoint of an older version does not name them"
            )
        options = []
        for own, group in zip(self.options, groups, strict=True):
            saved = group.keys() - _COPIES.keys() - {"params"}
            if saved - own.keys() and own.keys() - saved:
                raise ValueError(f"{self.name} cannot continue from the state of the checkpoint's optimizer")
            stated = {name: group[name] for name in _OF_CONFIG if name in group}
            options.append({**own, **stated, "lr": group.get("initial_lr", own["lr"])})
        return BuiltOptimizer(self.kinds, self.parameters, options)


def merged(own: Mapping[str, Any], began: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved values, with this run's values for all that its config changed.

    Args:
        own, began: the values of this run's config and of the checkpoint's.
        saved: the values after training.
    """
    removed = began.keys() - own.keys()
    return {
        **own,
        **{name: value for name, value in saved.items() if name not in removed},
        **{name: own[name] for name in _changed(own, began)},
    }


def _changed(own: Mapping[str, Any], began: Mapping[str, Any]) -> set[str]:
    return {name for name in own.keys() & began.keys() if own[name] != began[name]}


def _resumed_options(own: dict[str, Any], began: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    options, changed = merged(own, began, saved), _changed(own, began)
    # a scheduler copies the new value again
    outdated = {copy for copy, sources in _COPIES.items() if changed & sources}
    return {name: value for name, value in options.items() if name not in outdated}


def _kind(optimizer: Optimizer) -> list[str]:
    return [each.__name__ for each in type(optimizer).__mro__ if issubclass(each, Optimizer) and each is not Optimizer]


def _share_a_class(one: list[str], other: list[str]) -> bool:
    # gradient clipping makes a subclass of an optimizer, and newer versions of PyTorch make AdamW one of Adam
    return bool(set(one) & set(other))


@contextlib.contextmanager
def refused_values(what: str) -> Iterator[None]:
    """Raises UserError if a library refuses the values of the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise UserError(
            f"hyperparameters: the {what} cannot be made of these values ({type(error).__name__}: {error})"
        ) from error
