"""Errors that a user can fix: shown as a single line, without a traceback. Imports no torch at the top."""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FEW = 10  # valid names that an error lists


class UserError(ValueError):
    """Bad input. The message names the problem, its place (file, key, image id) and the fix."""


class DivergedError(ArithmeticError):
    """The loss is not finite. More training would only destroy the weights."""


def problem_of(error: Exception) -> str:
    """An error's message without its fix, for a message that has another one."""
    return str(error).partition(". Fix: ")[0]


def similar_names(name: str, valid: Iterable[str]) -> list[str]:
    """At most three valid names that may be meant by an unknown one, the nearest first."""
    valid = sorted(set(valid))
    initials = "".join(word[:1] for word in name.split("_"))
    parts = [name_ for name_ in valid if name_.startswith(f"{name}_") or name_.endswith(f"_{name}")]
    parts += [name_ for name_ in valid if name_ == initials and len(initials) > 1]  # learning_rate: lr
    other_case = [name_ for name_ in valid if name_.casefold() == name.casefold()]
    if found := other_case or parts:
        return found[:3]
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, each, name).ratio() for each in close]
    return [each for each, like in zip(close, likeness, strict=True) if like > likeness[0] - 0.1]


def any_of(names: Iterable[object]) -> str:
    """ "'a', 'b' or 'c'"."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, valid: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error message about an unknown name: at most three similar ones, else `otherwise`, else all of a
    few valid ones."""
    valid = sorted(set(valid))
    if close := similar_names(name, valid):
        return f"; did you mean {any_of(close)}?"
    if otherwise is None and len(valid) > _FEW:
        valid = [*difflib.get_close_matches(name, valid, n=3, cutoff=0), "…"]
    return f". Fix: {otherwise or 'use one of ' + ', '.join(valid)}"


def nearest_path(path: str) -> str:
    """The end of an error message about a path that does not exist: a similar path that does."""
    missing = Path(path)
    folder = next(parent for parent in missing.absolute().parents if parent.is_dir())
    name = missing.absolute().relative_to(folder).parts[0]
    others = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    alike = [other for other in others if same_on_any_disk(other) == same_on_any_disk(name)]
    alike += difflib.get_close_matches(name, sorted(others), n=1, cutoff=0.6)
    deeper = sorted(str(found) for found in folder.glob(f"*/{glob.escape(name)}"))
    if alike or deeper:
        return f"did you mean {folder / alike[0] if alike else deeper[0]}?"
    return f"{folder} {'has no ' + name if others else 'is empty'}. Fix: correct the path"


def same_on_any_disk(name: str) -> str:
    """The name without upper case, and with accents encoded in one way. Two names with the same result are one file on
    some disks, as on macOS."""
    return unicodedata.normalize("NFC", name).casefold()


def check_outputs(option: str, outputs: Iterable[Path], inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raises UserError if one of the files to write is an input.

    Args:
        option: the command line's option, for the error.
        inputs: files, folders, URLs or None.
    """
    there = [os.fspath(path) for path in inputs if path is not None and os.path.exists(path)]
    for output in outputs:
        if output.exists() and any(os.path.samefile(output, path) for path in there):
            raise UserError(f"{option}: {output} would be replaced, and is an input. Fix: give another name or folder")


def count_of(number: int, what: str) -> str:
    """ "1 slot", "2 slots", "2 boxes", "2 batches", "2 categories"."""
    if number == 1:
        return f"1 {what}"
    if what.endswith("y"):
        return f"{number} {what[:-1]}ies"
    return f"{number} {what}{'es' if what.endswith(('x', 'ch')) else 's'}"


def tell_torchrun(line: str) -> None:
    """Hands the line with which this process exits to torchrun, if it started the process: its report comes last."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        failure = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": failure}))


# --- a GPU's memory --------------------------------------------------------------------------------


@contextlib.contextmanager
def out_of_memory_as(explain: Callable[[torch.cuda.OutOfMemoryError], UserError]) -> Iterator[None]:
    """Raises what `explain` returns if the GPU's memory is not enough."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise explain(error) from error


def out_of_memory(
    where: str,
    images: Any,
    fix: str,
    model: torch.nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    device: torch.device,
) -> UserError:
    """The error of a batch, with what to do. `images` are (B, …, height, width), or a list of (…, height, width)."""
    import torch

    kept, peak = bytes_kept(model, optimizers), torch.cuda.max_memory_allocated(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    sizes = _sizes_of(images)
    pixels = f" of {sizes} pixels" if sizes else ""
    return UserError(
        f"CUDA out of memory in {where}{pixels}: weights, gradients and optimizer take {_gib(kept)}, the batch takes "
        f"{_gib(max(peak - kept, 0))} and what did not fit, of {_gib(whole)}. Fix: {fix}"
    )


def out_of_memory_anywhere(error: torch.cuda.OutOfMemoryError) -> UserError:
    """The error outside of a batch: when a model is moved to the device, for example."""
    said = str(error).strip().partition("\n")[0].partition(" If reserved but")[0].rstrip(".")
    return UserError(
        f"{said}. Fix: stop other programs that use this GPU (`nvidia-smi` lists them), or give a smaller "
        "hyperparameters.global_batch_size, or hyperparameters.amp"
    )


def smaller_batch(per_slot_batch_size: int, slots: int, aggregation_frequency: int | None) -> str:
    """What to do about a batch that is too large. `aggregation_frequency` is None to evaluate or predict."""
    smaller = max((n for n in range(1, per_slot_batch_size) if per_slot_batch_size % n == 0), default=None)
    if smaller is None:
        return "a slot has one image already; give smaller images, or hyperparameters.amp"
    if aggregation_frequency is None:
        return f"--set hyperparameters.global_batch_size={smaller * slots} detects on fewer images at a time"
    frequency = aggregation_frequency * (per_slot_batch_size // smaller)
    return (
        f"hyperparameters.global_batch_size: {smaller * slots} with optimizations.aggregation_frequency: {frequency} "
        "has the same images in a step, and hyperparameters.amp takes less"
    )


def bytes_kept(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of weights, buffers, gradients and optimizer state."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sizes_of(images: Any) -> str:
    """ "1333 × 800", or "640 × 480 to 1333 × 800" of several sizes; width first."""
    import torch

    tensors = images if isinstance(images, list | tuple) else [images]
    found = {(t.shape[-1], t.shape[-2]) for t in tensors if isinstance(t, torch.Tensor) and t.ndim >= 3}
    ordered = sorted(found, key=lambda size: size[0] * size[1])
    return " to ".join(dict.fromkeys(f"{width} × {height}" for width, height in (*ordered[:1], *ordered[-1:])))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
