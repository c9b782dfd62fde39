"""Detectron2's detectors as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from detectron2_hyperparameters import Detectron2Data, Detectron2Hyperparameters
from shared.config.experiment import Sections
from shared.launch import main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(Detectron2Hyperparameters, Detectron2Data))

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import Dataset

from detectron2_files import COMPILED, keypoints, opening, registered
from detectron2_files import config as configs
from detectron2_files import data as data_sets
from detectron2_files import model as models
from detectron2_files.class_weights import weigh_categories
from detectron2_files.evaluation import OwnEvaluator, OwnResult, detect, own_evaluator, warn_of_masks
from detectron2_files.pixels import with_quick_resizing
from detectron2_files.weights import categories_of_checkpoint, load_weights_into, start_of
from shared.config.file import flattened
from shared.config.schema import Length, parse_section
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import CocoDetection
from shared.data.images import InputScale
from shared.data.loading import Batch, aspect_ratio_groups, to_device
from shared.data.open import SplitData
from shared.errors import UserError, count_of
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
    """

    hyperparameters_class = Detectron2Hyperparameters
    data_class = Detectron2Data
    for_training, slots = True, 1
    warned_of_masks = False
    without_pretrained: ClassVar = {"use_pretrained": False, "weights": ""}
    python_attributes = models.PYTHON_STATE
    weighs_categories = True
    optimizer_key = "optimizer of the Detectron2 config"

    # --- the config -----------------------------------------------------------------------------------

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **cls.without_pretrained,
            "config_file": str(configs.config_of_checkpoint(checkpoint)),
            "config_overrides": {},
            "scale_schedule": False,
            "functions_of": own.get("functions_of") or own.get("config_file"),
        }

    @classmethod
    def input_scale(cls, hparams: Detectron2Hyperparameters) -> InputScale | None:
        return configs.load_detectron2_config(hparams, Path(__file__).parent).input_scale

    def read_own_config(self) -> None:
        self.detectron2_config = config = configs.load_detectron2_config(self.hparams, Path(__file__).parent)
        self.hparams.global_batch_size = self.given_batch_size(lambda: config.batch_size)
        if config.mixed_precision:
            self.fp16_key = "SOLVER.AMP.ENABLED, or train.amp.enabled, of the config"
        models.take_up_switches(config, self.hparams)
        if self.hparams.scale_schedule:
            config.scale_schedule(self.hparams.global_batch_size)
        if config.augments_tests and self.for_training:
            logger.info("TEST.AUG: `evaluate` and `predict` detect in augmented images; validations do not")
        models.apply_backend_options(config, self.for_training)
        self.find_unused_parameters = config.find_unused_parameters
        if self.slots > 1:
            models.group_processes_of_machine(self.context.distributed.local_size)
        self.iou_types = config.iou_types
        self.val_paths = opening.coco_paths_of_val(config, self.data)
        self.evaluates_coco = self.val_paths is not None

    def repeats_by_itself(self) -> str | None:
        repeats = self.detectron2_config.train_set.repeat_threshold is not None
        return "its RepeatFactorTrainingSampler" if repeats else None

    def default_lengths(self) -> dict[str, Length]:
        config = self.detectron2_config
        lengths = {
            "searcher.max_length": config.max_iter,
            "min_validation_period": config.eval_period,
            "min_checkpoint_period": config.checkpoint_period,
        }
        return {key: Length("batches", count) for key, count in lengths.items() if count}

    def save_own_config(self, folder: Path) -> None:
        self.detectron2_config.write(folder)

    # --- data -----------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[opening.Opened, opening.Opened]:
        config = self.detectron2_config
        train, val = opening.open_train(config, self.data, self.evaluates_coco), self.open_val()
        if isinstance(train, registered.RegisteredData):
            mapper = self._mapper(True, train.names)
            self.train_samples: Dataset = registered.registered_samples(train, mapper, config.train_set, self.seed)
            return train, val
        opening.check_together(config, train, val, self.validates_loss)
        mapper = self._mapper(True, keypoints.describe(train.categories))
        swapped = keypoints.check_keypoint_flips(mapper, train.categories) if "keypoints" in self.iou_types else ""
        if swapped and self.rank == 0:
            logger.info("keypoints that a horizontal flip swaps: %s", swapped)
        self.train_samples = data_sets.CocoSamples(train, mapper, config.train_set, self.seed, self.bad_images)
        return train, val

    def open_val(self) -> opening.Opened:
        return opening.open_val(self.detectron2_config, self.data, self.val_paths)

    def known_categories(self) -> list[dict]:
        """Those of the checkpoint that the weights are; else the data's or the config's metadata's, whichever has as
        many as the model."""
        config = self.detectron2_config
        source = self._weights()
        if source is not None and (of_checkpoint := categories_of_checkpoint(source[0])) is not None:
            return of_checkpoint
        named = (config.val_names and registered.categories_of(config.val_names[0], config.semantic)) or COCO_CATEGORIES
        stated = configs.stated_class_count(config)
        if self.data.has_val_annotations:
            in_data = self.open_val().categories
            given = flattened(self.hparams.config_overrides)
            free = stated is not None and stated[1] == configs.COCO_CLASSES and stated[0] not in given
            if stated is None or free or len(in_data) == stated[1]:
                return in_data
        if stated is None or len(named) == stated[1] or config.semantic:
            return named
        return [{"id": i + 1, "name": f"class {i + 1}"} for i in range(stated[1])]

    def training_groups(self) -> np.ndarray:
        if not self.detectron2_config.train_set.group_by_aspect_ratio:
            return np.zeros(len(self.train_samples), dtype=np.uint8)
        return aspect_ratio_groups(*self.train_samples.sizes())

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        return self.train_samples.labels()

    def training_dataset(self) -> Dataset:
        return self.train_samples

    def evaluation_dataset(self, data: opening.Opened) -> Dataset:
        self.detects_for_own_evaluator = isinstance(data, registered.RegisteredData)
        if isinstance(data, registered.RegisteredData):
            return registered.RegisteredSamples(data.dicts, self._mapper(False, data.names), self.seed)
        mapper = self._mapper(False, keypoints.describe(self.categories))
        transform = data_sets.MapperTransform(mapper, False, self._val_proposals(data), data_sets.folder_of(data))
        return CocoDetection(data.annotations, data.images, transform, self.seed, False, self.bad_images, bytes)

    def _mapper(self, training: bool, names: tuple[str, ...]) -> Any:
        return with_quick_resizing(self.detectron2_config.mapper(training, names), self.data.fast_images)

    def _val_proposals(self, data: SplitData) -> dict[int, dict[str, Any]]:
        return data_sets.read_proposals(self.detectron2_config.val_proposal_files, data.annotations.image_ids)

    def loss_transform(self, data: SplitData) -> data_sets.MapperTransform:
        names = keypoints.describe(self.categories)
        mapper = data_sets.unaugmented(*(self._mapper(training, names) for training in (True, False)))
        return data_sets.MapperTransform(mapper, True, self._val_proposals(data), data_sets.folder_of(data))

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        return data_sets.trained_images(annotations, self.detectron2_config.train_set)

    @property
    def batches_of_one_size(self) -> bool:
        return self.evaluates_coco and self.batches_evaluations

    @property
    def evaluation_batch_size(self) -> int:
        return self.per_slot_batch_size if self.batches_of_one_size else 1

    @property
    def max_iou(self) -> float:
        return models.max_iou(self.plain_model)

    def build_evaluator(self, data: opening.Opened) -> CocoEvaluator | OwnEvaluator:
        limit = self.hparams.max_detections or self.detectron2_config.scored_detections
        if isinstance(data, registered.RegisteredData):
            evaluator = own_evaluator(data.names[0], self.iou_types, self.detectron2_config.rotated, limit)
            return OwnEvaluator(evaluator, self.rank < len(data.dicts), self.context.distributed.gather)
        sigmas, gather = self.detectron2_config.keypoint_sigmas or None, self.context.distributed.gather
        return CocoEvaluator(
            data.annotations, self.iou_types, keypoint_sigmas=sigmas, gather=gather, max_detections=limit
        )

    @classmethod
    def scored_detections(cls, hyperparameters: Mapping[str, Any]) -> int | None:
        given = super().scored_detections(hyperparameters)
        if given is not None or not hyperparameters.get("config_file"):
            return given
        hparams = parse_section(hyperparameters, cls.hyperparameters_class, "hyperparameters")
        return configs.load_detectron2_config(hparams, Path(__file__).parent).scored_detections

    def collate(self, training: bool) -> Callable[[list], Batch]:
        return data_sets.collate

    # --- model and optimizer --------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        config = self.detectron2_config
        counts = {"things": len(self.categories)}
        if self.for_training and isinstance(self.train_data, registered.RegisteredData):
            counts = self.train_data.class_counts
        configs.set_class_counts(config, counts, flattened(self.hparams.config_overrides))
        model = models.build_model(config)
        if self.hparams.max_detections is not None:
            models.keep_detections(model, self.hparams.max_detections)
        if self.class_weights is not None:
            weigh_categories(model, self.class_weights)
        if self.hparams.amp == "bf16":
            models.pool_in_float32(model)
        if self.first_batch == 0 and (source := self._weights()):
            load_weights_into(model, *source, None if self.for_training else config.class_counts())
        return model

    def _weights(self) -> tuple[str, str] | None:
        """What to start from, and the key that names it; None for the initial weights."""
        submitted = Path(__file__).parent.absolute()
        return start_of(self.hparams.weights, self.detectron2_config, self.for_training, submitted)

    def exportable(self) -> nn.Module:
        from detectron2_files.export import ExportableDetectron2

        return ExportableDetectron2(self.evaluation_model, self._mapper(False, keypoints.describe(self.categories)))

    def check_pretrained(self) -> None:
        if self._weights() is None:
            raise UserError(
                "an untrained model detects nothing. Fix: give --checkpoint, or weights: --set "
                "hyperparameters.weights=published"
            )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return models.build_optimizer(self.detectron2_config, model)

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        return models.compiled_parts(model)

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
        config, data = self.detectron2_config, self.train_data
        is_registered = isinstance(data, registered.RegisteredData)
        named = ", ".join(data.names) if is_registered else data.annotations.path or "fake"
        return [
            ("config", self.hparams.config_file),
            ("model", f"{type(self.plain_model).__name__}, {count_of(len(self.categories), 'category')}"),
            ("weights", (self._weights() or ("initial",))[0] if self.first_batch == 0 else "the checkpoint's"),
            ("training data", f"{named}, {count_of(len(self.train_samples), 'sample')}"),
            ("validation", ", ".join(self.iou_types) if self.evaluates_coco else "by Detectron2's own evaluator"),
            ("optimizer", f"{type(self.optimizer).__name__}, lr {config.learning_rate:g}"),
            ("schedule", config.schedule_name),
            ("operations", "compiled (detectron2._C)" if COMPILED else "PyTorch and torchvision"),
        ]

    def synchronize_buffers(self) -> None:
        if count := self.detectron2_config.precise_bn_batches:
            loader = self.training_batch_loader(self.batches_trained)
            inputs = (data_sets.inputs_of(to_device(batch, self.context.device)) for batch in loader)
            models.measure_batch_statistics(self.plain_model, inputs, count)
        super().synchronize_buffers()

    # --- the step -------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        losses = models.losses_of_step(model, data_sets.inputs_of(batch), self.batches_trained)
        return {**losses, "loss": sum(losses.values())}

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections | OwnResult]:
        inputs = data_sets.inputs_of(batch)
        if self.detectron2_config.augments_tests and not self.for_training:
            model = self.detectron2_config.with_test_augmentation(model)
            inputs = [{**given, "image": given["image"].cpu()} for given in inputs]
        if not self.detects_for_own_evaluator:
            detected = list(detect(model, inputs))
            if self.rank == 0 and self.evaluates_coco and "segm" not in self.iou_types and not self.warned_of_masks:
                self.warned_of_masks = warn_of_masks(detected)
            return detected
        return [
            OwnResult({key: value for key, value in given.items() if key != "image"}, output)
            for given, output in zip(inputs, model(inputs), strict=True)
        ]


if __name__ == "__main__":
    main(Detectron2Trial, command)
