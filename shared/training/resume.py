"""How a run continues from a checkpoint: which one, and what it takes from it instead of from its own config.

Training changes some options of an optimizer itself, such as the learning rate. A config changes others. A checkpoint
therefore also holds the options as its run's config built them. If an option differs from them, the config changed it,
and this run's value wins. Every other option continues with its saved value.

The last functions copy a checkpoint to the machines of the run, which need not share a disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from determined.core import DistributedContext
from torch import nn
from torch.optim import Optimizer

from shared.errors import UserError, problem_of
from shared.training.checkpoints import Checkpoint, read_checkpoint
from shared.training.downloads import find_checkpoint
from shared.training.processes import on_chief, on_every_rank
from shared.training.run_folder import OF_THE_RUN, RunFolder
from shared.training.saving import MANIFEST, check_manifest, saved_batches

logger = logging.getLogger(__name__)

# what schedulers copy from an option before they change it, by the options that it is copied from
_COPIES = {"initial_lr": {"lr"}, "initial_momentum": {"momentum", "betas"}}
# values that the config sets and most schedules keep; older checkpoints lack those that their config built
_OF_CONFIG = ("weight_decay", "momentum", "betas", "eps")


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer as a config builds it, before the first step: plain values, for a checkpoint."""

    kinds: list[list[str]]  # names of its class and base classes; also those of an optimizer that it wraps
    parameters: list[list[str]]  # names of the model's parameters, per group
    options: list[dict[str, Any]]  # the other entries of each group

    @classmethod
    def of(cls, optimizer: Optimizer, model: nn.Module) -> BuiltOptimizer:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        return cls(
            kinds=[_kind(each) for each in (optimizer, *vars(optimizer).values()) if isinstance(each, Optimizer)],
            parameters=[[names[id(parameter)] for parameter in group["params"]] for group in groups],
            options=[deepcopy({name: group[name] for name in group if name != "params"}) for group in groups],
        )

    @property
    def name(self) -> str:
        return " over ".join(kind[0] for kind in self.kinds)

    def resumed(self, saved: dict[str, Any], began: BuiltOptimizer | None) -> dict[str, Any]:
        """The state to load: that of each parameter by its name, and the options. Parameters that the checkpoint's run
        did not train have no state yet.

        Args:
            saved: the checkpoint's optimizer state.
            began: its optimizer as its config built it; None in older checkpoints.

        Raises:
            ValueError: this optimizer cannot continue from the state.
        """
        began = began or self._as_began(saved["param_groups"])
        # gradient clipping makes a subclass of an optimizer, and newer versions of PyTorch make AdamW one of Adam
        in_common = [set(kind) & set(own) for kind, own in zip(began.kinds, self.kinds, strict=False)]
        if len(began.kinds) != len(self.kinds) or not all(in_common):
            raise ValueError(f"{self.name} cannot continue from the state of {began.name}, the checkpoint's optimizer")
        group_of, index_of = {}, {}
        for number, (names, group) in enumerate(zip(began.parameters, saved["param_groups"], strict=True)):
            group_of.update(dict.fromkeys(names, number))
            index_of.update(zip(names, group["params"], strict=True))
        state, groups = {}, []
        for names, options in zip(self.parameters, self.options, strict=True):
            begin = sum(len(group["params"]) for group in groups)
            for index, name in enumerate(names, begin):
                if index_of.get(name) in saved["state"]:
                    state[index] = saved["state"][index_of[name]]
            source = next((group_of[name] for name in names if name in group_of), None)
            if source is not None:
                options = merged(options, began.options[source], saved["param_groups"][source])
            groups.append({**options, "params": list(range(begin, begin + len(names)))})
        return {"state": state, "param_groups": groups}

    def _as_began(self, groups: list[dict[str, Any]]) -> BuiltOptimizer:
        """How an older checkpoint's optimizer was built, as far as its state shows it."""
        if [len(names) for names in self.parameters] != [len(group["params"]) for group in groups]:
            raise ValueError(
                "hyperparameters.freeze or the weight decay changed which parameters are in which group, and this "
                "checkpoint of an older version does not name them"
            )
        options = []
        for own, group in zip(self.options, groups, strict=True):
            saved = group.keys() - _COPIES.keys() - {"params"}
            if saved - own.keys() and own.keys() - saved:
                raise ValueError(f"{self.name} cannot continue from the state of the checkpoint's optimizer")
            stated = {name: group[name] for name in _OF_CONFIG if name in group}
            options.append({**own, **stated, "lr": group.get("initial_lr", own["lr"])})
        return BuiltOptimizer(self.kinds, self.parameters, options)


