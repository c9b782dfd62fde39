"""Weights to start from, in the model zoo, a file, a URL or a checkpoint, without executing pickled code."""

from __future__ import annotations

import json
import logging
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import _IncompatibleKeys
from iopath.common.file_io import HTTPURLHandler
from torch import nn

from detectron2_files.config import shipped_configs
from detectron2_files.plain_pickle import unpickle_arrays
from shared.config.schema import PUBLISHED
from shared.errors import UserError, nearest, problem_of
from shared.library import log_loaded
from shared.training.checkpoints import CATEGORIES_FILE, load_state, without_ddp
from shared.training.downloads import downloaded, find_checkpoint

logging.getLogger("fvcore.common.checkpoint").setLevel(logging.ERROR)  # a line for each weight
logging.getLogger("detectron2.checkpoint").setLevel(logging.ERROR)

# the layers whose size follows from the data's categories or keypoints
_OF_CLASSES = ("cls_score", "bbox_pred", "predictor", "score_lowres", "cls_logits", "ctrness")


class _Downloads(HTTPURLHandler):
    """URLs, and what Detectron2 makes of `detectron2://` and `catalog://`. iopath keeps them by their path alone,
    whatever the server, and keeps a part of a file too."""

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any) -> str:
        return str(downloaded(path))


PathManager.register_handler(_Downloads(), allow_override=True)


def zoo_weights(config: Path) -> str:
    """The URL of the weights that the model zoo publishes for one of its configs.

    Raises:
        UserError: it publishes none.
    """
    from detectron2.model_zoo import get_checkpoint_url  # imports pkg_resources, which newer setuptools lack

    zoo = shipped_configs()
    name = str(config.relative_to(zoo)) if config.is_relative_to(zoo) else config.name
    try:
        return get_checkpoint_url(name)
    except RuntimeError as error:
        published = []
        for other in zoo.rglob("*.*"):
            try:
                get_checkpoint_url(str(other.relative_to(zoo)))
            except RuntimeError:
                continue
            published.append(str(other.relative_to(zoo)))
        raise UserError(
            f"hyperparameters.weights: published: the model zoo has no weights for {name}"
            f"{nearest(name, published, otherwise='give a config that its MODEL_ZOO.md lists, a file or a URL')}"
        ) from error


def start_of(given: str | None, config: Any, for_training: bool, submitted: Path) -> tuple[str, str] | None:
    """The weights that a model starts from, and the key that names them; None for initial weights.

    Args:
        given: `hyperparameters.weights`.
        submitted: the detector's folder, in which a relative path is looked for.

    Raises:
        UserError: the file does not exist, or nothing is published for the config.
    """
    if given == PUBLISHED:
        return zoo_weights(config.path), "hyperparameters.weights"
    source = config.weights if given is None else given
    if not source or (not for_training and "ImageNetPretrained" in source):
        return None
    key = "hyperparameters.weights" if given else "the config's weights"
    return find_weights(source, key, (submitted, config.path.parent)), key


def find_weights(source: str, key: str, places: Sequence[Path]) -> str:
    """The URL, the path of a file or of a checkpoint's `state_dict.pth`.

    Args:
        places: folders that a relative path may be relative to, beside the one that the run was started in.

    Raises:
        UserError: there is none; says where it was looked for.
    """
    if "://" in source:
        return source
    path, *query = source.split("?")
    for place in (Path(), *places):
        for file in (place / path, place / path / "state_dict.pth"):
            if file.is_file():
                return "?".join([str(file), *query])
    try:
        return str(find_checkpoint(source) / "state_dict.pth")
    except UserError as error:
        looked = f"; looked in {', '.join(map(str, places))} (.detignore keeps .pth files out of the submitted folder)"
        raise UserError(
            f"{key}: {problem_of(error)}{'' if Path(path).is_absolute() else looked}. Fix: give a file, a URL, a "
            "detectron2:// name or a checkpoint"
        ) from error


def load_weights_into(model: nn.Module, source: str, key: str, class_counts: Mapping[str, int] | None = None) -> None:
    """Start from `source`, which `find_weights` gives: a file (.pkl and .pyth of Detectron, .pth), a URL, a
    `detectron2://` name or a checkpoint of ours. A head for other classes keeps its initial values, said in one line,
    where it is trained.

    Args:
        class_counts: where nothing is trained, what the config says of classes, by key: every parameter must fit then.

    Raises:
        UserError: it cannot be had, holds code, or is of another architecture, or of other classes than are detected.
    """
    reader = _Reader(model)
    try:
        reader.load(source)
    except UserError:
        raise
    except (OSError, urllib.error.URLError, ValueError, AssertionError) as error:
        raise UserError(
            f"{key}: {source} cannot be downloaded: {error}. Fix: without internet, give a file, "
            "hyperparameters.weights: PATH, or start from random weights, weights: ''"
        ) from error
    if class_counts is not None:
        _refuse_random_values(model, reader.incompatible, class_counts, source, key)
    _judge(model, reader.incompatible, reader.by_heuristics, source, key)


