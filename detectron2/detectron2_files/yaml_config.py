"""Detectron2's YAML configs, which are yacs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY
from torch import nn

from detectron2_files.config_protocol import TrainingSet, check_sampler
from detectron2_files.rotated import RotatedMapper
from shared.config.schema import is_url
from shared.data.images import InputScale
from shared.durable import write_file
from shared.errors import UserError, nearest
from shared.log import redacted

_CLASS_COUNTS = (
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CLASSES",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "MODEL.POINT_HEAD.NUM_CLASSES",  # of the project PointRend
    "MODEL.TENSOR_MASK.NUM_CLASSES",
)
_ADDS_KEYS = re.compile(r"add_(\w+_)?config")
_OF_STUFF = ("SemanticSegmentor", "PanopticFPN")
_WITHOUT_ROI_HEADS = ("RetinaNet", "SemanticSegmentor", "ProposalNetwork", "TensorMask")


@contextlib.contextmanager
def _zoo_bases() -> Iterator[None]:
    """Lets `_BASE_` of a user's config name one of the model zoo, as it would stand in the zoo's folder."""
    zoo, opened = Path(model_zoo.__file__).parent / "configs", CfgNode.__dict__.get("_open_cfg")

    def open_where_it_is(cls: type[CfgNode], name: str) -> IO[str]:
        parts = Path(os.path.normpath(name)).parts
        below = (zoo.joinpath(*parts[-count:]) for count in (3, 2, 1) if count <= len(parts))
        shipped = None if is_url(name) or Path(name).is_file() else next((p for p in below if p.is_file()), None)
        return PathManager.open(str(shipped or name), "r")

    CfgNode._open_cfg = classmethod(open_where_it_is)
    try:
        yield
    finally:
        CfgNode._open_cfg = opened


class YamlConfig:
    """A yacs config, `cfg`.

    Args:
        modules: those that `custom_imports` names. As the projects' scripts do, what they define as `add_…_config(cfg)`
            adds its keys before the file is read, and `build_lr_scheduler(cfg, optimizer)` makes the schedule.
    """

    resolved_name = "detectron2.yaml"

    def __init__(self, path: Path, overrides: Mapping[str, Any], modules: Sequence[ModuleType] = ()):
        self.path = path
        self.modules = modules
        self.cfg = get_cfg()
        added = {f: None for module in modules for name, f in vars(module).items() if _ADDS_KEYS.fullmatch(name)}
        for add_keys in added:
            add_keys(self.cfg)
        try:
            # the zoo's own say `!!python/object/apply:eval`; what lies in a checkpoint is plain, and whole
            is_saved = path.name == self.resolved_name
            if is_saved:
                _refuse_base(path)
            with _zoo_bases():
                self.cfg.merge_from_file(str(path), allow_unsafe=not is_saved)
        except UserError:
            raise
        except Exception as error:  # yaml's and yacs' own
            raise UserError(f"hyperparameters.config_file: {path}: {error}. Fix: correct the file") from error
        known = dict(_leaves(self.cfg))
        for key, value in overrides.items():
            if key not in known:
                raise UserError(f"hyperparameters.config_overrides: unknown key {key!r}{nearest(key, known)}")
            if isinstance(known[key], float) and type(value) is int:
                value = float(value)  # YAML's 1 for 1.0, which yacs refuses
            try:
                self.cfg.merge_from_list([key, value])
            except (AssertionError, KeyError, ValueError) as error:
                raise UserError(
                    f"hyperparameters.config_overrides: {error}. Fix: correct the key or its value"
                ) from error
        self.cfg.MODEL.DEVICE = "cpu"  # built on the host, and moved by the trial

    @property
    def input_scale(self) -> InputScale:
        inputs, sizes = self.cfg.INPUT, self.cfg.MODEL.ANCHOR_GENERATOR.SIZES
        return InputScale(min(map(min, sizes)), "anchor", inputs.MIN_SIZE_TEST or math.inf, inputs.MAX_SIZE_TEST)

    @property
    def weights(self) -> str:
        return self.cfg.MODEL.WEIGHTS

    @property
    def batch_size(self) -> int:
        return self.cfg.SOLVER.IMS_PER_BATCH

    @property
    def max_iter(self) -> int:
        return self.cfg.SOLVER.MAX_ITER

    @property
    def eval_period(self) -> int:
        return self.cfg.TEST.EVAL_PERIOD

    @property
    def checkpoint_period(self) -> int:
        return self.cfg.SOLVER.CHECKPOINT_PERIOD

    @property
    def learning_rate(self) -> float:
        return self.cfg.SOLVER.BASE_LR

    @property
    def warmup_iters(self) -> int:
        return self.cfg.SOLVER.WARMUP_ITERS

    @property
    def schedule_name(self) -> str:
        solver = self.cfg.SOLVER
        return f"{solver.LR_SCHEDULER_NAME}, steps {list(solver.STEPS)}, warm-up {solver.WARMUP_ITERS}"

    @property
    def mixed_precision(self) -> bool:
        return self.cfg.SOLVER.AMP.ENABLED

    @property
    def clips_gradients(self) -> bool:
        return self.cfg.SOLVER.CLIP_GRADIENTS.ENABLED

    @property
    def cudnn_benchmark(self) -> bool:
        return self.cfg.CUDNN_BENCHMARK

    @property
    def float32_precision(self) -> str:
        return self.cfg.FLOAT32_PRECISION

    find_unused_parameters, halves_gradients = False, False  # keys of Python configs

    @property
    def precise_bn_batches(self) -> int:
        return self.cfg.TEST.PRECISE_BN.NUM_ITER if self.cfg.TEST.PRECISE_BN.ENABLED else 0

    @property
    def augments_tests(self) -> bool:
        return self.cfg.TEST.AUG.ENABLED

    @property
    def train_set(self) -> TrainingSet:
        cfg = self.cfg
        samples = cfg.DATALOADER.SAMPLER_TRAIN
        check_sampler(samples, "DATALOADER.SAMPLER_TRAIN")
        return TrainingSet(
            names=tuple(cfg.DATASETS.TRAIN),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=tuple(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else (),
            group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            repeat_threshold=cfg.DATALOADER.REPEAT_THRESHOLD if samples == "RepeatFactorTrainingSampler" else None,
            repeat_sqrt=cfg.DATALOADER.REPEAT_SQRT,
            subset_ratio=cfg.DATALOADER.RANDOM_SUBSET_RATIO if samples == "RandomSubsetTrainingSampler" else None,
        )

    @property
    def val_names(self) -> tuple[str, ...]:
        return tuple(self.cfg.DATASETS.TEST)

    @property
    def val_proposal_files(self) -> tuple[str, ...]:
        return tuple(self.cfg.DATASETS.PROPOSAL_FILES_TEST) if self.cfg.MODEL.LOAD_PROPOSALS else ()

    @property
    def iou_types(self) -> tuple[str, ...]:
        model = self.cfg.MODEL
        on = {"segm": model.MASK_ON, "keypoints": model.KEYPOINT_ON}
        return ("bbox", *(name for name, is_on in on.items() if is_on))

    @property
    def keypoint_sigmas(self) -> tuple[float, ...]:
        return tuple(self.cfg.TEST.KEYPOINT_OKS_SIGMAS)

    scored_detections = None  # COCOEvaluator takes the number from Python configs only

    @property
    def polygon_masks(self) -> bool:
        return self.cfg.MODEL.MASK_ON and self.cfg.INPUT.MASK_FORMAT == "polygon"

    @property
    def detects_instances(self) -> bool:
        return self.cfg.MODEL.META_ARCHITECTURE not in ("SemanticSegmentor", "ProposalNetwork", "PanopticFPN")

    @property
    def semantic(self) -> bool:
        return self.cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"

    @property
    def rotated(self) -> bool:
        return "Rotated" in self.cfg.MODEL.ANCHOR_GENERATOR.NAME

    def scale_schedule(self, global_batch_size: int) -> None:
        # upstream's rule, for images instead of workers
        self.cfg.SOLVER.REFERENCE_WORLD_SIZE = self.batch_size
        self.cfg = DefaultTrainer.auto_scale_workers(self.cfg, global_batch_size)

    def set_length(self, batches: int) -> None:
        self.cfg.SOLVER.MAX_ITER = batches

    def class_counts(self) -> dict[str, int]:
        leaves = dict(_leaves(self.cfg))
        return {key: leaves[key] for key in _CLASS_COUNTS if key in leaves and self._uses(key)}

    def _uses(self, key: str) -> bool:
        model = self.cfg.MODEL
        architecture = model.META_ARCHITECTURE
        if key == "MODEL.RETINANET.NUM_CLASSES":
            return architecture == "RetinaNet"
        if key == "MODEL.SEM_SEG_HEAD.NUM_CLASSES":
            return architecture in _OF_STUFF
        if key == "MODEL.TENSOR_MASK.NUM_CLASSES":
            return architecture == "TensorMask"
        if key == "MODEL.POINT_HEAD.NUM_CLASSES":
            return "PointRend" in (model.SEM_SEG_HEAD if self.semantic else model.ROI_MASK_HEAD).NAME
        return architecture not in _WITHOUT_ROI_HEADS

    def set_class_count(self, key: str, count: int) -> None:
        self.cfg.merge_from_list([key, count])

    def mapper(self, training: bool, names: tuple[str, ...]) -> Any:
        cfg = self.cfg.clone()
        cfg.DATASETS.TRAIN = names
        if self.rotated:
            return RotatedMapper(cfg, is_train=training)
        if training and self.semantic and "SINGLE_CATEGORY_MAX_AREA" in cfg.INPUT.CROP:  # of PointRend and DeepLab
            return DatasetMapper(cfg, is_train=True, augmentations=_semantic_augmentations(cfg))
        return DatasetMapper(cfg, is_train=training)

    def build_model(self) -> nn.Module:
        return build_model(self.cfg)

    def with_test_augmentation(self, model: nn.Module) -> nn.Module:
        try:
            return GeneralizedRCNNWithTTA(self.cfg, model)
        except AssertionError as error:
            raise UserError(f"TEST.AUG.ENABLED: {error}. Fix: switch it off in config_overrides") from error

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.cfg, model)
        for group in optimizer.param_groups:
            group["foreach"] = None  # Detectron2's own choice and no word of the config: `fuse` finds the quickest
        return optimizer

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        cfg = self.cfg.clone()
        # a step at the very end, which upstream takes for an error, changes nothing any more
        cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
        build = next(
            (m.build_lr_scheduler for m in self.modules if hasattr(m, "build_lr_scheduler")), build_lr_scheduler
        )
        try:
            return build(cfg, optimizer)
        except ValueError as error:
            raise UserError(
                f"SOLVER.LR_SCHEDULER_NAME: {error}. Fix: name one of those, or a module that registers yours in "
                "custom_imports"
            ) from error

    def write(self, folder: Path) -> None:
        write_file(folder / self.resolved_name, redacted(self.cfg.dump()))


def _refuse_base(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and BASE_KEY in content:
        raise UserError(
            f"{path}: {BASE_KEY} names {content[BASE_KEY]!r}, and a checkpoint's config names no other file. Fix: give "
            "the config that it was trained with: --set hyperparameters.config_file=…"
        )


def _semantic_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The mapper with which the scripts of PointRend and DeepLab train semantic segmentation."""
    inputs = cfg.INPUT
    augmentations = [T.ResizeShortestEdge(inputs.MIN_SIZE_TRAIN, inputs.MAX_SIZE_TRAIN, inputs.MIN_SIZE_TRAIN_SAMPLING)]
    if crop := inputs.CROP if inputs.CROP.ENABLED else None:
        ignored = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignored)
        )
    if inputs.get("COLOR_AUG_SSD"):
        from detectron2.projects.point_rend import ColorAugSSDTransform

        augmentations.append(ColorAugSSDTransform(img_format=inputs.FORMAT))
    return [*augmentations, T.RandomFlip()]


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
