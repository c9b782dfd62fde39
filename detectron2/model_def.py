"""Detectron2's detectors as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.config.experiment import Sections
from shared.launch import main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(Detectron2Hyperparameters))

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import Dataset

from detectron2_files import COMPILED
from detectron2_files.config import (
    COCO_CLASSES,
    config_of_checkpoint,
    flatten,
    load_detectron2_config,
    set_class_counts,
    stated_class_count,
)
from detectron2_files.data import (
    TRAIN_NAME,
    VAL_NAME,
    CocoSamples,
    MapperTransform,
    RegisteredData,
    RegisteredSamples,
    as_coco_paths,
    categories_of,
    check_for_rotated_evaluation,
    check_for_training,
    check_keypoint_flips,
    collate,
    describe,
    folder_of,
    inputs_of,
    open_registered,
    read_proposals,
    register_json,
    registered_samples,
    trained_images,
    unaugmented,
)
from detectron2_files.evaluation import OwnEvaluator, OwnResult, detect, own_evaluator
from detectron2_files.model import (
    PYTHON_STATE,
    apply_backend_options,
    build_model,
    build_optimizer,
    compiled_parts,
    group_processes_of_machine,
    keep_detections,
    losses_of_step,
    measure_batch_statistics,
    pool_in_float32,
    take_up_switches,
)
from detectron2_files.pixels import with_quick_resizing
from detectron2_files.weights import categories_of_checkpoint, find_weights, load_weights_into, zoo_weights
from shared.config.schema import PUBLISHED, Length, Split, parse_section
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.dataset import CocoDetection
from shared.data.images import InputScale
from shared.data.loading import Batch, to_device
from shared.data.open import SplitData, check_evaluable, check_masks, check_trainable, open_split
from shared.data.samplers import aspect_ratio_groups
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.library import COCO_CATEGORIES
from shared.training.switches import autocast
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


class Detectron2Trial(DetectionTrial):
    """Detectron2, over the package detectron2.

    Attributes:
        detectron2_config: the resolved config, of either kind.
        evaluates_coco: whether validation is by the shared evaluator; else by one of Detectron2's own.
    """

    hyperparameters_class = Detectron2Hyperparameters
    for_training, slots = True, 1
    warned_of_masks = False
    without_pretrained: ClassVar = {"use_pretrained": False, "weights": ""}
    python_attributes = PYTHON_STATE
    optimizer_key = "optimizer of the Detectron2 config"

    # --- the config -----------------------------------------------------------------------------------

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **cls.without_pretrained,
            "config_file": str(config_of_checkpoint(checkpoint)),
            "config_overrides": {},
            "scale_schedule": False,
            "functions_of": own.get("functions_of") or own.get("config_file"),
        }

    @classmethod
    def input_scale(cls, hparams: Detectron2Hyperparameters) -> InputScale | None:
        return load_detectron2_config(hparams, Path(__file__).parent).input_scale

    def read_own_config(self) -> None:
        self.detectron2_config = config = load_detectron2_config(self.hparams, Path(__file__).parent)
        if self.hparams.global_batch_size is None:
            slots = 1 if self.for_training else self.slots  # to detect, any number of them will do
            self.hparams.global_batch_size = -(-config.batch_size // slots) * slots
        if (
            self.for_training
            and self.data.repeat_threshold is not None
            and config.train_set.repeat_threshold is not None
        ):
            raise UserError(
                "data.repeat_threshold: the config repeats images itself, by its RepeatFactorTrainingSampler; take one "
                "of the two out"
            )
        if config.mixed_precision:
            self.fp16_key = "SOLVER.AMP.ENABLED, or train.amp.enabled, of the config"
        take_up_switches(config, self.hparams)
        if self.hparams.scale_schedule:
            config.scale_schedule(self.hparams.global_batch_size)
        if config.augments_tests and self.for_training:
            logger.info(
                "TEST.AUG: `evaluate` and `predict` detect in augmented images; validations in a training do not"
            )
        apply_backend_options(config, self.for_training)
        self.find_unused_parameters = config.find_unused_parameters
        if self.slots > 1:
            group_processes_of_machine(self.context.distributed.local_size)
        self.iou_types = config.iou_types
        self.evaluates_coco = self._val_paths() is not None
        if self.validates_loss and not self.evaluates_coco:
            raise UserError(
                "hyperparameters.validation_loss: the config is evaluated by one of Detectron2's own evaluators, whose "
                "data have no targets; leave it out"
            )

    def _val_paths(self) -> tuple[str, str] | None:
        """The COCO files that the shared evaluator validates on; None where Detectron2's own does."""
        config = self.detectron2_config
        if config.rotated or not config.detects_instances:
            return None
        if not self.data.reads_files:
            return "", ""
        if self.data.val is not None:
            return self.data.val.annotations, self.data.val.images
        if len(config.val_names) != 1:
            raise UserError(
                f"data.val is missing, and the config names {len(config.val_names)} data sets to validate on "
                f"({', '.join(config.val_names) or 'none'}); give data.val, or override it with one"
            )
        return as_coco_paths(config.val_names[0])

    def default_lengths(self) -> dict[str, Length]:
        config = self.detectron2_config
        lengths = {
            "searcher.max_length": config.max_iter,
            "min_validation_period": config.eval_period,
            "min_checkpoint_period": config.checkpoint_period,
        }
        return {key: Length("batches", count) for key, count in lengths.items() if count}

    def reported_metrics(self) -> list[str] | None:
        return super().reported_metrics() if self.evaluates_coco else None

    def save_own_config(self, folder: Path) -> None:
        self.detectron2_config.write(folder)

    # --- data -----------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[SplitData | RegisteredData, SplitData | RegisteredData]:
        config = self.detectron2_config
        train, val = self._open_train(), self.open_val()
        if isinstance(train, RegisteredData):
            mapper = self._mapper(True, train.names)
            self.train_samples: Dataset = registered_samples(train, mapper, config.train_set, self.seed)
            return train, val
        check_trainable(train.annotations)
        check_for_training(train.annotations, config.iou_types, config.polygon_masks)
        if isinstance(val, SplitData):
            check_same_categories(train.annotations, val.annotations)
            check_evaluable(val.annotations)
            if self.validates_loss:
                check_for_training(val.annotations, config.iou_types, config.polygon_masks, "val")
            elif "segm" in self.iou_types:
                check_masks(val.annotations, "val")
        mapper = self._mapper(True, describe(train.categories))
        swapped = check_keypoint_flips(mapper, train.categories) if "keypoints" in self.iou_types else ""
        if swapped and self.rank == 0:
            logger.info("keypoints that a horizontal flip swaps: %s", swapped)
        self.train_samples = CocoSamples(train, mapper, config.train_set, self.seed, self.bad_images)
        return train, val

    def _open_train(self) -> SplitData | RegisteredData:
        config, names = self.detectron2_config, self.detectron2_config.train_set.names
        if self.evaluates_coco and (self.data.train is not None or not self.data.reads_files):
            return open_split(self.data, "train")
        if self.data.train is not None:
            register_json(TRAIN_NAME, self.data.train.annotations, self.data.train.images)
            return open_registered((TRAIN_NAME,), config.semantic, config.train_set)
        paths = as_coco_paths(names[0]) if self.evaluates_coco and len(names) == 1 else None
        if paths:
            return open_split(replace(self.data, train=Split(*paths)), "train")
        if not names:
            raise UserError("data.train is missing, and the config names no data set to train on; give data.train")
        return open_registered(names, config.semantic, config.train_set)

    def open_val(self) -> SplitData | RegisteredData:
        if self.evaluates_coco:
            paths = self._val_paths()
            data = replace(self.data, val=Split(*paths)) if self.data.reads_files else self.data
            return open_split(data, "val")
        names = self.detectron2_config.val_names
        if self.data.val is None and len(names) > 1:
            raise UserError(
                f"the config names {len(names)} data sets to validate on ({', '.join(names)}), which would be scored "
                f"as if they were {names[0]}; override it with one"
            )
        if self.data.val is not None:
            register_json(VAL_NAME, self.data.val.annotations, self.data.val.images)
            names = (VAL_NAME,)
        config = self.detectron2_config
        opened = open_registered(names, config.semantic, proposal_files=config.val_proposal_files)
        if config.rotated:
            check_for_rotated_evaluation(opened)
        return opened

    def known_categories(self) -> list[dict]:
        """Those of the checkpoint that the weights are; else the data's or the config's metadata's, whichever has as
        many as the model."""
        config = self.detectron2_config
        source = self._weights()
        if source is not None and (of_checkpoint := categories_of_checkpoint(source[0])) is not None:
            return of_checkpoint
        named = (config.val_names and categories_of(config.val_names[0], config.semantic)) or COCO_CATEGORIES
        stated = stated_class_count(config)
        if self.data.has_val_annotations:
            in_data = self.open_val().categories
            free = stated is not None and stated[1] == COCO_CLASSES and stated[0] not in self._overridden
            if stated is None or free or len(in_data) == stated[1]:
                return in_data
        if stated is None or len(named) == stated[1] or config.semantic:
            return named
        return [{"id": i + 1, "name": f"class {i + 1}"} for i in range(stated[1])]

    @property
    def _overridden(self) -> list[str]:
        return list(flatten(self.hparams.config_overrides))

    def training_groups(self) -> np.ndarray:
        if not self.detectron2_config.train_set.group_by_aspect_ratio:
            return np.zeros(len(self.train_samples), dtype=np.uint8)
        return aspect_ratio_groups(*self.train_samples.sizes())

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        return self.train_samples.labels()

    def training_dataset(self) -> Dataset:
        return self.train_samples

    def evaluation_dataset(self, data: SplitData | RegisteredData) -> Dataset:
        self.detects_for_own_evaluator = isinstance(data, RegisteredData)
        if isinstance(data, RegisteredData):
            return RegisteredSamples(data.dicts, self._mapper(False, data.names), self.seed)
        mapper = self._mapper(False, describe(self.categories))
        transform = MapperTransform(mapper, False, self._val_proposals(data), folder_of(data))
        return CocoDetection(data.annotations, data.images, transform, self.seed, False, self.bad_images, bytes)

    def _mapper(self, training: bool, names: tuple[str, ...]) -> Any:
        return with_quick_resizing(self.detectron2_config.mapper(training, names), self.data.fast_images)

    def _val_proposals(self, data: SplitData) -> dict[int, dict[str, Any]]:
        return read_proposals(self.detectron2_config.val_proposal_files, data.annotations.image_ids)

    def loss_transform(self, data: SplitData) -> MapperTransform:
        names = describe(self.categories)
        mapper = unaugmented(*(self._mapper(training, names) for training in (True, False)))
        return MapperTransform(mapper, True, self._val_proposals(data), folder_of(data))

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        return trained_images(annotations, self.detectron2_config.train_set)

    @property
    def batches_of_one_size(self) -> bool:
        return self.evaluates_coco and self.batches_evaluations

    @property
    def evaluation_batch_size(self) -> int:
        return self.per_slot_batch_size if self.batches_of_one_size else 1

    def build_evaluator(self, data: SplitData | RegisteredData) -> CocoEvaluator | OwnEvaluator:
        if isinstance(data, RegisteredData):
            evaluator = own_evaluator(data.names[0], self.iou_types, self.detectron2_config.rotated)
            try:
                return OwnEvaluator(evaluator, self.rank < len(data.dicts), self.context.distributed.gather)
            except AssertionError as error:  # Cityscapes' on several machines
                raise UserError(f"the data set {data.names[0]} cannot be evaluated here: {error}") from error
        sigmas = self.detectron2_config.keypoint_sigmas or None
        return CocoEvaluator(
            data.annotations,
            self.iou_types,
            keypoint_sigmas=sigmas,
            gather=self.context.distributed.gather,
            max_detections=self.hparams.max_detections or self.detectron2_config.scored_detections,
        )

    @classmethod
    def scored_detections(cls, hyperparameters: Mapping[str, Any]) -> int | None:
        given = super().scored_detections(hyperparameters)
        if given is not None or not hyperparameters.get("config_file"):
            return given
        hparams = parse_section(hyperparameters, cls.hyperparameters_class, "hyperparameters")
        return load_detectron2_config(hparams, Path(__file__).parent).scored_detections

    def collate(self, training: bool) -> Callable[[list], Batch]:
        return collate

    # --- model and optimizer --------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        config = self.detectron2_config
        counts = {"things": len(self.categories)}
        if self.for_training and isinstance(self.train_data, RegisteredData):
            counts = self.train_data.class_counts
        set_class_counts(config, counts, self._overridden)
        model = build_model(config)
        if self.hparams.max_detections is not None:
            keep_detections(model, self.hparams.max_detections)
        if self.hparams.amp == "bf16":
            pool_in_float32(model)
        if self.first_batch == 0 and (source := self._weights()):
            load_weights_into(model, *source, None if self.for_training else config.class_counts())
        return model

    def _weights(self) -> tuple[str, str] | None:
        """What to start from, and the key that says so; None for the initial weights."""
        hparams, config = self.hparams, self.detectron2_config
        if hparams.weights == PUBLISHED:
            return zoo_weights(config.path), "hyperparameters.weights"
        source = config.weights if hparams.weights is None else hparams.weights
        if not source or (not self.for_training and _is_backbone(source)):
            return None
        key = "hyperparameters.weights" if hparams.weights else "the config's weights"
        return find_weights(source, key, (Path(__file__).parent.absolute(), config.path.parent)), key

    def check_pretrained(self) -> None:
        if self._weights() is None:
            raise UserError(
                "an untrained model detects nothing; give --checkpoint, --set hyperparameters.weights=published, or "
                "other weights in its place"
            )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self.detectron2_config, model)

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        return compiled_parts(model)

    def autocast(self) -> torch.autocast:
        # as Detectron2, which detects in float32
        return autocast(self.hparams.amp if self.plain_model.training else None, self.context.device)

    def prepare_schedule(self) -> None:
        if self.slots > 1 and self.detectron2_config.halves_gradients:
            self.model.register_comm_hook(None, fp16_compress_hook)
        self.detectron2_config.set_length(self.total_batches)
        self.lr_scheduler = self.detectron2_config.lr_scheduler(self.optimizer)

    def warmup_batches(self) -> float:
        return self.detectron2_config.warmup_iters

    def before_batch(self, number: int) -> None:
        self.lr_scheduler.last_epoch = number
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_lr(), strict=True):
            group["lr"] = lr

    def summary(self) -> list[tuple[str, object]]:
        config = self.detectron2_config
        return [
            ("config", self.hparams.config_file),
            ("model", f"{type(self.plain_model).__name__}, {len(self.categories)} categories"),
            ("weights", (self._weights() or ("initial",))[0] if self.first_batch == 0 else "the checkpoint's"),
            ("training data", f"{self._training_data_name()}, {len(self.train_samples)} samples"),
            ("validation", ", ".join(self.iou_types) if self.evaluates_coco else "by Detectron2's own evaluator"),
            ("optimizer", f"{type(self.optimizer).__name__}, lr {config.learning_rate:g}"),
            ("schedule", config.schedule_name),
            ("operations", "compiled (detectron2._C)" if COMPILED else "PyTorch and torchvision"),
        ]

    def _training_data_name(self) -> str:
        if isinstance(self.train_data, RegisteredData):
            return ", ".join(self.train_data.names)
        return str(self.train_data.annotations.path or "fake")

    def synchronize_buffers(self) -> None:
        if count := self.detectron2_config.precise_bn_batches:
            loader = self.training_batch_loader(self.batches_trained)
            inputs = (inputs_of(to_device(batch, self.context.device)) for batch in loader)
            measure_batch_statistics(self.plain_model, inputs, count)
        super().synchronize_buffers()

    # --- the step -------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        losses = losses_of_step(model, inputs_of(batch), self.batches_trained)
        return {**losses, "loss": sum(losses.values())}

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections | OwnResult]:
        inputs = inputs_of(batch)
        if self.detectron2_config.augments_tests and not self.for_training:
            model = self.detectron2_config.with_test_augmentation(model)
            inputs = [{**given, "image": given["image"].cpu()} for given in inputs]
        if not self.detects_for_own_evaluator:
            detected = list(detect(model, inputs))
            self._warn_of_unscored_masks(detected)
            return detected
        return [
            OwnResult({key: value for key, value in given.items() if key != "image"}, output)
            for given, output in zip(inputs, model(inputs), strict=True)
        ]

    def _warn_of_unscored_masks(self, detected: list[Detections]) -> None:
        if self.evaluates_coco and "segm" not in self.iou_types and any(found.masks is not None for found in detected):
            if not self.warned_of_masks and self.rank == 0:
                logger.warning(
                    "the model detects masks, and no `mask_head` of its config says so: the boxes alone are evaluated"
                )
            self.warned_of_masks = True


def _is_backbone(source: str) -> bool:
    return "ImageNetPretrained" in source


if __name__ == "__main__":
    main(Detectron2Trial, command)