def _refuse_random_values(
    model: nn.Module, incompatible: _IncompatibleKeys, class_counts: Mapping[str, int], source: str, key: str
) -> None:
    """Raises UserError where a parameter would detect with what it was initialized with."""
    advice = "use the config_file that they were trained with"
    for name, theirs, own in incompatible.incorrect_shapes:
        of_kind = [k for k in class_counts if ("sem_seg" in name) == ("sem_seg" in k.lower()) and _of_classes(name)]
        for class_key in of_kind[:1]:
            count = class_counts[class_key]
            background = "sem_seg" not in name and own[0] == count + 1
            classes = theirs[0] - 1 if background else theirs[0] * count // own[0]
            advice += f", or with their number of classes, config_overrides: {{{class_key}: {classes}}}"
        raise UserError(
            f"{key}: {source} does not fit: {name} is {tuple(theirs)} in it and {tuple(own)} in the model, which would "
            f"detect with random values there. Fix: {advice}"
        )
    parameters = {name for name, _ in model.named_parameters()}
    if missing := [name for name in incompatible.missing_keys if name in parameters]:
        raise UserError(
            f"{key}: {source} lacks, or has in another shape, {len(missing)} of the model's {len(parameters)} "
            f"parameters, the first is {missing[0]}, which would detect with random values. Fix: {advice}"
        )


def categories_of_checkpoint(source: str) -> list[dict] | None:
    """The COCO categories of a checkpoint of ours; None for any other weights."""
    path = Path(source).parent / CATEGORIES_FILE
    return json.loads(path.read_text()) if Path(source).name == "state_dict.pth" and path.is_file() else None


class _Reader(DetectionCheckpointer):
    """Detectron2's reader of all its formats, with safe unpickling."""

    def __init__(self, model: nn.Module):
        super().__init__(model, save_to_disk=False)
        self.incompatible = _IncompatibleKeys([], [], [])
        self.by_heuristics = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            loaded = unpickle_arrays(Path(filename))
            if "model" not in loaded or "__author__" not in loaded:  # Caffe2 or Detectron 1
                blobs = loaded.get("blobs", loaded)
                blobs = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
                loaded = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        elif filename.endswith(".pyth"):
            state = load_state(Path(filename))["model_state"]
            state = {name: weight for name, weight in state.items() if not name.endswith("num_batches_tracked")}
            loaded = {"model": state, "__author__": "pycls", "matching_heuristics": True}
        else:
            loaded = super()._load_file(filename)
        self.by_heuristics = bool(loaded.get("matching_heuristics"))
        return loaded

    def _torch_load(self, filename: str) -> dict[str, Any]:
        state = load_state(Path(filename))
        if "models_state_dict" in state:  # a checkpoint of ours
            return {"model": without_ddp(state["models_state_dict"][0])}
        return state

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        self.incompatible = incompatible


def _judge(model: nn.Module, incompatible: _IncompatibleKeys, by_heuristics: bool, source: str, key: str) -> None:
    """One line of what was loaded; an error where it is another model's."""
    own = model.state_dict()
    missing = [name for name in incompatible.missing_keys if not name.endswith("num_batches_tracked")]
    other_classes = [name for name, *_ in incompatible.incorrect_shapes if _of_classes(name)]
    wrong = [name for name, *_ in incompatible.incorrect_shapes if name not in other_classes]
    if not by_heuristics:  # a whole detector: its backbone must be this one, layer by layer
        wrong += [name for name in missing if name.startswith("backbone.") and name not in other_classes]
        wrong += [name for name in incompatible.unexpected_keys if name.startswith("backbone.")]
    loaded = len(own) - len(set(missing) | {name for name, *_ in incompatible.incorrect_shapes})
    if wrong or not loaded:
        shown = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise UserError(
            f"{key}: {source} is of another architecture: "
            + (f"{len(wrong)} parameters do not fit ({shown})" if loaded else "none of its parameters is this model's")
            + ". Fix: use the config that it was trained with"
        )
    absent = [name for name in missing if name not in other_classes]
    log_loaded(loaded, len(own), source, {"are for other classes": other_classes, "are not in it": absent})


def _of_classes(name: str) -> bool:
    return any(part in name for part in _OF_CLASSES)
