"""The DETR family as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from detr_hyperparameters import BACKBONE, DetrHyperparameters
from shared.config.experiment import Sections
from shared.launch import exit_on_errors, main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(DetrHyperparameters))

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from detr_files import check_torch

with exit_on_errors():
    check_torch()

from torch import nn
from transformers import PreTrainedConfig, get_scheduler

from detr_files.data import DetrCollate, DetrTransform, layout, makes_one_size, resized
from detr_files.denoising import Ranks
from detr_files.masks import found_masks, has_masks
from detr_files.model import (
    TrainedDetr,
    build_detector,
    image_processor,
    input_scale,
    input_step,
    is_on_hub,
    model_config,
)
from detr_files.optimizer import build_optimizer
from detr_files.weights import load_start_weights
from shared.data.dataset import CocoDetection, kept_random_state, seed_all
from shared.data.images import InputScale
from shared.data.loading import Batch
from shared.data.open import SplitData, check_masks
from shared.errors import UserError, count_of
from shared.evaluation.detections import Detections
from shared.library import COCO_CATEGORIES
from shared.training.trial import DetectionTrial

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


class DetrTrial(DetectionTrial):
    """The DETR family, over the package transformers.

    Attributes:
        config, processor: transformers' config of the model, and its image processor; from the Hub at first use.
    """

    hyperparameters_class = DetrHyperparameters
    optimizer_key = "hyperparameters.lr"
    without_pretrained: ClassVar = {"weights": None}
    pretrained_categories: ClassVar = COCO_CATEGORIES
    replaced_by_augment = ("horizontal_flip",)
    weighs_categories = True
    find_unused_parameters = True  # images without objects train no embedding of classes

    # --- the config -----------------------------------------------------------------------------------

    @classmethod
    def hyperparameters_of_checkpoint(cls, checkpoint: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        return {**cls.without_pretrained, "model": str(checkpoint), "config": {}, "processor": {}}

    @classmethod
    def input_scale(cls, hparams: DetrHyperparameters) -> InputScale | None:
        return None if is_on_hub(hparams.model) else input_scale(hparams)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return model_config(self.hparams)

    @cached_property
    def processor(self) -> Any:
        return image_processor(self.hparams, self.config.model_type)

    @property
    def iou_types(self) -> tuple[str, ...]:
        return ("bbox", "segm") if has_masks(self.config) else ("bbox",)

    def read_own_config(self) -> None:
        if not is_on_hub(self.hparams.model):  # what it refuses, before the data is opened
            self.processor  # noqa: B018

    def save_own_config(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def summary(self) -> list[tuple[str, object]]:
        hparams, data = self.hparams, self.train_data.annotations
        return [
            ("model", f"{hparams.model or self.config.model_type}, {count_of(len(self.categories), 'category')}"),
            ("weights", hparams.weights or "random" if self.first_batch == 0 else "the checkpoint's"),
            ("training data", f"{data.path or 'fake'}, {count_of(len(data), 'image')}"),
            ("optimizer", f"AdamW, lr {hparams.lr:g}"),
            ("schedule", f"{hparams.sched}, warm-up of {hparams.warmup_batches} batches"),
        ]

    def check_pretrained(self) -> None:
        if self.hparams.weights in (None, BACKBONE):
            raise UserError(
                f"hyperparameters.weights: {self.hparams.weights or 'null'} detects nothing. Fix: give --checkpoint, "
                "or --set hyperparameters.weights=published"
            )

    # --- model and optimizer --------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        detector = build_detector(self.config, self.categories)
        if self.first_batch == 0:
            load_start_weights(detector, self.hparams, self.categories)
        return TrainedDetr(detector, self.class_weights)

    def detector(self, model: nn.Module) -> nn.Module:
        return model.detector

    def compiled_parts(self, model: nn.Module) -> list[nn.Module]:
        # the losses assign boxes on the CPU, image by image
        return [module for name, module in model.named_modules() if name.endswith(".backbone")][:1] or [model.detector]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.hparams)

    def prepare_schedule(self) -> None:
        self.scheduler = get_scheduler(
            _SCHEDULES[self.hparams.sched],
            self.optimizer,
            num_warmup_steps=self.hparams.warmup_batches,
            num_training_steps=self.total_batches,
        )

    def warmup_batches(self) -> float:
        return self.hparams.warmup_batches

    def before_batch(self, number: int) -> None:
        scheduler = self.scheduler
        for group, lr, factor in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(number)

    def exportable(self) -> nn.Module:
        from detr_files.export import ExportableDetr

        return ExportableDetr(self.evaluation_model.detector, self.processor)

    def save_for_transformers(self, folder: Path) -> None:
        self.evaluation_model.detector.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # --- data -----------------------------------------------------------------------------------------

    def open_train_and_val(self) -> tuple[SplitData, SplitData]:
        train, val = super().open_train_and_val()
        if has_masks(self.config):
            check_masks(train.annotations, "train")
            check_masks(val.annotations, "val")
        return train, val

    def training_dataset(self) -> CocoDetection:
        return self._dataset(self.train_data, training=True)

    def evaluation_dataset(self, data: SplitData) -> CocoDetection:
        return self._dataset(data, training=False)

    def _dataset(self, data: SplitData, training: bool) -> CocoDetection:
        fast, augmenter = self.data.fast_images, self.augmenter(layout(self.processor)) if training else None
        masks = has_masks(self.config)
        if augmenter is not None:
            augmenter = augmenter.with_masks() if masks else augmenter
            transform, decode = DetrTransform(self.processor, masks=masks), augmenter.decode
        else:
            flip = self.hparams.horizontal_flip if training else 0.0
            transform = DetrTransform(self.processor, flip, fast, masks and training)
            decode = bytes if fast else None
        of_data = (data.annotations, data.images, transform, self.seed, training, self.bad_images, decode)
        return CocoDetection(*of_data, augmenter=augmenter)

    def loss_transform(self, data: SplitData) -> DetrTransform:
        return DetrTransform(self.processor, 0.0, self.data.fast_images, has_masks(self.config))

    def collate(self, training: bool) -> DetrCollate:
        return DetrCollate.of(self.processor)

    @property
    def evaluation_batch_size(self) -> int:
        # padding changes what some models detect
        return self.per_slot_batch_size if makes_one_size(self.processor) else 1

    def prepare(self, batch: Batch, number: int | None) -> Batch:
        if number is not None and (scale := self.input_scale_of_batch(number)) != 1:
            batch = resized(batch, scale, input_step(self.config))
        return super().prepare(batch, number)

    # --- the step -------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        ranks = None if self.slots == 1 else Ranks(self.rank, self.slots, self._random_state_of_one_rank())
        return model(batch.images, batch.targets["mask"], batch.targets["labels"], ranks)

    def _random_state_of_one_rank(self) -> torch.Tensor:
        """The state of the device's generator before the losses of this batch, if rank 0 computes all of it."""
        is_on_gpu = self.context.device.type == "cuda"
        with kept_random_state():
            seed_all(self.seed, 0, self.batches_trained, 1)  # as `train_batch` does
            return torch.cuda.get_rng_state(self.context.device) if is_on_gpu else torch.get_rng_state()

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return model(batch.images, batch.targets["mask"], batch.targets["labels"])

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        outputs = model.outputs(batch.images, batch.targets["mask"])
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        found = self.processor.post_process_object_detection(outputs, 0.0, batch.targets["sizes"])
        masks = [None] * len(found)
        if has_masks(self.config):
            sizes = batch.targets["sizes"].tolist()
            masks = list(map(found_masks, outputs.logits, outputs.pred_masks, sizes))
        return [
            Detections(
                image_id=image_id,
                boxes=each["boxes"].cpu().numpy(),
                scores=each["scores"].cpu().numpy(),
                labels=each["labels"].cpu().numpy(),
                masks=of_image,
            )
            for image_id, each, of_image in zip(batch.image_ids, found, masks, strict=True)
        ]


if __name__ == "__main__":
    main(DetrTrial, command)
