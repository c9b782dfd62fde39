"""EfficientDet as a Determined trial: `python3 model_def.py --help`."""

from __future__ import annotations

from shared.environment import prepare_process

prepare_process()  # before torch, and before packages that may be missing
from efficientdet_hyperparameters import EfficientDetHyperparameters
from shared.config.experiment import Sections
from shared.launch import main, read_command

# errors in the command line and the config appear before torch and the library are loaded
command = read_command(__name__, Sections(EfficientDetHyperparameters))

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from effdet.bench import DetBenchPredict
from effdet.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import dispatch_clip_grad
from torch import nn

from efficientdet_files.data import (
    EfficientDetCollate,
    EfficientDetTransform,
    input_config,
    layout,
    normalize,
    sample_of,
)
from efficientdet_files.model import WeightedLoss, build_model, model_config
from efficientdet_files.schedule import build_scheduler
from shared.data.dataset import CocoDetection
from shared.data.images import InputScale
from shared.data.loading import Batch
from shared.data.open import SplitData
from shared.errors import UserError, count_of, nearest
from shared.evaluation.detections import Detections
from shared.library import COCO_CATEGORIES
from shared.training.trial import DetectionTrial

# of PyTorch's ReduceLROnPlateau
_PLATEAU_PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


class EfficientDetTrial(DetectionTrial):
    """EfficientDet, built on the packages effdet and timm."""

    hyperparameters_class = EfficientDetHyperparameters
    weights_key = "hyperparameters.pretrained"
    without_pretrained: ClassVar = {"pretrained": "none"}
    pretrained_categories: ClassVar = COCO_CATEGORIES
    replaced_by_augment = ("scale_jitter", "vertical_flip", "random_erasing")
    weighs_categories = True

    @classmethod
    def input_scale(cls, hparams: EfficientDetHyperparameters) -> InputScale:
        model = model_config(hparams, num_classes=1)
        height, width = input_config(hparams, model)["input_size"][-2:]
        return InputScale(model.anchor_scale * 2**model.min_level, "anchor", min(height, width), max(height, width))

    def read_own_config(self) -> None:
        model_config(self.hparams, num_classes=1)  # what it refuses, before the data is opened
        if self.data.augment is not None and self.data.augment.multi_scale != (1, 1):
            raise UserError(
                "data.augment.multi_scale: effdet builds its anchors and features for one input size. Fix: remove it, "
                "and widen data.augment.scale"
            )

    def build_model(self) -> nn.Module:
        torch.backends.cudnn.benchmark = True  # as upstream: all inputs have one size
        bench = build_model(self.hparams, self.categories)
        if self.class_weights is not None:
            bench.loss_fn = WeightedLoss(bench.config, self.class_weights)
        self.model_config = bench.config
        self.inputs = input_config(self.hparams, self.model_config)
        device = self.context.device
        self.mean = torch.tensor(self.inputs["mean"], device=device).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(self.inputs["std"], device=device).mul(255).view(1, 3, 1, 1)
        self.random_erasing = None
        if (probability := self.hparams.random_erasing) > 0 and self.data.augment is None:
            mode, count = self.hparams.random_erasing_mode, self.hparams.random_erasing_count
            self.random_erasing = RandomErasing(probability, mode=mode, max_count=count, device=device)
        self.predictors: dict[nn.Module, DetBenchPredict] = {}
        return bench

    def detector(self, model: nn.Module) -> nn.Module:
        return model.model

    def with_sync_bn(self, model: nn.Module) -> nn.Module:
        return convert_sync_batchnorm(model)  # timm's own batch norm is an activation too

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        hparams = self.hparams
        if hparams.opt not in list_optimizers():
            raise UserError(
                f"hyperparameters.opt: {hparams.opt!r} is not an optimizer of timm"
                f"{nearest(hparams.opt, list_optimizers())}"
            )
        eps = {} if hparams.opt_eps is None else {"eps": hparams.opt_eps}
        return create_optimizer_v2(
            model,
            opt=hparams.opt,
            lr=hparams.scaled_lr,
            weight_decay=hparams.weight_decay,
            momentum=hparams.momentum,
            **eps,
        )

    def prepare_schedule(self) -> None:
        metric, lengths = self.searcher_metric, (self.batches_per_epoch, self.total_batches)
        self.scheduler = build_scheduler(self.optimizer, self.hparams, *lengths, metric.smaller_is_better, self.seed)

    def warmup_batches(self) -> float:
        return self.hparams.warmup_epochs * self.batches_per_epoch

    def before_batch(self, number: int) -> None:
        epoch, batch_in_epoch = divmod(number, self.batches_per_epoch)
        if self.hparams.sched_on_updates:
            self.scheduler.step_update(number)
        elif batch_in_epoch == 0 or (number == self.first_batch and not self._has_plateaus):
            self.scheduler.step(epoch, self.last_validation.get(self.searcher_metric.name))

    @property
    def _has_plateaus(self) -> bool:
        """Whether the schedule follows from what was measured, and not from the batch alone."""
        return self.hparams.sched == "plateau"

    def own_state(self) -> dict[str, Any]:
        if not self._has_plateaus:
            return {}
        return {
            "plateaus": self.scheduler.lr_scheduler.state_dict(),
            "restore_lr": self.scheduler.restore_lr,
            "metric": self.searcher_metric.name,
            "lr": self.hparams.scaled_lr,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        if not self._has_plateaus:
            return
        if not state or state.get("lr", self.hparams.scaled_lr) != self.hparams.scaled_lr:
            self.scheduler.update_groups(self.scheduler.base_values)  # from another schedule, or another rate
        else:
            self.scheduler.restore_lr = state["restore_lr"]
        if state and state.get("metric", self.searcher_metric.name) == self.searcher_metric.name:
            # its rules, such as the factor and the patience, are this run's
            progress = {name: state["plateaus"][name] for name in _PLATEAU_PROGRESS if name in state["plateaus"]}
            self.scheduler.lr_scheduler.load_state_dict(progress)

    def clip_gradients(self) -> Callable[[Any], None] | None:
        hparams = self.hparams
        if hparams.clip_grad is None:
            return None

        def clip(parameters: Any) -> None:
            if hparams.clip_mode == "agc":  # upstream leaves the last layers of the heads unclipped
                parameters = [p for name, p in self.plain_model.named_parameters() if "predict" not in name]
            dispatch_clip_grad(parameters, value=hparams.clip_grad, mode=hparams.clip_mode)

        return clip

    def training_dataset(self) -> CocoDetection:
        return self._dataset(self.train_data, training=True)

    def evaluation_dataset(self, data: SplitData) -> CocoDetection:
        return self._dataset(data, training=False)

    def _dataset(self, data: SplitData, training: bool) -> CocoDetection:
        fast = self.data.fast_images
        transform = EfficientDetTransform(self.hparams, self.inputs, training, fast=fast)
        decode, augmenter = bytes if fast else None, self.augmenter(layout(self.inputs)) if training else None
        if augmenter is not None:
            transform, decode = sample_of, augmenter.decode
        of_data = (data.annotations, data.images, transform, self.seed, training, self.bad_images, decode)
        return CocoDetection(*of_data, augmenter=augmenter)

    def loss_transform(self, data: SplitData) -> EfficientDetTransform:
        fast = self.data.fast_images
        return EfficientDetTransform(self.hparams, self.inputs, training=False, annotated=True, fast=fast)

    def collate(self, training: bool) -> EfficientDetCollate:
        return EfficientDetCollate(self.hparams, self.model_config, training)

    def evaluated_images(self, count: int) -> range:
        return range(0, count, max(self.hparams.val_skip, 1))

    def prepare(self, batch: Batch, number: int | None) -> Batch:
        images = normalize(batch.images, self.mean, self.std)
        if number is not None and self.random_erasing is not None:
            for i, image in enumerate(images):
                self.seed_image(number, i)
                sizes = {name: batch.targets[name][i : i + 1] for name in ("img_scale", "img_size")}
                self.random_erasing(image[None], sizes)  # in place
        return super().prepare(replace(batch, images=images), number)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return model(batch.images, batch.targets)

    def image_losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return model.forward(batch.images, batch.targets)  # not what torch_compile has made for the training's batches

    def detect(self, model: nn.Module, batch: Batch) -> list[Detections]:
        if model not in self.predictors:
            self.predictors[model] = DetBenchPredict(model.model).to(self.context.device).eval()
        rows = self.predictors[model](batch.images, batch.targets).float().cpu().numpy()
        found = [of_image[of_image[:, 4] > 0] for of_image in rows]  # effdet fills up to 100 with zeros
        return [
            Detections(image_id, boxes=of_image[:, :4], scores=of_image[:, 4], labels=of_image[:, 5].astype(int) - 1)
            for image_id, of_image in zip(batch.image_ids, found, strict=True)
        ]

    def exportable(self) -> nn.Module:
        from efficientdet_files.export import ExportableEfficientDet

        return ExportableEfficientDet(self.evaluation_model.model, self.model_config, self.inputs)

    def summary(self) -> list[tuple[str, object]]:
        hparams, backbone, data = self.hparams, self.model_config.backbone_name, self.train_data.annotations
        return [
            ("model", f"{hparams.model} over {backbone}, {count_of(len(self.categories), 'category')}"),
            ("weights", f"pretrained: {hparams.pretrained}" if self.first_batch == 0 else "the checkpoint's"),
            ("input", "×".join(map(str, reversed(self.model_config.image_size)))),
            ("training data", f"{data.path or 'fake'}, {count_of(len(data), 'image')}"),
            ("optimizer", f"{hparams.opt}, lr {hparams.scaled_lr:g}"),
            (
                "schedule",
                f"{hparams.sched}, warm-up of {hparams.warmup_epochs:g} epoch{'s' * (hparams.warmup_epochs != 1)}",
            ),
        ]

    def check_pretrained(self) -> None:
        if self.hparams.pretrained in ("none", "backbone"):
            raise UserError(
                f"hyperparameters.pretrained is {self.hparams.pretrained!r}, which detects nothing. Fix: give "
                "--checkpoint, or --set hyperparameters.pretrained=effdet"
            )


if __name__ == "__main__":
    main(EfficientDetTrial, command)
