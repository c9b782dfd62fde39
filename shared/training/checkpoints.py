"""Reads checkpoints and weights without executing code in them; writes and checks a checkpoint's manifest."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.durable import write_file
from shared.errors import UserError
from shared.training.checkpoint_folder import find_checkpoint
from shared.training.downloads import downloaded, forget
from shared.training.torch_file import read_torch_file

MANIFEST = "manifest.json"
METADATA = "metadata.json"
_WEIGHTS = "state_dict.pth"


def write_manifest(folder: Path, batches: int) -> None:
    """Writes the size and SHA-256 of each file in a checkpoint's folder, and the batches trained.

    Determined writes metadata.json later, so that the manifest holds its number of batches instead of its digest.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, METADATA)
    }
    write_file(folder / MANIFEST, json.dumps({"batches": batches, "files": files}, indent=1))


def check_manifest(folder: Path) -> None:
    """Checks each file against the manifest. A checkpoint without a manifest passes: those of version 0.1 have none.

    Raises:
        UserError: a file is missing, cut off or changed.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        noted_at_save = json.loads(manifest.read_text())
        for name, noted in noted_at_save["files"].items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{folder} is not whole: {name} is missing")
            if (size := file.stat().st_size) != noted["bytes"]:
                raise UserError(f"{folder} is not whole: {name} has {size} bytes, and {noted['bytes']} were saved")
            if _digest(file) != noted["sha256"]:
                raise UserError(f"{folder} is not what was saved: {name} has changed since")
        batches = noted_at_save.get("batches")  # manifests of version 0.1 lack it
        if batches is not None and json.loads((folder / METADATA).read_text())["steps_completed"] != batches:
            raise UserError(f"{folder} is not what was saved: {METADATA} is not of batch {batches}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not whole: {MANIFEST} or {METADATA} cannot be read ({error!r})") from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's state_dict.pth; from the manifest if there is one."""
    try:
        return json.loads((folder / MANIFEST).read_text())["files"][_WEIGHTS]["sha256"]
    except FileNotFoundError:
        return _digest(folder / _WEIGHTS)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):  # of Python 3.11 on
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


CATEGORIES_FILE = "categories.json"


@dataclass
class Checkpoint:
    """A checkpoint of a `DetectionTrial`.

    Attributes:
        weights: the model's state dict; the averaged one where the run had one.
        training_weights: the state dict of the model that was trained.
        config: the experiment config; hparams: its hyperparameters, as the run had them.
        categories: COCO categories; the position is the label.
        batches: trained so far.
        optimizer_groups: the parameter groups of the optimizer's state.
        training: what the training kept besides weights and optimizer, without the averaged weights.
        averaged_weights: None without.
        state: all of `state_dict.pth`.
        counts: batches, epochs and the last validation, by the names of Determined's own loop.
        trial_class: the name of the detector's class.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    training_weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    hparams: dict[str, Any]
    categories: list[dict]
    batches: int
    optimizer_groups: list[dict[str, Any]]
    training: dict[str, Any]
    averaged_weights: dict[str, torch.Tensor] | None
    state: dict[str, Any]
    counts: dict[str, Any]
    trial_class: str

    @property
    def best_of_older_version(self) -> dict[str, Any]:
        """The best validation, as older versions saved it off a cluster; {} in newer checkpoints."""
        return self.state["callbacks"].get("local_run", {})


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's weights and what is saved with them.

    Raises:
        UserError: it is not a checkpoint of this project, is cut off, changed, or holds code.
    """
    check_manifest(path)
    state = load_state(path / "state_dict.pth")
    pickles = {pickled.name: _plain_values(pickled) for pickled in path.glob("*.pkl")}
    try:
        load_data = json.loads((path / "load_data.json").read_text())
        metadata = json.loads((path / "metadata.json").read_text())
        training_weights = without_ddp(state["models_state_dict"][0])
        training = dict(state["callbacks"]["training"])
        averaged = training.pop("ema")
        return Checkpoint(
            path=path,
            weights=training_weights if averaged is None else averaged,
            training_weights=training_weights,
            config=load_data["experiment_config"],
            hparams=load_data["hparams"],
            categories=json.loads((path / CATEGORIES_FILE).read_text()),
            batches=int(metadata["steps_completed"]),
            optimizer_groups=state["optimizers_state_dict"][0]["param_groups"],
            training=training,
            averaged_weights=averaged,
            state=state,
            counts=pickles.get("trial_state.pkl", {}),
            trial_class=str(load_data.get("trial_cls_spec", "")).rpartition(":")[2],
        )
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or is not whole: {error!r}") from error


def load_state(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values only.

    Raises:
        UserError: the file is cut off or would execute code.
    """
    try:
        if not _loads_weights_only():
            return read_torch_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is cut off or hostile fails in many ways
        called = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own words advise to execute it
        reason = f"it calls {called[1]}" if called else str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights ({reason}); it is cut off, or holds more than tensors"
        ) from (error)


def _loads_weights_only() -> bool:
    """Whether `torch.load(weights_only=True)` executes nothing: before 2.6 it does (CVE-2025-32434)."""
    return torch.__version__ >= "2.6"


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _plain_values(path: Path) -> Any:
    """The content of a checkpoint's own pickle.

    Raises:
        UserError: more than plain values.
    """
    try:
        with path.open("rb") as file:
            return _PlainValues(file).load()
    except Exception as error:  # a pickle that is cut off or hostile fails in many ways
        raise UserError(f"{path} cannot be read ({error}); it is cut off, or holds more than plain values") from error


def read_weights(source: str, key: str, choices: str) -> tuple[Mapping[str, Any], Checkpoint | None]:
    """The content of a file, a URL or one of our checkpoints: a state dict, or what a library wrote around one. Also
    the
    checkpoint, if it is one.

    Args:
        key: the hyperparameter that names the source, for an error.
        choices: what else the hyperparameter may be, for an error.

    Raises:
        UserError: the source cannot be read, is cut off, or holds code.
    """
    if "://" in source:
        try:
            return read_url(source), None
        except OSError as error:
            raise UserError(f"{key}: {source} cannot be had: {error}") from error
    if Path(source).is_file():
        return read_weights_file(Path(source)), None
    try:
        checkpoint = read_checkpoint(find_checkpoint(source))
    except UserError as error:
        raise UserError(f"{key}: {error}. Give {choices}, a file, a URL or a checkpoint") from error
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
    """The weights of a file: safetensors, or what `torch.save` wrote.

    Raises:
        UserError: it is cut off, or holds code.
    """
    if path.suffix != ".safetensors":
        return load_state(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as weights ({error}); it is cut off, or no safetensors") from error


def without_ddp(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefix that DistributedDataParallel gives its keys. `_metadata`, the versions of its
    modules, loses it too: modules use them to load older names."""
    plain = OrderedDict((name.removeprefix("module."), tensor) for name, tensor in weights.items())
    if versions := getattr(weights, "_metadata", None):
        plain._metadata = OrderedDict(
            ("" if name == "module" else name.removeprefix("module."), value) for name, value in versions.items()
        )
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
            "Use the config that it was trained with"
        )
    model.load_state_dict(weights)
