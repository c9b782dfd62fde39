"""MMDetection's detectors as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.experiment import Sections
from shared.launch import main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(MMDetectionHyperparameters, MMDetectionData))

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdetection_files import config as configs
from mmdetection_files import config_fields as fields
from mmdetection_files import data as data_sets
from mmdetection_files import evaluation, opening, operations, own_data, pipelines, repeating
from mmdetection_files import model as models
from mmdetection_files.class_weights import weigh_categories
from mmdetection_files.hooks import EMA_HOOKS, MomentumEma, StepRunner, hook_config, mode_switch
from mmdetection_files.pixels import Normalization
from mmdetection_files.receptive_field import init_receptive_fields, write_structure
from mmdetection_files.saved_config import write_resolved
from mmdetection_files.switches import take_up_switches
from shared.config.file import find_path
from shared.config.schema import PUBLISHED, parse_section
from shared.data.annotations import CocoAnnotations
from shared.data.dataset import CocoDetection
from shared.data.images import InputScale
from shared.data.loading import Batch, TrainingBatchSampler
from shared.data.open import SplitData
from shared.errors import UserError, count_of
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.library import COCO_CATEGORIES
from shared.training.switches import AveragedWeights
from shared.training.trial import DetectionTrial


class MMDetectionTrial(DetectionTrial):
    """MMDetection 2.28, built on the packages mmdet and mmcv.

    Attributes:
        mmdet_config: the resolved config.
    """

    hyperparameters_class = MMDetectionHyperparameters
    data_class = MMDetectionData
    python_attributes = models.PYTHON_STATE
    optimizer_key = "optimizer of the MMDetection config"
    pretrained_categories: ClassVar = COCO_CATEGORIES
    weighs_categories = True

    # --- the config -----------------------------------------------------------------------------------

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        return configs.hyperparameters_of_checkpoint(checkpoint, own, Path(__file__).parent)

    @classmethod
    def scored_detections(cls, hyperparameters: Mapping[str, Any]) -> int | None:
        given = super().scored_detections(hyperparameters)
        if given is not None or not hyperparameters.get("config_file"):
            return given
        hparams = parse_section(hyperparameters, cls.hyperparameters_class, "hyperparameters")
        return evaluation.scored_detections(configs.load_mmdet_config(hparams, Path(__file__).parent))

    @classmethod
    def input_scale(cls, hparams: MMDetectionHyperparameters) -> InputScale | None:
        return fields.input_scale(configs.load_mmdet_config(hparams, Path(__file__).parent))

    def read_own_config(self) -> None:
        submitted = Path(__file__).parent
        self.mmdet_config = configs.load_mmdet_config(self.hparams, submitted)
        client = fields.file_client_of(self.mmdet_config)
        if client is not None and self.data.backend == "disk" and self.data.file_client_args is None:
            self.data = replace(self.data, file_client_args=client)
        fields.set_paths(self.mmdet_config, self.data, submitted)
        places = (submitted, *self.experiment.places)
        fields.find_weights_files(self.mmdet_config, places)
        if self.hparams.weights is None and self.for_training and self.mmdet_config.get("load_from"):
            self.hparams.weights = self.mmdet_config.load_from
            self.hparams.weights_key = "load_from of the MMDetection config"
        elif self.hparams.weights:
            self.hparams.weights = str(find_path(self.hparams.weights, places) or self.hparams.weights)
        if self.mmdet_config.get("cudnn_benchmark"):
            torch.backends.cudnn.benchmark = True
        self.hparams.global_batch_size = self.given_batch_size(lambda: fields.own_batch_size(self.mmdet_config))
        fields.scale_lr(self.mmdet_config, self.hparams)
        if self.mmdet_config.get("fp16"):
            self.fp16_key = "fp16 of the MMDetection config"
        take_up_switches(self.mmdet_config, self.hparams)
        self.find_unused_parameters = self.mmdet_config.get("find_unused_parameters", False)
        self.proposes = self.mmdet_config.model.type == "RPN"
        self.iou_types, self.evaluates_coco = opening.how_to_evaluate(self.mmdet_config, self.data)
        if self.evaluates_coco:
            evaluation.check_evaluation(self.mmdet_config)

    def repeats_by_itself(self) -> str | None:
        return repeating.repeats_by_itself(self.mmdet_config.data)

    def default_lengths(self) -> dict[str, Any]:
        return fields.default_lengths(self.mmdet_config)

    def validation_times(self) -> Any:
        return fields.validation_times(self.mmdet_config)

    def save_own_config(self, folder: Path) -> None:
        write_structure(self.plain_model, self.mmdet_config, folder)
        write_resolved(self.mmdet_config, folder)

    # --- data -----------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[Any, Any]:
        train, self.train_samples = opening.open_train(self.mmdet_config, self.data, self.bad_images)
        val = self.open_val()
        trains_masks = pipelines.trains_masks(self.mmdet_config)
        evaluates_masks = "segm" in self.iou_types or (self.validates_loss and trains_masks)
        opening.check_together(train, val, trains_masks, evaluates_masks)
        return train[0], val

    def open_val(self) -> Any:
        return opening.open_val(self.mmdet_config, self.data, self.evaluates_coco, self.proposes)

    def training_groups(self) -> np.ndarray:
        return np.asarray(getattr(self.train_samples, "flag", np.zeros(len(self.train_samples), dtype=np.uint8)))

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        return repeating.labels_of_samples(self.train_samples)

    def training_batches(self, first_batch: int | None = None) -> TrainingBatchSampler:
        by_class = (self.mmdet_config.data.get("train_dataloader") or {}).get("class_aware_sampler")
        if by_class is None:
            return super().training_batches(first_batch)
        return repeating.ClassAwareBatchSampler(
            self.images_of_classes,
            by_class.get("num_sample_class", 1),
            self.training_groups(),
            self.per_slot_batch_size,
            self.seed,
            self.rank,
            self.slots,
            self.first_batch if first_batch is None else first_batch,
        )

    @cached_property
    def images_of_classes(self) -> list[np.ndarray]:
        return repeating.images_of_classes(self.train_samples)

    def training_dataset(self) -> Dataset:
        return data_sets.TrainingSamples(self.train_samples, self.seed, self.mode_switch)

    def evaluation_dataset(self, data: SplitData | own_data.OwnData) -> Dataset:
        self.detects_for_own_dataset = isinstance(data, own_data.OwnData)
        if isinstance(data, own_data.OwnData):
            return own_data.OwnEvaluationSamples(data.dataset)
        leaf = fields.leaves(self.mmdet_config.data.val)[0]
        pipeline = pipelines.test_pipeline(leaf)
        transform = pipelines.EvaluationTransform(pipeline, leaf, data.images, self.data.fast_images)
        decode = pipelines.decoder(pipeline[0])
        return CocoDetection(data.annotations, data.images, transform, self.seed, False, self.bad_images, decode)

    def loss_transform(self, data: SplitData) -> pipelines.LossTransform:
        return pipelines.loss_transform(self.mmdet_config, data.images, self.data.fast_images)

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        return data_sets.trained_images(annotations, fields.leaves(self.mmdet_config.data.train)[0])

    @property
    def batches_of_one_size(self) -> bool:
        pipeline = fields.leaves(self.mmdet_config.data.val)[0]["pipeline"]
        plain = self.evaluates_coco and not pipelines.augments(pipeline)
        return plain and not self._own_evaluation_batch_size and self.batches_evaluations

    @property
    def evaluation_batch_size(self) -> int:
        return self._own_evaluation_batch_size or (self.per_slot_batch_size if self.batches_of_one_size else 1)

    @property
    def _own_evaluation_batch_size(self) -> int | None:
        return self.mmdet_config.data.get("val_dataloader", {}).get("samples_per_gpu")

    @property
    def max_iou(self) -> float:
        return evaluation.max_iou(self.mmdet_config)

    def build_evaluator(self, data: SplitData | own_data.OwnData) -> CocoEvaluator | evaluation.OwnEvaluator:
        if isinstance(data, SplitData):
            return super().build_evaluator(data)
        return evaluation.OwnEvaluator(
            data.dataset, evaluation.own_arguments(self.mmdet_config), self.context.distributed.gather
        )

    def collate(self, training: bool) -> Callable[[list], Batch]:
        return data_sets.collate

    # --- model and optimizer --------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        if self.proposes:
            self.categories = own_data.PROPOSAL_CATEGORIES
        fields.set_num_classes(self.mmdet_config, len(self.categories))
        starts_anew = self.for_training and self.first_batch == 0
        on_gpu = self.context.device.type == "cuda"
        keeps_backbone = starts_anew and self.hparams.weights is None
        config = models.config_to_build(self.mmdet_config, keeps_backbone, self.for_training, on_gpu)
        if self.hparams.max_detections is not None:
            evaluation.keep_detections(config, self.hparams.max_detections)
        half = bool(config.get("fp16")) or self.hparams.amp == "bf16"
        model = models.build_model(config, initialize=starts_anew or not self.for_training, half=half)
        if self.class_weights is not None:
            weigh_categories(model, self.class_weights)
        init_receptive_fields(model, self.mmdet_config)
        models.move_teacher(model, self.context.device)
        if self.hparams.weights and self.first_batch == 0:
            models.load_start(model, self.start_weights, self.for_training)
            del self.start_weights
        model.CLASSES = tuple(category["name"] for category in self.categories)
        return model

    @cached_property
    def start_weights(self) -> models.StartWeights:
        config_file = configs.find_config(self.hparams.config_file, Path(__file__).parent, "config_file")
        return models.read_start(self.hparams.weights, self.hparams.weights_key, config_file)

    def known_categories(self) -> list[dict]:
        """Those that the weights say they detect; else those of the config's data set."""
        if self.proposes:
            return own_data.PROPOSAL_CATEGORIES
        known = self.start_weights.categories if self.hparams.weights else None
        if known is None:
            return self._categories_of_data()
        if self.data.has_val_annotations and self.evaluates_coco:  # the same names, with the ids of the data
            of_data = self.open_val().categories
            if [category["name"] for category in of_data] == [category["name"] for category in known]:
                return of_data
        return known

    def _categories_of_data(self) -> list[dict]:
        leaf = fields.leaves(self.mmdet_config.data.val)[0]
        if not self.data.reads_files or (self.data.has_val_annotations and self.evaluates_coco):
            return self.open_val().categories
        names = own_data.selected_classes(leaf) or own_data.classes_of(leaf["type"])
        return models.categories_named(names) if names else self.pretrained_categories

    def check_pretrained(self) -> None:
        if not self.hparams.weights:
            raise UserError(
                "hyperparameters.weights is empty, and an untrained model detects nothing. Fix: give --checkpoint, or "
                f"--set hyperparameters.weights={PUBLISHED}"
            )

    def exportable(self) -> nn.Module:
        from mmdetection_files.export import ExportableMMDetection

        leaf = fields.leaves(self.mmdet_config.data.val)[0]
        return ExportableMMDetection(self.evaluation_model, pipelines.test_pipeline(leaf))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return models.build_optimizer(model, self.mmdet_config)

    def grad_scaler(self) -> torch.amp.GradScaler:
        return models.grad_scaler(self.mmdet_config.fp16)

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        return models.compiled_parts(model)

    def autocast(self) -> AbstractContextManager:
        # mmcv's decorators cast where the config has fp16
        return models.mmcv_in_bf16(self.context.device.type) if self.hparams.amp == "bf16" else nullcontext()

    def build_ema(self, model: nn.Module) -> AveragedWeights | MomentumEma | None:
        hook = hook_config(self.mmdet_config, EMA_HOOKS)
        if hook is None:
            return super().build_ema(model)
        return MomentumEma(model, hook, self.first_batch // self.aggregation_frequency)

    def clip_gradients(self) -> Callable[[Any], None] | None:
        return models.gradient_clipping(self.mmdet_config)

    def prepare_schedule(self) -> None:
        self.clip_gradients()  # what it refuses, before training starts
        lengths = self.batches_per_epoch, self.total_batches
        self.runner = StepRunner(self.plain_model, self.optimizer, self.mmdet_config, *lengths, self.train_samples)
        self.mode_switch = mode_switch(self.mmdet_config, self.runner.max_epochs)

    def warmup_batches(self) -> float:
        return fields.warmup_batches(self.mmdet_config, self.batches_per_epoch)

    def begin_training(self, folder: Path) -> None:
        self.runner.begin_run(folder / "work_dir")

    def before_batch(self, number: int) -> None:
        self.runner.begin(number)
        if self.mode_switch is not None and self.runner.epoch >= self.mode_switch[0]:
            self.plain_model.bbox_head.use_l1 = True

    def after_batch(self, number: int) -> None:
        self.runner.end()

    def begin_validation(self, loader: DataLoader) -> None:
        self.runner.begin_validation(len(loader), loader.dataset)

    def end_validation(self) -> None:
        self.runner.end_validation()

    def end_training(self) -> None:
        self.runner.call_hook("after_run")

    def evaluate_batch(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        self.runner.begin_validation_batch(batch_idx, {"img": batch.images, **batch.targets})
        metrics = super().evaluate_batch(batch, batch_idx)
        self.runner.call_hook("after_val_iter")
        return metrics

    def _start(self) -> str:
        if self.first_batch:
            return "the checkpoint's"
        if self.hparams.weights is None:
            return "the config's initial ones"
        said_by = " (load_from of the config)" if self.hparams.weights_key.startswith("load_from") else ""
        return f"{self.hparams.weights}{said_by}" if self.hparams.weights else "none, from nothing"

    def summary(self) -> list[tuple[str, object]]:
        config = self.mmdet_config
        lr_config, own = dict(config.get("lr_config") or {}), fields.kind_of(config.data.val)
        return [
            ("config", self.hparams.config_file),
            ("model", f"{config.model.type}, {count_of(len(self.categories), 'category')}"),
            ("weights", self._start()),
            ("training data", f"{fields.kind_of(config.data.train)}, {count_of(len(self.train_samples), 'sample')}"),
            ("validation", ", ".join(self.iou_types) if self.evaluates_coco else f"{own}.evaluate"),
            ("optimizer", f"{config.optimizer.type}, lr {config.optimizer.lr:g}"),
            ("schedule", ", ".join(f"{key} {value}" for key, value in lr_config.items()) or "constant"),
            ("gradient clipping", (config.get("optimizer_config") or {}).get("grad_clip") or "none"),
            ("operations", "compiled (mmcv._ext)" if operations.are_compiled() else "PyTorch and torchvision"),
        ]

    # --- the step -------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, number: int | None) -> Batch:
        images = self.normalization(batch.images, batch.targets["img_metas"])
        return super().prepare(replace(batch, images=images), number)

    @cached_property
    def normalization(self) -> Normalization:
        return Normalization(self.context.device)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        losses = models.losses_of_step(model, batch)
        self.runner.note_step(losses, {"img": batch.images, **batch.targets}, len(batch.image_ids))
        return losses

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        models.as_after_epoch(model, max(self.batches_trained - 1, 0) // self.batches_per_epoch, self.mode_switch)
        return models.losses_of_step(model, batch)

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections | evaluation.OwnResult]:
        results = model(img=batch.images, return_loss=False, rescale=True, **batch.targets)
        convert = evaluation.to_own_result if self.detects_for_own_dataset else evaluation.to_detections
        return [convert(result, image_id) for result, image_id in zip(results, batch.image_ids, strict=True)]


if __name__ == "__main__":
    main(MMDetectionTrial, command)
