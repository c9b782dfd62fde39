"""The optimizer's step in one kernel for all parameters, where PyTorch has it for the device.

PyTorch itself takes the fused kernels only where `fused=True` is said. The values are those of its loop over the
parameters but for float32's rounding: the kernels round a multiplication and an addition once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

_CLASSES = (AdamW, Adam, SGD)  # newer PyTorch derives AdamW from Adam
_CHOICES = ("fused", "foreach")


def fuse(optimizer: Optimizer) -> Optimizer:
    """The optimizer with the fused step where PyTorch has one, unless the config says `fused` or `foreach` itself. A
    fused optimizer of PyTorch's own class is a new object, with the same groups: use the one returned.

    A checkpoint that is loaded leaves that as it is: how an optimizer steps is a run's own, and its state the same.
    """
    of_torch = next((each for each in _CLASSES if isinstance(optimizer, each)), None)
    if of_torch is None:
        return optimizer
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not any(_is_said(group) for group in groups) and _has_fused(of_torch, parameters):
        for group in groups:
            group["fused"] = True
        if type(optimizer) is of_torch:
            optimizer = _constructed_fused(optimizer)
        if of_torch is SGD:
            optimizer.register_step_pre_hook(_begin_momentum)
    optimizer.register_load_state_dict_pre_hook(_keep_choices)
    optimizer.register_load_state_dict_post_hook(_lay_out_state)
    return optimizer


def _is_said(group: dict[str, Any]) -> bool:
    # an SGD with dampening begins its momentum otherwise than `_begin_momentum`
    stated = any(group.get(name) is not None for name in _CHOICES)
    return stated or bool(group.get("differentiable")) or group.get("dampening", 0) != 0


def _has_fused(of_torch: type[Optimizer], parameters: list[torch.Tensor]) -> bool:
    """Whether PyTorch has a fused step for these; its older versions have none for the CPU."""
    for parameter in parameters:
        # the kernels go through memory from end to end; one with gaps has a gradient without
        has_gaps = torch.empty_like(parameter, device="meta").stride() != parameter.stride()
        if has_gaps or not parameter.is_floating_point():
            return False
    for device, dtype in {(parameter.device, parameter.dtype) for parameter in parameters}:
        probe = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        try:
            of_torch([probe], lr=0.0, fused=True).step()
        except (RuntimeError, TypeError):
            return False
    return True


def _constructed_fused(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, with `fused=True` given to its constructor.

    Only then does PyTorch let a GradScaler leave the scale and the skipped steps to the kernel. Otherwise the scaler
    waits for the device in each step. A subclass with a `step` of its own must not get this: it may read gradients,
    which would still be scaled.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    return type(optimizer)(optimizer.param_groups, **{**defaults, "foreach": None, "fused": True})


def _begin_momentum(optimizer: Optimizer, arguments: Any, named: Any) -> None:
    """Gives each parameter with a gradient a momentum of zeros to begin with, which its first step makes its gradient.

    PyTorch's fused SGD ends in an error where some parameters have one and others, whose first gradient comes later,
    have not.
    """
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _keep_choices(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state with this run's choices."""
    own, saved = optimizer.param_groups, state["param_groups"]
    if len(own) != len(saved):
        return state  # PyTorch says so
    choices = [{name: group[name] for name in _CHOICES if name in group} for group in own]
    return {**state, "param_groups": [{**group, **choice} for group, choice in zip(saved, choices, strict=True)]}


def _lay_out_state(optimizer: Optimizer) -> None:
    """Lays the state out in memory as its parameters: the fused kernels go through both by address, and a checkpoint
    may be of a run with another `channels_last`."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            of_parameter = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if of_parameter and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