def merged(own: Mapping[str, Any], began: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values `saved` after training, with this run's values for all that its config changed since it `began`."""
    changed = {name for name in own.keys() & began.keys() if own[name] != began[name]}
    outdated = {copy for copy, sources in _COPIES.items() if changed & sources}  # a scheduler copies it again
    omitted = (began.keys() - own.keys()) | outdated
    values = {**own, **saved, **{name: own[name] for name in changed}}
    return {name: value for name, value in values.items() if name not in omitted}


def _kind(optimizer: Optimizer) -> list[str]:
    return [each.__name__ for each in type(optimizer).__mro__ if issubclass(each, Optimizer) and each is not Optimizer]


@contextlib.contextmanager
def refused_values(what: str) -> Iterator[None]:
    """Raises UserError if a library refuses the values of the config."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise UserError(
            f"hyperparameters: the {what} cannot be made of these values ({type(error).__name__}: {error}). Fix: "
            "correct them"
        ) from error


def check_categories(own: Sequence[dict], checkpoint: Checkpoint, weights_key: str) -> None:
    """Checks that each label means the same category. The ids may differ: a model does not know them. Raises UserError
    if the names differ, or their order does."""
    names = [[category["name"] for category in categories] for categories in (own, checkpoint.categories)]
    if names[0] == names[1]:
        return
    first = next(i for i, pair in enumerate(itertools.zip_longest(*names)) if pair[0] != pair[1])
    own_name, other = (repr(each[first]) if first < len(each) else "missing" for each in names)
    raise UserError(
        f"data.train: number {first + 1} of its categories is {own_name}, and {other} in {checkpoint.path}. Categories "
        "are in the order of their ids. Fix: use annotations with the checkpoint's categories in its order, or start a "
        f"new run with {weights_key}: {checkpoint.path}"
    )


def read_checkpoint_to_resume(
    distributed: DistributedContext, resume: str | None, folder: RunFolder
) -> Checkpoint | None:
    """The checkpoint that `--resume` names; None if the training starts from its first batch.

    The chief chooses it and reads it. Other machines get a copy from the chief. Every rank calls this.

    Raises:
        UserError: no checkpoint is complete, or a machine did not get it whole. Every rank raises the same error.
    """
    if resume is None:
        return None
    if resume in OF_THE_RUN and distributed.cross_size > 1:
        _bring_newest(distributed, folder)
    read_by_chief: list[Checkpoint] = []

    def choose() -> Path | None:
        found = _first_complete(resume, folder) if resume in OF_THE_RUN else read_checkpoint(find_checkpoint(resume))
        read_by_chief.extend([] if found is None else [found])
        return found and found.path

    path = on_chief(distributed, choose)
    if path is None:
        return None
    if resume in OF_THE_RUN:
        path = folder.checkpoints / path.name  # on this machine
    with on_each_machine(distributed, path) as own:
        checkpoint = on_every_rank(distributed, lambda: read_by_chief[0] if read_by_chief else read_checkpoint(own))
    return dataclasses.replace(checkpoint, path=path)


def _bring_newest(distributed: DistributedContext, folder: RunFolder) -> None:
    """Copies the run's folder to the chief's machine if another one has a newer checkpoint: the run had its chief
    there."""
    is_first = distributed.local_rank == 0
    own = _newest(folder) if is_first else -1
    batches, machine = max(
        (batches, -machine) for batches, machine in distributed.allgather((own, distributed.cross_rank))
    )
    if machine == 0 or batches < 0:
        return
    is_chief = distributed.rank == 0
    if is_chief:
        shutil.rmtree(folder.received, ignore_errors=True)  # of a start that was killed
        logger.info("the run's newest checkpoint, of batch %d, is on another machine: copying the folder here", batches)
    send(distributed, -machine, folder.path, folder.received if is_chief else None, folder.of_one_machine)
    on_chief(distributed, folder.adopt_received)


def _newest(folder: RunFolder) -> int:
    """The batches of the newest complete checkpoint in a run's folder; -1 without one."""
    found = [-1]
    for path in folder.checkpoints_to_resume("auto"):
        with contextlib.suppress(UserError):
            check_manifest(path)
            found.append(saved_batches(path))
    return max(found)


def _first_complete(resume: str, folder: RunFolder) -> Checkpoint | None:
    errors: list[UserError] = []
    for path in folder.checkpoints_to_resume(resume):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            errors.append(error)
            continue
        if errors:
            logger.warning("--resume %s: %s; resuming from %s", resume, problem_of(errors[0]), path)
        return checkpoint
    if errors:
        raise errors[0]
    return None


# --- copies on the run's machines -------------------------------------------------------------------


_PIECE = 2**24  # bytes, of which each machine has a few in memory


@contextlib.contextmanager
def on_each_machine(distributed: DistributedContext, folder: Path) -> Iterator[Path]:
    """The chief's folder of a checkpoint, on every rank: the folder itself, or a copy for the time of the block.

    A machine whose own `folder` has the same manifest, as on a shared disk, needs no copy.

    Raises:
        UserError: a machine cannot write the copy. Every rank raises it.
    """
    manifest = distributed.broadcast(_read(folder / MANIFEST))
    needs = distributed.cross_rank > 0 and (manifest is None or _read(folder / MANIFEST) != manifest)
    if not any(distributed.allgather(needs)):
        yield folder
        return
    with contextlib.ExitStack() as stack:

        def make_folder() -> Path | None:
            if not needs or distributed.local_rank > 0:
                return None
            try:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-")))
            except OSError as error:
                raise _unwritable(error.filename, error) from error

        copy = on_every_rank(distributed, make_folder)
        send(distributed, 0, folder, copy)
        yield distributed.broadcast_local(copy) if needs else folder
        distributed.allgather(None)  # every rank has read it


def send(
    distributed: DistributedContext, sender: int, source: Path, target: Path | None, omitted: Collection[str] = ()
) -> None:
    """Copies a folder of one machine to others. Every rank calls this.

    Args:
        sender: the number of the machine that has `source`.
        target: an empty folder for the copy, or one that does not exist; None if this rank needs none.
        omitted: names of files and folders that are not sent.

    Raises:
        UserError: the folder cannot be read, or a copy cannot be written. Every rank raises it.
    """

    def copy() -> None:
        if distributed.local_rank > 0:
            return
        problem: UserError | None = None
        pieces = _pieces(source, omitted) if distributed.cross_rank == sender else iter(())
        # all of them, also after an error: the sender waits for each machine
        while (message := distributed.relay(next(pieces, None), sender)) is not None:
            name, piece = message
            if isinstance(piece, str):
                problem = UserError(f"--resume: {piece}")
            elif target is not None and problem is None:
                path = target / name
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("ab") as file:
                        file.write(piece)
                except OSError as error:
                    problem = _unwritable(path, error)
        if problem is not None:
            raise problem

    on_every_rank(distributed, copy)


def _pieces(folder: Path, omitted: Collection[str]) -> Iterator[tuple[str, bytes | str]]:
    """The name of each file and its content in pieces, or an error as text. ZeroMQ checks that all arrives as sent."""
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not set(name.parts) & set(omitted):
                yield name.as_posix(), b""  # also of an empty file
                with path.open("rb") as file:
                    while piece := file.read(_PIECE):
                        yield name.as_posix(), piece
    except OSError as error:
        yield "", f"{error.filename or folder} cannot be read ({error.strerror}). Fix: look at its machine's disk"


def _unwritable(path: Path | str | None, error: OSError) -> UserError:
    place = f"{path} on {socket.gethostname()}"
    return UserError(f"{place}: it cannot be written ({error.strerror}). Fix: make room there, or set TMPDIR")


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
