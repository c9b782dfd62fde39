"""Reads checkpoints and weights without executing code in them."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from shared.environment import torch_release
from shared.errors import UserError, problem_of
from shared.training.downloads import downloaded, find_checkpoint, forget, is_bucket
from shared.training.saving import check_manifest

CATEGORIES_FILE = "categories.json"


@dataclass
class Checkpoint:
    """A checkpoint of a `DetectionTrial`."""

    path: Path
    weights: dict[str, torch.Tensor]  # of the model that evaluates: the averaged one if the run had one
    training_weights: dict[str, torch.Tensor]  # of the model that was trained
    config: dict[str, Any]  # the experiment config
    hparams: dict[str, Any]  # its hyperparameters, as the run had them
    categories: list[dict]  # COCO categories; the position is the label
    batches: int  # trained so far
    optimizer: dict[str, Any]  # its state
    scaler: dict[str, Any] | None  # the state of the one that scales fp16 losses
    training: dict[str, Any]  # the rest of the training's state
    averaged_weights: dict[str, torch.Tensor] | None
    counts: dict[str, Any]  # batches, epochs and the last validation, by the names of Determined's own loop
    trial_class: str  # the name of the detector's class


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's weights and what is saved with them. Raises UserError if it is not a checkpoint of this project,
    is cut off, changed, or holds code."""
    check_manifest(path)
    state = load_state(path / "state_dict.pth")
    pickles = {pickled.name: _plain_values(pickled) for pickled in path.glob("*.pkl")}
    try:
        load_data = json.loads((path / "load_data.json").read_text())
        metadata = json.loads((path / "metadata.json").read_text())
        training_weights = without_ddp(state["models_state_dict"][0])
        training = dict(state["callbacks"]["training"])
        averaged = training.pop("ema")
        best_of_older_version = state["callbacks"].get("local_run", {})  # saved off a cluster
        training["patience"] = {**(training.get("patience") or {}), **best_of_older_version}
        return Checkpoint(
            path=path,
            weights=training_weights if averaged is None else averaged,
            training_weights=training_weights,
            config=load_data["experiment_config"],
            hparams=load_data["hparams"],
            categories=json.loads((path / CATEGORIES_FILE).read_text()),
            batches=int(metadata["steps_completed"]),
            optimizer={name: state["optimizers_state_dict"][0][name] for name in ("state", "param_groups")},
            scaler=state.get("scaler_state_dict"),
            training=training,
            averaged_weights=averaged,
            counts=pickles.get("trial_state.pkl", {}),
            trial_class=str(load_data.get("trial_cls_spec", "")).rpartition(":")[2],
        )
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint of this project: {error!r}. Fix: give another checkpoint"
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values only. Raises UserError if the file is cut off or would execute
    code."""
    try:
        with _refused_archives():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is cut off or hostile fails in many ways
        # only the first sentence: torch's next ones advise to execute it
        called = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        said = re.split(r"\.?\s*\n|\.\s", str(error).strip())[0]
        reason = f"it calls {called[1]}" if called else said or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights ({reason}): it is truncated, or holds more than tensors. Fix: give "
            "another checkpoint"
        ) from error


_PATCHING = threading.Lock()


@contextlib.contextmanager
def _refused_archives() -> Iterator[None]:
    """`torch.load` opens no TorchScript and no tar archive. Before torch 2.6 it executes code in them even with
    `weights_only` (CVE-2025-32434). It asks tarfile about every file that is no ZIP file."""
    if torch_release() >= (2, 6):  # refuses them itself
        yield
        return

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise tarfile.ReadError("it is a TorchScript or tar archive, which may hold code")

    # two threads at once would each put the other's patch back, and it would stay
    with _PATCHING, mock.patch.object(torch.jit, "load", refuse), mock.patch.object(tarfile, "open", refuse):
        yield


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _plain_values(path: Path) -> Any:
    """The content of a checkpoint's own pickle. Raises UserError if it is more than plain values."""
    try:
        with path.open("rb") as file:
            return _PlainValues(file).load()
    except Exception as error:  # a pickle that is cut off or hostile fails in many ways
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated, or holds more than plain values. Fix: give another "
            "checkpoint"
        ) from error


def read_weights(source: str, key: str, choices: str) -> tuple[Mapping[str, Any], Checkpoint | None]:
    """The content of a file, a URL or one of our checkpoints: a state dict, or what a library wrote around one. Also
    the checkpoint, if it is one.

    Args:
        key, choices: for an error, the hyperparameter that names the source, and what else it may be.

    Raises:
        UserError: the source cannot be read, is cut off, or holds code.
    """
    if "://" in source and not is_bucket(source):
        try:
            return read_url(source), None
        except OSError as error:
            raise UserError(f"{key}: {source} cannot be downloaded: {error}. Fix: give a file") from error
    if Path(source).is_file():
        return read_weights_file(Path(source)), None
    try:
        checkpoint = read_checkpoint(find_checkpoint(source))
    except UserError as error:
        raise UserError(f"{key}: {problem_of(error)}. Fix: give {choices}, a file, a URL or a checkpoint") from error
    return checkpoint.weights, checkpoint


def read_url(url: str) -> Mapping[str, Any]:
    """The weights of a URL. A download that cannot be read is deleted.

    Raises:
        OSError: the download failed.
        UserError: the file is cut off, or holds code.
    """
    path = downloaded(url)
    try:
        return read_weights_file(path)
    except UserError:
        forget(url)
        raise


def read_weights_file(path: Path) -> Mapping[str, Any]:
    """The weights of a file: safetensors, or what `torch.save` wrote. Raises UserError as `load_state` does."""
    if path.suffix != ".safetensors":
        return load_state(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({error}): it is truncated, or not a safetensors file. Fix: download it "
            "again, or give another file"
        ) from error


def without_ddp(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefix that DistributedDataParallel gives its keys, also in `_metadata`: modules use
    these versions to load older names."""
    plain = OrderedDict(weights)
    if versions := getattr(weights, "_metadata", None):
        plain._metadata = OrderedDict(versions)
    consume_prefix_in_state_dict_if_present(plain, "module.")
    return plain


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Loads all of a state dict.

    Raises:
        UserError: the weights are another model's. The message names parameters that differ.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or shapes:
        parts = [
            f"{len(names)} {what} (the first is {sorted(names)[0]})"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        raise UserError(
            f"{source} holds the weights of another model, of {len(own)} parameters and buffers: {', '.join(parts)}. "
            "Fix: use the config that it was trained with"
        )
    model.load_state_dict(weights)
