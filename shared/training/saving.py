"""Checkpoints that are written beside the training: it stands still for a copy in the host's memory alone."""

from __future__ import annotations

import copy
import json
import logging
import operator
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from determined import util
from determined.pytorch import PyTorchCallback, PyTorchTrialContext
from torch import nn


def python_state(model: nn.Module, attributes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a resumed run needs of the model beside its weights and buffers, as plain numbers.

    Args:
        attributes: for the name of a module's class, the dotted attributes that it keeps; one that is not there yet is
            left out.
    """
    state = {}
    for name, module in model.named_modules():
        for path in attributes.get(type(module).__name__, ()):
            try:
                state[f"{name}:{path}"] = _plain(operator.attrgetter(path)(module))
            except AttributeError:
                continue
    return state


def restore_python_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Takes back what `python_state` gave."""
    for key, value in state.items():
        name, path = key.split(":")
        *owners, attribute = path.split(".")
        owner = model.get_submodule(name)
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value


logger = logging.getLogger(__name__)


def checkpoint_state(context: PyTorchTrialContext, callbacks: Mapping[str, PyTorchCallback]) -> dict[str, Any]:
    """What `state_dict.pth` holds, as Determined's `_PyTorchTrialController._load` reads it: not a copy yet.

    Raises:
        DivergedError: something of it is not finite.
    """
    random_state = {
        "cpu_rng_state": torch.random.get_rng_state(),
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
    }
    if torch.cuda.device_count():
        random_state["gpu_rng_state"] = torch.cuda.get_rng_state(context.distributed.local_rank)
    state = {
        "models_state_dict": [model.state_dict() for model in context.models],
        "optimizers_state_dict": [optimizer.state_dict() for optimizer in context.optimizers],
        "lr_schedulers_state_dict": [scheduler.state_dict() for scheduler in context.lr_schedulers],
        "callbacks": {name: callback.state_dict() for name, callback in callbacks.items()},
        "rng_state": random_state,
    }
    if context._scaler:
        state["scaler_state_dict"] = context._scaler.state_dict()
    for callback in callbacks.values():
        callback.on_checkpoint_save_start(state)
    return state


class HostCopy:
    """Copies states into the host's memory, where nothing changes them. The memory is kept, and used again by the next
    copy: pages that are new to a process cost several times the copying."""

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
    """What a checkpoint will hold, in files of Determined's names.

    Attributes:
        state: `checkpoint_state`, on the host.
        counts: Determined's own, of batches and epochs.
        load_data: what the trial is: its class, config and hyperparameters.
    """

    state: dict[str, Any]
    counts: dict[str, Any]
    load_data: dict[str, Any]

    def write(self, folder: Path, on_cluster: bool) -> None:
        """Writes the files, and the code that was submitted."""
        folder.mkdir(parents=True, exist_ok=True)
        util.write_user_code(folder, on_cluster)
        # a file of Python's: of one that it is given the name of, torch writes each tensor without letting go of
        # Python's lock, which the training waits for
        with (folder / "state_dict.pth").open("wb") as file:
            torch.save(self.state, file)
        (folder / "trial_state.pkl").write_bytes(pickle.dumps(self.counts))
        (folder / "load_data.json").write_text(json.dumps(self.load_data))


class Background:
    """Does one thing at a time in a thread. Left, it has done it.

    An error there is raised by `raise_if_failed`, by `wait` and where it is left, once; beside another error, which
    wins, it is logged.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_idle(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Waits for what was begun before, and begins `work`."""
        self.wait()
        # a daemon: a second Ctrl-C ends the process without waiting
        self._thread = threading.Thread(target=self._do, args=(work,), name="saving", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error

    def __enter__(self) -> Background:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            logger.error("the last checkpoint was not written: %s: %s", type(own).__name__, own)
