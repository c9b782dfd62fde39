"""MMDetection's detectors as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.experiment import Sections
from shared.launch import main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(MMDetectionHyperparameters, MMDetectionData))

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdetection_files import operations
from mmdetection_files.config import (
    default_lengths,
    file_client_of,
    find_config,
    find_weights_files,
    input_scale,
    kind_of,
    leaves,
    load_mmdet_config,
    own_batch_size,
    own_code,
    scale_lr,
    set_num_classes,
    set_paths,
    validation_times,
)
from mmdetection_files.data import (
    PROPOSAL_CATEGORIES,
    ClassAwareBatchSampler,
    CocoSamples,
    EvaluationTransform,
    LossTransform,
    MmcvImages,
    OwnData,
    OwnEvaluationSamples,
    TrainingSamples,
    augments,
    build_own_dataset,
    build_samples,
    classes_of,
    collate,
    decoder,
    images_of_classes,
    is_plain_coco,
    labels_of_samples,
    loss_pipeline,
    repeats_by_itself,
    selected_classes,
    test_pipeline,
    trained_images,
    trains_masks,
)
from mmdetection_files.evaluation import (
    OwnEvaluator,
    OwnResult,
    check_evaluation,
    keep_detections,
    own_arguments,
    scored_detections,
    to_detections,
    to_own_result,
)
from mmdetection_files.hooks import EMA_HOOKS, MomentumEma, StepRunner, hook_config, mode_switch
from mmdetection_files.model import (
    PYTHON_STATE,
    StartWeights,
    as_after_epoch,
    build_model,
    build_optimizer,
    categories_named,
    compiled_parts,
    grad_scaler,
    load_start,
    losses_of_step,
    mmcv_in_bf16,
    move_teacher,
    read_start,
    without_pretrained_backbone,
    without_teacher_weights,
)
from mmdetection_files.pixels import Normalization
from mmdetection_files.receptive_field import init_receptive_fields, is_searching, write_structure
from mmdetection_files.saved_config import RESOLVED_CONFIG, write_resolved
from mmdetection_files.switches import take_up_switches
from shared.config.file import find_path
from shared.config.schema import PUBLISHED, Split, parse_section
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.dataset import CocoDetection
from shared.data.images import InputScale
from shared.data.loading import Batch
from shared.data.open import SplitData, check_evaluable, check_masks, check_trainable, open_split
from shared.data.samplers import TrainingBatchSampler
from shared.errors import UserError
from shared.evaluation.detections import Detections
from shared.evaluation.evaluator import CocoEvaluator
from shared.library import COCO_CATEGORIES
from shared.training.switches import AveragedWeights
from shared.training.trial import DetectionTrial

logger = logging.getLogger(__name__)


class MMDetectionTrial(DetectionTrial):
    """MMDetection 2.28, over the packages mmdet and mmcv.

    Attributes:
        mmdet_config: the resolved config.
        evaluates_coco: whether validation is by the shared evaluator; else by `evaluate` of the config's data set.
    """

    hyperparameters_class = MMDetectionHyperparameters
    data_class = MMDetectionData
    python_attributes = PYTHON_STATE
    optimizer_key = "optimizer of the MMDetection config"
    pretrained_categories: ClassVar = COCO_CATEGORIES

    # --- the config -----------------------------------------------------------------------------------

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        if not (checkpoint / RESOLVED_CONFIG).is_file():
            raise UserError(f"{checkpoint} is no checkpoint of MMDetection's: it holds no {RESOLVED_CONFIG}")
        return {
            "config_file": str(checkpoint / RESOLVED_CONFIG),
            "merge_config": None,
            "override_mmdet_config": None,
            "weights": "",  # the checkpoint's own are loaded
            "use_pretrained": None,
            "scale_schedule": None,
            **own_code(checkpoint, own, Path(__file__).parent),
        }

    @classmethod
    def scored_detections(cls, hyperparameters: Mapping[str, Any]) -> int | None:
        given = super().scored_detections(hyperparameters)
        if given is not None or not hyperparameters.get("config_file"):
            return given
        hparams = parse_section(hyperparameters, cls.hyperparameters_class, "hyperparameters")
        return scored_detections(load_mmdet_config(hparams, Path(__file__).parent))

    @classmethod
    def input_scale(cls, hparams: MMDetectionHyperparameters) -> InputScale | None:
        return input_scale(load_mmdet_config(hparams, Path(__file__).parent))

    def read_own_config(self) -> None:
        submitted = Path(__file__).parent
        self.mmdet_config = load_mmdet_config(self.hparams, submitted)
        client = file_client_of(self.mmdet_config)
        if client is not None and self.data.backend == "disk" and self.data.file_client_args is None:
            self.data = replace(self.data, file_client_args=client)
        repeats = self.for_training and self.data.repeat_threshold is not None
        if repeats and (own := repeats_by_itself(self.mmdet_config.data)):
            raise UserError(
                f"data.repeat_threshold: the MMDetection config repeats images itself, by {own}; take one of them out"
            )
        set_paths(self.mmdet_config, self.data, submitted)
        places = (submitted, *self.experiment.places)
        find_weights_files(self.mmdet_config, places)
        if self.hparams.weights is None and self.for_training and self.mmdet_config.get("load_from"):
            self.hparams.weights = self.mmdet_config.load_from
            self.hparams.weights_key = "load_from of the MMDetection config"
        elif self.hparams.weights:
            self.hparams.weights = str(find_path(self.hparams.weights, places) or self.hparams.weights)
        if self.mmdet_config.get("cudnn_benchmark"):
            torch.backends.cudnn.benchmark = True
        if self.hparams.global_batch_size is None:
            self.hparams.global_batch_size = own_batch_size(self.mmdet_config)
            if not self.for_training:  # any number of processes
                self.hparams.global_batch_size = -(-self.hparams.global_batch_size // self.slots) * self.slots
        scale_lr(self.mmdet_config, self.hparams)
        if self.mmdet_config.get("fp16"):
            self.fp16_key = "fp16 of the MMDetection config"
        take_up_switches(self.mmdet_config, self.hparams)
        self.find_unused_parameters = self.mmdet_config.get("find_unused_parameters", False)
        evaluation, val = self.mmdet_config.get("evaluation") or {}, self.mmdet_config.data.val
        metrics = evaluation.get("metric", "bbox")
        metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        self.proposes = self.mmdet_config.model.type == "RPN"
        if self.proposes and not self.data.reads_files:
            raise UserError(
                "hyperparameters.config_file: RPN only proposes, and its recall is not measured on data.backend fake; "
                "give data.train and data.val"
            )
        scores_masks_apart = "mask_iou_head" in (self.mmdet_config.model.get("roi_head") or {})
        self.evaluates_coco = not self.data.reads_files or (
            is_plain_coco(val) and set(metrics) <= {"bbox", "segm"} and not scores_masks_apart
        )
        if self.validates_loss and not self.evaluates_coco:
            what = "RPN" if self.proposes else kind_of(val)
            raise UserError(
                f"hyperparameters.validation_loss: the {what} of the MMDetection config is evaluated by MMDetection's "
                "own data set, which gives no targets; leave it out"
            )
        if self.evaluates_coco:
            check_evaluation(self.mmdet_config)
        self.iou_types = tuple(m for m in ("bbox", "segm") if m in metrics) or ("bbox",)

    def default_lengths(self) -> dict[str, Any]:
        return default_lengths(self.mmdet_config)

    def validation_times(self) -> Any:
        return validation_times(self.mmdet_config)

    def reported_metrics(self) -> list[str] | None:
        return super().reported_metrics() if self.evaluates_coco else None

    def save_own_config(self, folder: Path) -> None:
        write_structure(self.plain_model, self.mmdet_config, folder)
        write_resolved(self.mmdet_config, folder)

    # --- data -----------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[Any, Any]:
        opened: list[SplitData | OwnData] = []

        def build_leaf(leaf: Any) -> Any:
            if is_plain_coco(leaf) or not self.data.reads_files:
                opened.append(self._open_coco(leaf, "train"))
                fast = self.data.fast_images
                return CocoSamples(opened[-1].annotations, opened[-1].images, leaf, self.bad_images, fast)
            dataset = build_own_dataset(leaf, self.data, training=True)
            opened.append(OwnData(dataset))
            return dataset

        self.train_samples = build_samples(self.mmdet_config.data.train, build_leaf)
        val = self.open_val()
        coco = [data.annotations for data in (*opened, val) if isinstance(data, SplitData)]
        for other in coco[1:]:
            check_same_categories(coco[0], other)
        if isinstance(opened[0], SplitData):
            check_trainable(opened[0].annotations)
        if trains_masks(self.mmdet_config):
            for data in opened:
                if isinstance(data, SplitData):
                    check_masks(data.annotations, "train")
        if isinstance(val, SplitData):
            check_evaluable(val.annotations)
            if "segm" in self.iou_types or (self.validates_loss and trains_masks(self.mmdet_config)):
                check_masks(val.annotations, "val")
        return opened[0], val

    def open_val(self) -> Any:
        section = self.mmdet_config.data.val
        if self.evaluates_coco:
            return self._open_coco(section, "val")
        return OwnData(build_own_dataset(section, self.data, training=False), proposals=self.proposes)

    def _open_coco(self, leaf: Any, split: str) -> SplitData:
        data, images = self.data, None
        if data.reads_files:
            data = replace(data, **{split: Split(leaf["ann_file"], leaf.get("img_prefix") or "")})
            if data.file_client is not None:
                images = MmcvImages(data.file_client, leaf.get("img_prefix") or "")
        opened = open_split(data, split, images)
        if (classes := selected_classes(leaf)) and data.reads_files:
            try:
                return SplitData(opened.annotations.select_categories(classes), opened.images)
            except UserError as error:
                raise UserError(f"data.{split}.classes of the MMDetection config: {error}") from error
        return opened

    def training_groups(self) -> np.ndarray:
        return np.asarray(getattr(self.train_samples, "flag", np.zeros(len(self.train_samples), dtype=np.uint8)))

    def training_labels(self) -> tuple[np.ndarray, np.ndarray]:
        return labels_of_samples(self.train_samples)

    def training_batches(self, first_batch: int | None = None) -> TrainingBatchSampler:
        by_class = (self.mmdet_config.data.get("train_dataloader") or {}).get("class_aware_sampler")
        if by_class is None:
            return super().training_batches(first_batch)
        return ClassAwareBatchSampler(
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
        return images_of_classes(self.train_samples)

    def training_dataset(self) -> Dataset:
        return TrainingSamples(self.train_samples, self.seed, self.mode_switch)

    def evaluation_dataset(self, data: SplitData | OwnData) -> Dataset:
        self.detects_for_own_dataset = isinstance(data, OwnData)
        if isinstance(data, OwnData):
            return OwnEvaluationSamples(data.dataset)
        leaf = leaves(self.mmdet_config.data.val)[0]
        pipeline = test_pipeline(leaf)
        transform = EvaluationTransform(pipeline, leaf, data.images, self.data.fast_images)
        decode = decoder(pipeline[0])
        return CocoDetection(data.annotations, data.images, transform, self.seed, False, self.bad_images, decode)

    def loss_transform(self, data: SplitData) -> LossTransform:
        leaf = leaves(self.mmdet_config.data.val)[0]
        pipeline = loss_pipeline(leaf["pipeline"], self.mmdet_config.data.train)
        if any(isinstance(step, dict) and step.get("with_seg") for step in pipeline) and not leaf.get("seg_prefix"):
            raise UserError(
                "hyperparameters.validation_loss: the config trains on segmentation maps, and there are none to "
                "validate on; give config_overrides: {data.val.seg_prefix: FOLDER}, or leave it out"
            )
        return LossTransform(pipeline, leaf, data.images, self.data.fast_images)

    def trained_images(self, annotations: CocoAnnotations) -> np.ndarray:
        return trained_images(annotations, leaves(self.mmdet_config.data.train)[0])

    @property
    def batches_of_one_size(self) -> bool:
        plain = self.evaluates_coco and not augments(leaves(self.mmdet_config.data.val)[0]["pipeline"])
        return plain and not self._own_evaluation_batch_size and self.batches_evaluations

    @property
    def evaluation_batch_size(self) -> int:
        return self._own_evaluation_batch_size or (self.per_slot_batch_size if self.batches_of_one_size else 1)

    @property
    def _own_evaluation_batch_size(self) -> int | None:
        return self.mmdet_config.data.get("val_dataloader", {}).get("samples_per_gpu")

    def build_evaluator(self, data: SplitData | OwnData) -> CocoEvaluator | OwnEvaluator:
        if isinstance(data, SplitData):
            return super().build_evaluator(data)
        return OwnEvaluator(data.dataset, own_arguments(self.mmdet_config), self.context.distributed.gather)

    def collate(self, training: bool) -> Callable[[list], Batch]:
        return collate

    # --- model and optimizer --------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        if self.proposes:
            self.categories = PROPOSAL_CATEGORIES
        set_num_classes(self.mmdet_config, len(self.categories))
        config = deepcopy(self.mmdet_config)
        if self.hparams.max_detections is not None:
            keep_detections(config, self.hparams.max_detections)
        starts_anew = self.for_training and self.first_batch == 0
        if self.hparams.weights is not None or not starts_anew:
            without_pretrained_backbone(config)
        if not self.for_training:
            without_teacher_weights(config)
        if self.context.device.type != "cuda":
            config.fp16 = None  # a model that was trained in half precision detects in single here
        half = bool(config.get("fp16")) or self.hparams.amp == "bf16"
        model = build_model(config, initialize=starts_anew or not self.for_training, half=half)
        init_receptive_fields(model, self.mmdet_config)
        move_teacher(model, self.context.device)
        if self.hparams.weights and self.first_batch == 0:
            load_start(model, self.start_weights, self.for_training)
            del self.start_weights
        model.CLASSES = tuple(category["name"] for category in self.categories)
        return model

    @cached_property
    def start_weights(self) -> StartWeights:
        config_file = find_config(self.hparams.config_file, Path(__file__).parent, "config_file")
        return read_start(self.hparams.weights, self.hparams.weights_key, config_file)

    def known_categories(self) -> list[dict]:
        """Those that the weights say they detect; else those of the config's data set."""
        if self.proposes:
            return PROPOSAL_CATEGORIES
        known = self.start_weights.categories if self.hparams.weights else None
        if known is None:
            return self._categories_of_data()
        if self.data.has_val_annotations and self.evaluates_coco:  # the same names, with the ids of the data
            of_data = self.open_val().categories
            if [category["name"] for category in of_data] == [category["name"] for category in known]:
                return of_data
        return known

    def _categories_of_data(self) -> list[dict]:
        leaf = leaves(self.mmdet_config.data.val)[0]
        if not self.data.reads_files or (self.data.has_val_annotations and self.evaluates_coco):
            return self.open_val().categories
        names = selected_classes(leaf) or classes_of(leaf["type"])
        return categories_named(names) if names else self.pretrained_categories

    def check_pretrained(self) -> None:
        if not self.hparams.weights:
            raise UserError(
                "hyperparameters.weights says nothing, and an untrained model detects nothing; give --checkpoint, or "
                f"--set hyperparameters.weights={PUBLISHED}"
            )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.mmdet_config)

    def grad_scaler(self) -> torch.amp.GradScaler:
        return grad_scaler(self.mmdet_config.fp16)

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        return compiled_parts(model)

    def autocast(self) -> AbstractContextManager:
        # mmcv's decorators cast where the config has fp16
        return mmcv_in_bf16(self.context.device.type) if self.hparams.amp == "bf16" else nullcontext()

    def build_ema(self, model: nn.Module) -> AveragedWeights | MomentumEma | None:
        hook = hook_config(self.mmdet_config, EMA_HOOKS)
        if is_searching(self.mmdet_config) and (hook or self.hparams.model_ema_decay is not None):
            said_by = f"custom_hooks: {hook['type']}" if hook else "hyperparameters.model_ema_decay"
            raise UserError(
                f"{said_by} averages the weights of a model whose layers RFSearchHook changes; take one of them out"
            )
        if hook is None:
            return super().build_ema(model)
        return MomentumEma(model, hook, self.first_batch // self.aggregation_frequency)

    def clip_gradients(self) -> Callable[[Any], None] | None:
        optimizer_config = self.mmdet_config.get("optimizer_config") or {}
        if optimizer_config.get("type", "OptimizerHook") != "OptimizerHook":
            raise UserError(
                f"optimizer_config.type: {optimizer_config['type']} is a loop of its own; to add up gradients use "
                "`optimizations: {aggregation_frequency: N}` of the experiment config"
            )
        if not optimizer_config.get("grad_clip"):
            return None
        arguments = dict(optimizer_config["grad_clip"])

        def clip(parameters: Any) -> None:
            # as mmcv's OptimizerHook
            with_gradient = [p for p in parameters if p.requires_grad and p.grad is not None]
            if with_gradient:
                nn.utils.clip_grad_norm_(with_gradient, **arguments)

        return clip

    def prepare_schedule(self) -> None:
        self.clip_gradients()  # what it refuses, before training starts
        self.runner = StepRunner(
            self.plain_model,
            self.optimizer,
            self.mmdet_config,
            self.batches_per_epoch,
            self.total_batches,
            self.train_samples,
        )
        self.mode_switch = mode_switch(self.mmdet_config, self.runner.max_epochs)

    def warmup_batches(self) -> float:
        lr_config = self.mmdet_config.get("lr_config") or {}
        if not lr_config.get("warmup"):
            return 0
        epochs = self.batches_per_epoch if lr_config.get("warmup_by_epoch") else 1
        return lr_config.get("warmup_iters", 0) * epochs

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
        lr_config = dict(config.get("lr_config") or {})
        return [
            ("config", self.hparams.config_file),
            ("model", f"{config.model.type}, {len(self.categories)} categories"),
            ("weights", self._start()),
            ("training data", f"{kind_of(config.data.train)}, {len(self.train_samples)} samples"),
            (
                "validation",
                ", ".join(self.iou_types) if self.evaluates_coco else f"{kind_of(config.data.val)}.evaluate",
            ),
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
        losses = losses_of_step(model, batch)
        log_vars = {name: value.detach() for name, value in losses.items()}
        self.runner.data_batch = {"img": batch.images, **batch.targets}
        self.runner.outputs = {"loss": losses["loss"], "log_vars": log_vars, "num_samples": len(batch.image_ids)}
        return losses

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        as_after_epoch(model, max(self.batches_trained - 1, 0) // self.batches_per_epoch, self.mode_switch)
        return losses_of_step(model, batch)

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections | OwnResult]:
        results = model(img=batch.images, return_loss=False, rescale=True, **batch.targets)
        convert = to_own_result if self.detects_for_own_dataset else to_detections
        return [convert(result, image_id) for result, image_id in zip(results, batch.image_ids, strict=True)]


if __name__ == "__main__":
    main(MMDetectionTrial, command)
