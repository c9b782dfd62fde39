"""The content of a checkpoint, its copy in the host's memory, and the thread that writes it beside the training."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import operator
import pickle
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from determined.pytorch import PyTorchTrialContext
from torch import nn

from shared.durable import write_file
from shared.errors import DivergedError, UserError
from shared.log import redact_yaml_files
from shared.training.downloads import sha256_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
METADATA = "metadata.json"

# --- the state --------------------------------------------------------------------------------------------


def checkpoint_state(
    context: PyTorchTrialContext, model: nn.Module, scaler: torch.amp.GradScaler | None, training: dict[str, Any]
) -> dict[str, Any]:
    """What `state_dict.pth` holds, by the names of Determined's own loop. Not a copy yet. `model` is without DDP.

    It holds no state of random generators: each batch and each validation seeds them.
    """
    return {
        "models_state_dict": [model.state_dict()],
        "optimizers_state_dict": [optimizer.state_dict() for optimizer in context.optimizers],
        "lr_schedulers_state_dict": [],
        "callbacks": {"training": training},
        **({} if scaler is None else {"scaler_state_dict": scaler.state_dict()}),
    }


class FiniteCheck:
    """Refuses weights, averages and running statistics that are not finite, but for those that began so: an attention
    mask of -inf, for example."""

    def __init__(self, *models: nn.Module):
        self.models = tuple(dict.fromkeys(models))
        self._never_finite = {key for key, tensor in self._tensors() if not tensor.isfinite().all()}

    def raise_if_undefined(self) -> None:
        checked = [tensor for key, tensor in self._tensors() if key not in self._never_finite]
        # the largest of each: one number per tensor, and one synchronization in all
        if not torch.stack([tensor.abs().max().float() for tensor in checked]).isfinite().all():
            raise DivergedError(
                "the weights, their averages or the running statistics are not finite, and were not saved. Fix: lower "
                "the learning rate, or set hyperparameters.clip_grad"
            )

    def _tensors(self) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
        for number, model in enumerate(self.models):
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and tensor.numel():
                    yield (number, name), tensor


def python_state(model: nn.Module, attributes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The state of the model that a resumed run needs besides its weights and buffers, as plain numbers.

    Args:
        attributes: by the name of a module's class, the dotted attributes that it keeps, if they are there yet.
    """
    state = {}
    for name, module in model.named_modules():
        for path in attributes.get(type(module).__name__, ()):
            with contextlib.suppress(AttributeError):
                state[f"{name}:{path}"] = _plain(operator.attrgetter(path)(module))
    return state


