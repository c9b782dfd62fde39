"""The weights that training starts from, with a class head for the categories of the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from detr_files.model import auto_model, build_detector, from_hub, refusing
from detr_hyperparameters import BACKBONE, DetrHyperparameters
from shared.config.schema import PUBLISHED
from shared.errors import UserError
from shared.library import COCO_CATEGORIES, log_loaded
from shared.training.checkpoints import CATEGORIES_FILE, read_weights

PREFIX = "detector."  # of the weights in a checkpoint of this project
# what some models of the Hub call COCO's categories: Pascal VOC's names
_COCO_NAME = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def load_start_weights(detector: PreTrainedModel, hparams: DetrHyperparameters, categories: list[dict]) -> None:
    """Loads `hyperparameters.weights` into a model with random weights.

    Raises:
        UserError: they cannot be had, hold code, or are of another model.
    """
    if hparams.weights is None:
        return
    weights, names = read_start_weights(hparams, detector)
    source = hparams.model if hparams.weights in (PUBLISHED, BACKBONE) else hparams.weights
    own = detector.state_dict()
    if hparams.weights == BACKBONE:
        weights = {name: value for name, value in weights.items() if "backbone." in name}
    else:
        weights = with_rows_for(categories, weights, names, own, class_rows(detector.config, categories))
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    absent = sorted(own.keys() - fitting.keys())
    if hparams.weights == BACKBONE:
        if not fitting:
            raise UserError(
                f"hyperparameters.weights: {source} has no backbone for this model. Fix: give weights of the same "
                "backbone"
            )
        absent = [name for name in absent if "backbone." in name]
        own = {name: value for name, value in own.items() if "backbone." in name}
    log_loaded(len(fitting), len(own), f"hyperparameters.weights: {source}", {"are not in it": absent})
    detector.load_state_dict(fitting, strict=False)


def read_start_weights(
    hparams: DetrHyperparameters, detector: PreTrainedModel
) -> tuple[Mapping[str, torch.Tensor], list[str] | None]:
    """A state dict, and the name of each row of its class head; None if nothing says them.

    Args:
        detector: the model to start.
    """
    source = hparams.model if hparams.weights in (PUBLISHED, BACKBONE) else hparams.weights
    if hparams.weights in (PUBLISHED, BACKBONE) or _is_transformers_folder(source):
        load = auto_model(detector.config).from_pretrained
        found = from_hub(load, source, use_safetensors=True, dtype=torch.float32)
        return found.state_dict(), names_of(found.config)
    if Path(source).is_file() and Path(source).suffix != ".safetensors":
        raise UserError(f"hyperparameters.weights: {source} is not a safetensors file. Fix: save it as safetensors")
    weights, checkpoint = read_weights(source, "hyperparameters.weights", "published, backbone, null")
    if checkpoint is None:
        return in_todays_names(weights, detector), None
    plain = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    return plain, [category["name"] for category in checkpoint.categories]


def in_todays_names(weights: Mapping[str, torch.Tensor], detector: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a file as transformers loads them: it renames some, and fills in those that others are tied to."""
    with refusing("hyperparameters.weights", f"they do not fit a {detector.config.model_type}"):
        loaded, report = type(detector).from_pretrained(
            None,
            config=copy.deepcopy(detector.config),
            state_dict=dict(weights),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return {name: value for name, value in loaded.state_dict().items() if name not in absent}


def _is_transformers_folder(source: str) -> bool:
    folder = Path(source)
    return (folder / "config.json").is_file() and not (folder / CATEGORIES_FILE).is_file()


def names_of(config: PreTrainedConfig) -> list[str] | None:
    """The name of each row of a model's class head, as COCO has it; None if the config numbers them only."""
    names = [str(config.id2label[label]) for label in sorted(config.id2label)]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return [each["name"] for each in COCO_CATEGORIES] if len(names) == len(COCO_CATEGORIES) else None
    return [_COCO_NAME.get(name, name) for name in names]


def class_rows(config: PreTrainedConfig, categories: list[dict]) -> dict[str, int]:
    """By name, the tensors with a row per category, and how many further rows they have at the end.

    They are those whose first dimension grows with the number of categories.
    """
    shapes = []
    for extra in (0, 1):
        more = [*categories, *({"name": f"another {i}"} for i in range(extra))]
        with torch.device("meta"):
            model = build_detector(copy.deepcopy(config), more)
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    fewer, more = shapes
    grown = [name for name, shape in fewer.items() if shape != more[name]]
    return {name: fewer[name][0] - len(categories) for name in grown}


def with_rows_for(
    categories: list[dict],
    weights: Mapping[str, torch.Tensor],
    names: list[str] | None,
    initial: Mapping[str, torch.Tensor],
    rows: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """The weights with the rows of these categories, by name. Other categories keep their initial row.

    Args:
        names: category names of the rows of `weights`; None takes rows for categories in order, if there are as many.
        initial: the state dict of the model that the weights are for.
        rows: as `class_rows` returns it.
    """
    adapted = dict(weights)
    known = {name.lower(): row for row, name in enumerate(names or [])}
    for name, further in rows.items():
        if name not in weights:
            continue
        old, new = weights[name], initial[name].clone()
        if old.shape[1:] != new.shape[1:]:
            continue
        if names is None:
            pairs = [(i, i) for i in range(len(categories))] if old.shape == new.shape else []
        else:
            pairs = [
                (label, known[category["name"].lower()])
                for label, category in enumerate(categories)
                if category["name"].lower() in known
            ]
        new[[label for label, _ in pairs]] = old[[row for _, row in pairs]].to(new.dtype)
        if further:
            new[-further:] = old[-further:].to(new.dtype)
        adapted[name] = new
    return adapted
