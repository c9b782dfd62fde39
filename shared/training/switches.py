"""The switches of `hyperparameters`, such as averaged weights, precision and class weights; and the optimizer step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from determined.pytorch import PyTorchTrialContext
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from shared.errors import UserError, nearest


class AveragedWeights:
    """The exponential moving average of a model's weights and running statistics.

    After step n, from 0, the decay is at most (1 + n) / (10 + n), as in TensorFlow's `ExponentialMovingAverage`. So the
    average of a short run does not stay at its initial weights.

    Args:
        steps: optimizer steps that it has averaged before this start.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float, steps: int = 0):
        self.model, self.module = model, deepcopy(model).eval().requires_grad_(False)
        self.decay, self.steps = decay, steps
        state = model.state_dict()
        self._averaged = [name.rpartition(".") for name in state if state[name].is_floating_point()]
        self._copied = [name.rpartition(".") for name in state if not state[name].is_floating_point()]
        self._own_modules = dict(self.module.named_modules(remove_duplicate=False))
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def begin(self) -> None:
        """Starts the average from the model's weights, and its decay's warm-up too."""
        self.module.load_state_dict(self.model.state_dict())
        self.steps = 0

    def load(self, weights: Mapping[str, Any], steps: int | None) -> None:
        """Continues the average of a checkpoint. `steps` is None in older ones, whose average began with the run."""
        self.module.load_state_dict(weights)
        self.steps = self.steps if steps is None else steps

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in, after an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        own, new = self._own_modules, self._modules
        torch._foreach_lerp_(_tensors(own, self._averaged), _tensors(new, self._averaged), 1 - decay)
        if self._copied:
            torch._foreach_copy_(_tensors(own, self._copied), _tensors(new, self._copied))


def _tensors(modules: dict[str, nn.Module], names: list[tuple[str, str, str]]) -> list[torch.Tensor]:
    """Those of a state dict, by their modules: `state_dict` itself takes as long as the average of a small detector."""
    return [getattr(modules[path], name) for path, _, name in names]


def freeze(model: nn.Module, names: Sequence[str]) -> str:
    """Stops training parts of the model, and updating the running statistics of their batch norm.

    Args:
        names: modules or parameters, such as `backbone` or `backbone.layer1`.

    Returns:
        The parts, and how many parameters still train.

    Raises:
        UserError: the model has no part of a name, or nothing is left to train.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in names:
        if name not in parameters and name not in modules:
            parts = f"name one of its parts: {', '.join(part for part, _ in model.named_children())}"
            raise UserError(
                f"hyperparameters.freeze: the model has no part {name!r}"
                f"{nearest(name, [*modules, *parameters], otherwise=parts)}"
            )
        if name in modules:
            for module in modules[name].modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()
                    module.train = functools.partial(_keep_mode, module)
            modules[name].requires_grad_(False)
        else:
            parameters[name].requires_grad_(False)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise UserError(
            f"hyperparameters.freeze: {', '.join(names)} is the whole model, and nothing is left to train. Fix: freeze "
            "less"
        )
    whole = sum(p.numel() for p in parameters.values())
    return f"{', '.join(names)}; {trained:,} of {whole:,} parameters are trained"


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a module that stays in evaluation mode."""
    return module


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """PyTorch's autocast. A CPU detects in float32 after fp16 training: its half precision is slower."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16 if device.type == "cuda" else None}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Makes depthwise convolutions train in float32. Their inputs and outputs keep their type.

    For training in bf16 on a CPU: oneDNN takes four times as long for their gradients in bf16 as in float32. Measured
    with MBConv blocks at 512 pixels in channels_last, PyTorch 2.11.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.__class__ = _trained_in_float32(type(module))


@functools.cache
def _trained_in_float32(convolution: type[nn.Conv2d]) -> type[nn.Conv2d]:
    # another class, and no function in the module's place: a copy of the module is one of its own
    class TrainedInFloat32(convolution):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return super().forward(images)
            with torch.autocast(images.device.type, enabled=False):
                return super().forward(images.float()).to(images.dtype)

    TrainedInFloat32.__name__, TrainedInFloat32.__qualname__ = convolution.__name__, convolution.__qualname__
    return TrainedInFloat32


_CLASSES = (AdamW, Adam, SGD)  # newer PyTorch derives AdamW from Adam
_CHOICES = ("fused", "foreach")


def fuse(optimizer: Optimizer) -> Optimizer:
    """The optimizer with PyTorch's fused step if it has one, unless the config sets `fused` or `foreach` itself. For an
    optimizer of PyTorch's own class it is a new object with the same groups: use the one returned.

    Loading a checkpoint does not change the kind of step. The state is the same for all kinds.
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


# --- the step ---------------------------------------------------------------------------------------

Clip = Callable[[Sequence[nn.Parameter]], object]


def wrap_model(context: PyTorchTrialContext, model: nn.Module, find_unused_parameters: bool) -> nn.Module:
    """The model on its device; in DDP if there are several slots. `context.wrap_model` passes no option to DDP."""
    if context.distributed.size == 1 or not find_unused_parameters:
        return context.wrap_model(model)
    wrapped = DistributedDataParallel(model.to(context.device), find_unused_parameters=True)
    context.models.append(wrapped)
    return wrapped


def accumulating(model: nn.Module, ends_step: bool) -> AbstractContextManager:
    """For the forward and backward pass of a batch: DDP averages gradients over slots only in the batch that ends an
    optimizer step."""
    return nullcontext() if ends_step or not hasattr(model, "no_sync") else model.no_sync()


def step(
    optimizer: torch.optim.Optimizer, batches: int, clip: Clip | None, scaler: torch.amp.GradScaler | None
) -> None:
    """One optimizer step with the mean gradients of `batches` batches; then zeroes the gradients. `scaler` is what
    scaled the loss, and may skip the step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if batches > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(float(batches))
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip(parameters)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


# --- class weights ----------------------------------------------------------------------------------
# A detector multiplies the classification loss of each anchor, proposal or query by the weight of its category.
# Background counts 1. Box losses do not change.

_WEIGHTS = "hyperparameters.class_weights"


def class_weights(
    given: str | Mapping[str, float], categories: Sequence[dict], labels: np.ndarray
) -> torch.Tensor | None:
    """(K,) float32: the weight of each label. None if all are 1.

    Args:
        given: "balanced": all categories count the same, and an average object counts 1. Or weights by category name, 1
            for the others.
        labels: (objects,) of the training data.

    Raises:
        UserError: a name is not a category.
    """
    if given == "balanced":
        counts = np.bincount(labels, minlength=len(categories))
        in_use = counts > 0
        weights = np.ones(len(categories))
        weights[in_use] = counts.sum() / (in_use.sum() * counts[in_use])
    else:
        names = [category["name"] for category in categories]
        for name in given:
            if name not in names:
                raise UserError(f"{_WEIGHTS}: {name!r} is not a category of data.train{nearest(name, names)}")
        weights = np.array([given.get(name, 1.0) for name in names])
    return None if (weights == 1).all() else torch.tensor(weights, dtype=torch.float32)


def weights_of(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weight of each label, in the labels' shape. A label that is not a category, as background, has 1."""
    known = (labels >= 0) & (labels < len(weights))
    return torch.where(known, weights[labels.where(known, 0)], 1.0)


def no_class_weights(loss: str) -> UserError:
    """The error for a loss that cannot weigh categories."""
    return UserError(
        f"{_WEIGHTS}: {loss} takes no weights of categories. Fix: remove it, or repeat images of rare categories with "
        "data.repeat_threshold"
    )
