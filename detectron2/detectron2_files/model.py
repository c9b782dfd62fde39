"""The meta-architecture of the config, and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, RotatedAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from detectron2_files.config_protocol import Detectron2Config
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.errors import UserError
from shared.library import KeptByShape

logging.getLogger("detectron2").setLevel(logging.WARNING)  # tables of a data set's classes, and the like

# what these keep in plain attributes while they train
PYTHON_STATE = {"RetinaNet": ("loss_normalizer",), "FCOS": ("loss_normalizer",)}

_PRECISIONS = ("highest", "high", "medium")


def build_model(config: Detectron2Config) -> nn.Module:
    """The meta-architecture on the host, with its initial weights.

    Raises:
        UserError: the config does not make one.
    """
    try:
        model = config.build_model()
    except UserError:
        raise
    except Exception as error:  # the registries' constructors raise whatever they happen to
        raise UserError(
            f"hyperparameters.config_file: the model cannot be built: {type(error).__name__}: {error}. Fix: correct "
            "the model's keys"
        ) from error
    for module in model.modules():
        if isinstance(module, (DefaultAnchorGenerator, RotatedAnchorGenerator)):
            module.forward = KeptByShape(module.forward)
    return model


def keep_detections(model: nn.Module, count: int) -> None:
    """Sets the number of detections per image, in each head that has it.

    Raises:
        UserError: no head has it.
    """
    names = ("test_topk_per_image", "max_detections_per_image")
    found = [(module, name) for module in model.modules() for name in names if hasattr(module, name)]
    if not found:
        raise UserError("hyperparameters.max_detections: the model has no such number. Fix: omit it")
    for module, name in found:
        setattr(module, name, count)


def max_iou(model: nn.Module) -> float:
    """The IoU above which the last of the model's heads drops a detection; 0.5 if none does."""
    found = [module.test_nms_thresh for module in model.modules() if hasattr(module, "test_nms_thresh")]
    return found[-1] if found else 0.5


def build_optimizer(config: Detectron2Config, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer.

    Raises:
        UserError: it cannot be built.
    """
    try:
        return config.build_optimizer(model)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"the config's optimizer cannot be built: {type(error).__name__}: {error}. Fix: correct the optimizer's "
            "keys"
        ) from error


def take_up_switches(config: Detectron2Config, hparams: Detectron2Hyperparameters) -> None:
    """The config's mixed precision as `hyperparameters.amp`.

    Raises:
        UserError: both say something, and not the same; or both clip gradients.
    """
    if config.mixed_precision:
        if hparams.amp == "bf16":
            raise UserError(
                "hyperparameters.amp: bf16: the config's mixed precision, SOLVER.AMP.ENABLED or train.amp.enabled, is "
                "fp16. Fix: switch that off in config_overrides"
            )
        hparams.amp = "fp16"
    if hparams.clip_grad is not None and config.clips_gradients:
        raise UserError(
            "hyperparameters.clip_grad: the config clips each parameter's gradient by itself, SOLVER.CLIP_GRADIENTS. "
            "Fix: set config_overrides: {SOLVER.CLIP_GRADIENTS.ENABLED: false}, or remove clip_grad"
        )


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The parts that take and give feature maps alone: the heads take Detectron2's structures."""
    return [model.backbone] if isinstance(getattr(model, "backbone", None), nn.Module) else []


def pool_in_float32(model: nn.Module) -> None:
    """Regions are pooled in float32: `ROIAlign` rounds their corners to the features' precision, and bfloat16 has 8
    bits, of a thousand pixels some multiple of four."""
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    features, *others = inputs
    return [feature.float() for feature in features], *others


def losses_of_step(model: nn.Module, inputs: list[dict[str, Any]], number: int) -> dict[str, torch.Tensor]:
    """The model's losses in step `number`."""
    # where the models put numbers that they watch: nobody reads them, and nothing is kept from step to step
    with EventStorage(number):
        return model(inputs)


def measure_batch_statistics(model: nn.Module, batches: Iterable[list[dict[str, Any]]], count: int) -> None:
    """Computes running means and variances over `count` batches with the current weights.

    Detectron2's trainer does the same before a validation, for `TEST.PRECISE_BN`.
    """
    model.train()
    if get_bn_modules(model):
        with EventStorage():
            update_bn_stats(model, batches, count)


def apply_backend_options(config: Detectron2Config, for_training: bool) -> None:
    """`CUDNN_BENCHMARK` of training and `FLOAT32_PRECISION`, which are of the whole process, as Detectron2 does.

    Raises:
        UserError: the precision is not one of PyTorch's.
    """
    # its line about is_fx_tracing, one per rank, is for those who write libraries
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    torch.backends.cudnn.benchmark = for_training and config.cudnn_benchmark
    if precision := config.float32_precision:
        if precision not in _PRECISIONS:
            raise UserError(f"FLOAT32_PRECISION: {precision!r} is unknown. Fix: use one of {', '.join(_PRECISIONS)}")
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


def group_processes_of_machine(count: int) -> None:
    """Tells Detectron2, whose own launcher would, which processes share a machine; its Cityscapes evaluators ask.

    Args:
        count: processes on each machine.
    """
    try:
        comm.get_local_process_group()
    except AssertionError:
        comm.create_local_process_group(count)