def restore_python_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Continues from what `python_state` gave."""
    for key, value in state.items():
        name, path = key.split(":")
        owner, _, attribute = path.rpartition(".")
        module = model.get_submodule(name)
        setattr(operator.attrgetter(owner)(module) if owner else module, attribute, value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value


# --- the copy ---------------------------------------------------------------------------------------------


class HostCopy:
    """Copies states into the host's memory, where nothing changes them. The next copy uses the same memory: pages that
    are new to a process cost several times the copying."""

    def __init__(self) -> None:
        self._kept: dict[tuple, torch.Tensor] = {}

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same structure, whose tensors share memory where those of `state` do. Valid until the next call."""
        tensors = list(_tensors(state))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        copies = {}
        kept, self._kept = self._kept, {}
        for number, (address, storage) in enumerate(storages.items()):
            on_gpu = storage.device.type == "cuda"  # from where only pinned memory is copied to at full speed
            key = (number, storage.nbytes(), on_gpu)
            buffer = kept.get(key)
            if buffer is None:
                buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            copies[address] = self._kept[key] = buffer.copy_(source, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

        def on_host(tensor: torch.Tensor) -> torch.Tensor:
            storage = copies[tensor.untyped_storage().data_ptr()].untyped_storage()
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

        return copy.deepcopy(state, {id(tensor): on_host(tensor) for tensor in tensors})


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is not written yet."""

    state: dict[str, Any]  # `checkpoint_state`, on the host
    counts: dict[str, Any]  # batches and epochs, by the names of Determined's own loop
    load_data: dict[str, Any]  # the trial's class, config and hyperparameters, for `load_trial_from_checkpoint_path`
    metadata: dict[str, Any]  # what the master knows of it
    is_best: bool  # of the best validation so far
    write_own: Callable[[Path], None]  # adds the detector's own files

    def write(self, folder: Path, code: Path) -> None:
        """Writes the files of Determined's names, a copy of the folder `code` without secrets, the detector's own files
        and the manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(code, folder / "code")
        redact_yaml_files(folder / "code")
        # given a name instead of a file, torch holds Python's lock while it writes a tensor, and the training waits
        with (folder / "state_dict.pth").open("wb") as file:
            torch.save(self.state, file)
        (folder / "trial_state.pkl").write_bytes(pickle.dumps(self.counts))
        (folder / "load_data.json").write_text(json.dumps(self.load_data))
        self.write_own(folder)
        write_manifest(folder, self.metadata["steps_completed"])


def write_manifest(folder: Path, batches: int) -> None:
    """Writes the size and SHA-256 of each file in a checkpoint's folder, and the batches trained.

    Determined writes metadata.json later, so that the manifest holds its number of batches instead of its digest.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, METADATA)
    }
    write_file(folder / MANIFEST, json.dumps({"batches": batches, "files": files}, indent=1))


def check_manifest(folder: Path) -> None:
    """Checks each file against the manifest. A checkpoint without a manifest passes: those of version 0.1 have none.
    Raises UserError if a file is missing, cut off or changed."""
    try:
        problem = _difference_from_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is incomplete: {MANIFEST} cannot be read ({error!r})"
    if problem is not None:
        raise UserError(f"{folder} {problem}. Fix: use another checkpoint")


def _difference_from_manifest(folder: Path) -> str | None:
    if not (folder / MANIFEST).exists():
        return None
    noted_at_save = json.loads((folder / MANIFEST).read_text())
    for name, noted in noted_at_save["files"].items():
        file = folder / name
        if not file.is_file():
            return f"is incomplete: {name} is missing"
        if (size := file.stat().st_size) != noted["bytes"]:
            return f"is incomplete: {name} has {size} bytes instead of {noted['bytes']}"
        if sha256_of(file) != noted["sha256"]:
            return f"has changed since it was saved: {name} differs"
    batches = noted_at_save.get("batches")  # manifests of version 0.1 lack it
    if batches is not None and saved_batches(folder) != batches:
        return f"has changed since it was saved: {METADATA} is not of batch {batches}"
    return None


def saved_batches(folder: Path) -> int:
    """The batches trained of a checkpoint; -1 without one that can be read."""
    try:
        return int(json.loads((folder / METADATA).read_text())["steps_completed"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


# --- the thread -------------------------------------------------------------------------------------


class Background:
    """Does work in a thread, in the order in which it is given. The thread stops when no work is left.

    It is a daemon thread: a second Ctrl-C stops the process without waiting for it. Leaving the context waits.

    Args:
        on_error: receives each error, in the thread. Without it `wait`, `raise_if_failed` or the end of the context
            raises the first error, once. If another error leaves the context, the first error is logged.
    """

    def __init__(self, name: str = "saving", on_error: Callable[[Exception], None] | None = None):
        self.name = name
        self._on_error = on_error or self._keep
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None  # the last one
        self._error: Exception | None = None
        self.is_idle = True

    def begin(self, work: Callable[[], None]) -> None:
        """Does `work` after what was given before."""
        with self._lock:
            self._waiting.append(work)
            if self.is_idle:
                self.is_idle = False
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all work is done, at most `seconds`. Returns whether it is."""
        if self._thread is not None:
            self._thread.join(seconds)  # a program that exits while a thread frees tensors is aborted
        self.raise_if_failed()
        return self.is_idle

    def raise_if_failed(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _keep(self, error: Exception) -> None:
        self._error = self._error or error

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self.is_idle = True
                    return
                work = self._waiting.popleft()
            try:
                work()
            except Exception as error:
                self._on_error(error)
            del work  # and the tensors that it holds, before the work counts as done

    def __enter__(self) -> Background:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            logger.error("%s failed: %s: %s", self.name, type(own).__name__, own)
