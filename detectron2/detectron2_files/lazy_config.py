"""Detectron2's Python configs, which are LazyConfigs."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from detectron2_files.config_protocol import TrainingSet, check_sampler
from detectron2_files.plain_config import OF_CONFIG, read_plain, write_plain
from shared.data.images import InputScale
from shared.errors import UserError, nearest

_ANCHOR_SIZES = re.compile(r"anchor_generators?\.sizes\[")


class LazyConfigFile:
    """A LazyConfig, `cfg`, of Detectron2's sections: model, optimizer, lr_multiplier, dataloader, train.

    Args:
        places: the submitted folder, and the folder of the configs that the library ships.
        modules: the user's own, which a checkpoint's config may name too.
        find_functions: gives the config of the user's own that a checkpoint's functions may come from, or None.
    """

    resolved_name = "detectron2_lazy.yaml"
    rotated = False

    def __init__(
        self,
        path: Path,
        overrides: Mapping[str, Any],
        places: tuple[Path, Path],
        modules: Sequence[str],
        find_functions: Callable[[], Path | None],
    ):
        self.path = path
        self.places = places
        self.find_functions = find_functions
        try:
            written = path.name == self.resolved_name
            self.cfg = read_plain(path, modules) if written else LazyConfig.load(str(path))
        except UserError:
            raise
        except Exception as error:  # a Python config may raise anything
            raise UserError(
                f"hyperparameters.config_file: {path}: {type(error).__name__}: {error}. Fix: correct the file"
            ) from error
        missing = {"model", "optimizer", "lr_multiplier", "dataloader", "train"} - set(self.cfg)
        if missing:
            raise UserError(
                f"hyperparameters.config_file: {path} has no {', '.join(sorted(missing))}: it is a part of other "
                "configs. Fix: give a whole config"
            )
        for key, value in overrides.items():
            _check_key(self.cfg, key)
            OmegaConf.update(self.cfg, key, value, merge=True, force_add=True)
        self._origins = dict(_origins(self.cfg)) if written else {}
        for key, name in self._origins.items():
            OmegaConf.update(self.cfg, key, self._value_of(name, key), merge=False)

    def _value_of(self, name: str, key: str) -> Any:
        """The value at a key of the config `name`, whose Python is executed: it is one that the library ships, or the
        user's own."""
        shipped = self.places[-1]
        files = [(place / name).resolve() for place in self.places]
        file = next((file for file in files if file.is_relative_to(shipped) and file.is_file()), None)
        if file is None and (trusted := self.find_functions()) is not None and trusted.resolve() in files:
            file = trusted.resolve()
        if file is None:
            raise UserError(
                f"{self.path}: {key} is a function of {name}, and a checkpoint executes no file. Fix: if you trust it, "
                f"name it in your config, hyperparameters.functions_of: {name}"
            )
        value = OmegaConf.select(LazyConfig.load(str(file)), key)
        if value is None:
            raise UserError(
                f"{self.path}: {key} is a function of {file}, which no longer has it. Fix: restore the function"
            )
        return value

    @property
    def input_scale(self) -> InputScale | None:
        """By what anchors and the resizing of the test images are called in the configs that the library ships; None
        where one of them is not found."""
        sizes = [v for key, v in _values(self.cfg.model) if _ANCHOR_SIZES.search(key) and isinstance(v, (int, float))]
        mapper = self.cfg.dataloader.get("test", {}).get("mapper") or {}
        steps = [step for step in mapper.get("augmentations") or () if isinstance(step, DictConfig)]
        resize = next((s for s in steps if _name(s.get("_target_", "")) == "ResizeShortestEdge"), None)
        if not sizes or resize is None:
            return None
        short = np.max(resize.short_edge_length)  # a number, or several
        return InputScale(min(sizes), "anchor", float(short), resize.get("max_size") or math.inf)

    @property
    def weights(self) -> str:
        return self.cfg.train.get("init_checkpoint", "")

    @property
    def batch_size(self) -> int:
        if "total_batch_size" not in self.cfg.dataloader.train:
            raise UserError(
                f"{self.path} has no dataloader.train.total_batch_size. Fix: set hyperparameters.global_batch_size"
            )
        return self.cfg.dataloader.train.total_batch_size

    @property
    def max_iter(self) -> int:
        return self.cfg.train.max_iter

    @property
    def eval_period(self) -> int:
        return self.cfg.train.get("eval_period", 0)

    @property
    def checkpoint_period(self) -> int:
        return self.cfg.train.get("checkpointer", {}).get("period", 0)

    @property
    def learning_rate(self) -> float:
        return self.cfg.optimizer.lr

    warmup_iters = 0  # `lr_multiplier` has it as a share of the length

    @property
    def schedule_name(self) -> str:
        scheduler = self.cfg.lr_multiplier
        return _name(scheduler.get("scheduler", scheduler)["_target_"])

    @property
    def mixed_precision(self) -> bool:
        return bool(self.cfg.train.get("amp", {}).get("enabled"))

    @property
    def cudnn_benchmark(self) -> bool:
        return bool(self.cfg.train.get("cudnn_benchmark"))

    @property
    def float32_precision(self) -> str:
        return self.cfg.train.get("float32_precision") or ""

    @property
    def find_unused_parameters(self) -> bool:
        return bool((self.cfg.train.get("ddp") or {}).get("find_unused_parameters"))

    @property
    def halves_gradients(self) -> bool:
        return bool((self.cfg.train.get("ddp") or {}).get("fp16_compression"))

    precise_bn_batches, augments_tests, clips_gradients = 0, False, False  # keys of YAML configs

    def with_test_augmentation(self, model: nn.Module) -> nn.Module:
        return model

    @property
    def train_set(self) -> TrainingSet:
        loader = self.cfg.dataloader.train
        dataset, sampler = loader.get("dataset") or {}, loader.get("sampler") or {}
        kind = _name(sampler.get("_target_", "TrainingSampler"))
        check_sampler(kind, "dataloader.train.sampler")
        factors = sampler.get("repeat_factors") or {}
        return TrainingSet(
            names=_names(dataset.get("names") or ()),
            filter_empty=dataset.get("filter_empty", True),
            min_keypoints=dataset.get("min_keypoints", 0),
            proposal_files=_names(dataset.get("proposal_files") or ()),
            group_by_aspect_ratio=loader.get("aspect_ratio_grouping", True),
            repeat_threshold=factors.get("repeat_thresh") if kind == "RepeatFactorTrainingSampler" else None,
            repeat_sqrt=factors.get("sqrt", True),
            subset_ratio=sampler.get("subset_ratio") if kind == "RandomSubsetTrainingSampler" else None,
        )

    @property
    def val_names(self) -> tuple[str, ...]:
        return _names((self.cfg.dataloader.test.get("dataset") or {}).get("names") or ())

    @property
    def val_proposal_files(self) -> tuple[str, ...]:
        return _names((self.cfg.dataloader.test.get("dataset") or {}).get("proposal_files") or ())

    @property
    def iou_types(self) -> tuple[str, ...]:
        # at any place of the model: the heads of a model of one's own, or of MMDetection, need not be in roi_heads
        heads = set(_heads(self.cfg.model))
        types = {"segm": "mask_head", "keypoints": "keypoint_head"}
        return ("bbox", *(iou_type for iou_type, head in types.items() if head in heads))

    @property
    def keypoint_sigmas(self) -> tuple[float, ...]:
        evaluator = self.cfg.dataloader.get("evaluator") or {}
        return tuple(evaluator.get("kpt_oks_sigmas") or ()) if isinstance(evaluator, DictConfig) else ()

    @property
    def scored_detections(self) -> int | None:
        """`max_dets_per_image` of COCOEvaluator: one number, or several: the last counts for mAP."""
        evaluator = self.cfg.dataloader.get("evaluator") or {}
        most = evaluator.get("max_dets_per_image") if isinstance(evaluator, DictConfig) else None
        return most if most is None or isinstance(most, int) else int(most[-1])

    @property
    def polygon_masks(self) -> bool:
        mapper = self.cfg.dataloader.train.get("mapper") or {}
        return bool(mapper.get("use_instance_mask")) and mapper.get("instance_mask_format", "polygon") == "polygon"

    @property
    def detects_instances(self) -> bool:
        return _name(self.cfg.model["_target_"]) not in ("SemanticSegmentor", "ProposalNetwork", "PanopticFPN")

    @property
    def semantic(self) -> bool:
        return _name(self.cfg.model["_target_"]) == "SemanticSegmentor"

    def scale_schedule(self, global_batch_size: int) -> None:
        # the multiplier is over the share of the training that is done: warm-up and steps follow max_iter
        factor, train = global_batch_size / self.batch_size, self.cfg.train
        self.cfg.dataloader.train.total_batch_size = global_batch_size
        self.cfg.optimizer.lr *= factor
        train.max_iter = round(train.max_iter / factor)
        if self.eval_period:
            train.eval_period = round(train.eval_period / factor)
        if self.checkpoint_period:
            train.checkpointer.period = round(train.checkpointer.period / factor)

    def set_length(self, batches: int) -> None:
        self.cfg.train.max_iter = batches

    def class_counts(self) -> dict[str, int]:
        return dict(_class_counts(self.cfg.model, "model"))

    def set_class_count(self, key: str, count: int) -> None:
        OmegaConf.update(self.cfg, key, count)

    def mapper(self, training: bool, names: tuple[str, ...]) -> Any:
        split = "train" if training else "test"
        if "mapper" not in self.cfg.dataloader[split]:
            raise UserError(
                f"hyperparameters.config_file: {self.path} has no dataloader.{split}.mapper, which makes a detector's "
                "inputs. Fix: give the config of a detector"
            )
        section = self.cfg.dataloader[split]
        if training and section.mapper.get("keypoint_hflip_indices") is not None and _has_keypoints(names):
            # the config has those of the data set that it names itself
            section = copy.deepcopy(section)
            section.mapper.keypoint_hflip_indices = [int(i) for i in create_keypoint_hflip_indices(list(names))]
        return _build(section, "mapper", f"dataloader.{split}")

    def build_model(self) -> nn.Module:
        return _build(self.cfg, "model", "")

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        section = OmegaConf.create({"optimizer": copy.deepcopy(self.cfg.optimizer)}, flags={"allow_objects": True})
        section.optimizer.params.model = model
        optimizer = _build(section, "optimizer", "")
        for group in (*optimizer.param_groups, optimizer.defaults):
            # a checkpoint holds plain values only, which are read without executing pickled code
            group.update({key: tuple(value) for key, value in group.items() if isinstance(value, ListConfig)})
        return optimizer

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, _build(self.cfg, "lr_multiplier", ""), self.max_iter)

    def write(self, folder: Path) -> None:
        inside = (self.path.relative_to(place) for place in self.places if self.path.is_relative_to(place))
        name = str(next(inside, self.path))
        write_plain(self.cfg, folder / self.resolved_name, lambda key: self._origins.get(key, name))


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config, each with its dotted key."""
    if isinstance(node, ListConfig):
        keys = [(i, f"{prefix}[{i}]") for i in range(len(node))]
    else:
        keys = [(key, f"{prefix}.{key}" if prefix else str(key)) for key in node]
    for key, dotted in keys:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(node[key], (DictConfig, ListConfig)):
            yield from _values(node[key], dotted)
        else:
            yield dotted, node[key]


def _heads(node: Any) -> Iterator[str]:
    """The keys of a model, at any depth, that something is built for."""
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key) or node[key] is None:
            continue
        if isinstance(key, str):
            yield key.removesuffix("s")
        if isinstance(node[key], (DictConfig, ListConfig)):
            yield from _heads(node[key])


def _origins(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    for key, value in _values(cfg):
        if key.endswith(f".{OF_CONFIG}"):
            yield key.removesuffix(f".{OF_CONFIG}"), value


def _has_keypoints(names: tuple[str, ...]) -> bool:
    return bool(names) and bool(MetadataCatalog.get(names[0]).get("keypoint_names"))


def _name(target: Any) -> str:
    return (target if isinstance(target, str) else target.__name__).rsplit(".", 1)[-1]


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _build(section: DictConfig, key: str, where: str) -> Any:
    try:
        return instantiate(section[key])
    except Exception as error:  # whatever the constructors raise
        place = f"{where}.{key}" if where else key
        raise UserError(
            f"{place} of the Detectron2 config: {type(error).__name__}: {error}. Fix: correct that part of the config"
        ) from error


def _class_counts(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            yield from _class_counts(node[i], f"{prefix}[{i}]")
    elif isinstance(node, DictConfig):
        for key in node:
            if OmegaConf.is_interpolation(node, key):  # follows the one that it names
                continue
            if key == "num_classes" and isinstance(node[key], int) and "backbone" not in prefix:
                yield f"{prefix}.{key}", node[key]
            else:
                yield from _class_counts(node[key], f"{prefix}.{key}")


def _check_key(cfg: DictConfig, key: str) -> None:
    """Raises UserError for a key that is neither there nor an argument of what is built from its section:
    LazyConfig itself takes it silently."""
    *sections, last = str(key).split(".")
    node: Any = cfg
    for i, part in enumerate(sections):
        below = node.get(part) if isinstance(node, DictConfig) else _item(node, part)
        if below is None or not OmegaConf.is_config(below):
            valid = [str(k) for k in node] if isinstance(node, DictConfig) else []
            here = ".".join(sections[: i + 1])
            raise UserError(f"hyperparameters.config_overrides: unknown key {here!r}{nearest(part, valid)}")
        node = below
    if isinstance(node, ListConfig):
        valid = set(map(str, range(len(node))))
    else:
        valid = {str(k) for k in node} | _arguments(node.get("_target_"))
    if last not in valid and "*" not in valid:
        raise UserError(f"hyperparameters.config_overrides: unknown key {key!r}{nearest(last, valid)}")


def _item(node: ListConfig, part: str) -> Any:
    return node[int(part)] if part.isdigit() and int(part) < len(node) else None


def _arguments(target: Any) -> set[str]:
    """The names of its arguments, "*" where it takes any."""
    if target is None:
        return set()
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters.values()
    except (TypeError, ValueError):  # built in
        return {"*"}
    return {"*" if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) else p.name for p in parameters}
