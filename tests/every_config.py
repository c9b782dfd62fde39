"""Compares the library and this project on every config that the library ships.

If both sides succeed, the results must be bit-for-bit equal: the config, names and shapes of parameters, the
optimizer's groups, the learning rates of the whole training, and the first sample of each pipeline. No weights are
downloaded, and layers are not initialized, which would take nine tenths of the time.
"""

import contextlib
import dataclasses
import gc
import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Stage = Callable[[SimpleNamespace], Any]


@dataclasses.dataclass
class Outcome:
    """The outcome of one stage of one config. Without a failure, an error is None.

    Attributes:
        cause: the stage that failed first, and this one with it.
    """

    config: str
    stage: str
    upstream: str | None
    ours: str | None
    cause: str

    @property
    def ours_fails_alone(self) -> bool:
        return self.upstream is None and self.ours is not None


def sweep(configs: Sequence[str], sides: Any, stages: Sequence[str]) -> list[Outcome]:
    """All stages of all configs."""
    outcomes = []
    started = time.monotonic()
    for number, config in enumerate(configs):
        theirs = _run(sides.UPSTREAM, config, stages, sides.NEEDS)
        ours = _run(sides.OURS, config, stages, sides.NEEDS)
        for stage in stages:
            outcomes.append(_judged(config, stage, theirs.get(stage), ours.get(stage)))
        failed = [o.stage for o in outcomes[-len(stages) :] if o.ours_fails_alone]
        seconds = time.monotonic() - started
        print(f"{number + 1}/{len(configs)} {seconds:.0f} s {config} {' '.join(failed)}", file=sys.stderr, flush=True)
        gc.collect()
    return outcomes


@dataclasses.dataclass
class _Result:
    value: Any = None
    error: str | None = None
    cause: str = ""


def _run(side: Mapping[str, Stage], config: str, stages: Sequence[str], needs: Mapping[str, str]) -> dict[str, _Result]:
    state = SimpleNamespace(config=config)
    results: dict[str, _Result] = {}
    wanted = {name for stage in stages for name in _with_needs(stage, needs)}
    for stage, function in side.items():
        if stage not in wanted:
            continue
        before = results.get(needs.get(stage, ""))
        if before is not None and before.error is not None:
            results[stage] = _Result(error=before.error, cause=before.cause)
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                results[stage] = _Result(function(state), cause=stage)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a config is Python, and may exit
            results[stage] = _Result(error=f"{type(error).__name__}: {_one_line(error)}", cause=stage)
    return results


def _with_needs(stage: str, needs: Mapping[str, str]) -> Iterator[str]:
    yield stage
    if stage in needs:
        yield from _with_needs(needs[stage], needs)


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split())
    line = re.sub(r"/[^\s'\"]+/", "…/", line)  # folders, and what differs from run to run: one reason, one line
    line = re.sub(r"_cfg_loader\w+", "_cfg_loader", line)
    return line if len(line) < 240 else line[:240] + "…"


def _judged(config: str, stage: str, theirs: _Result | None, ours: _Result | None) -> Outcome:
    ours = ours or _Result()
    if theirs is None:  # a stage of ours alone
        return Outcome(config, stage, "not asked", ours.error, ours.cause)
    error, cause = ours.error, ours.cause if ours.error else theirs.cause
    if theirs.error is None and error is None and (unlike := difference(theirs.value, ours.value)):
        error, cause = f"differs from upstream: {unlike}", stage
    return Outcome(config, stage, theirs.error, error, cause)


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place at which two values differ; None if they are equal."""
    if isinstance(one, (torch.Tensor, np.ndarray)) and isinstance(other, (torch.Tensor, np.ndarray)):
        a, b = np.asarray(one), np.asarray(other)
        equal = a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return None if equal else f"{where}: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if unlike := sorted(map(str, set(one) ^ set(other))):
            return f"{where}: only one has {', '.join(unlike[:3])}"
        return next((d for key in one if (d := difference(one[key], other[key], f"{where}.{key}"))), None)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} items"
        return next((d for i in range(len(one)) if (d := difference(one[i], other[i], f"{where}.{i}"))), None)
    return None if type(one) is type(other) and one == other else f"{where}: {one!r:.60} and {other!r:.60}"


# --- what both libraries' stages use ----------------------------------------------------------------


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Skips the initialization of layers."""
    drawing = {name: f for name, f in vars(torch.nn.init).items() if name.endswith("_") and name[0] != "_"}
    for name in drawing:
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in drawing.items():
            setattr(torch.nn.init, name, function)


def parameters_of(model: Any) -> dict[str, Any]:
    """The shape of everything in the model's state, and the names of the parameters that train."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name: (list(value.shape), trains.get(name)) for name, value in model.state_dict().items()}


# entries of an optimizer's group that change its speed alone, and its parameters
_HOW_IT_STEPS = ("params", "foreach", "fused")


def groups_of(optimizer: Any) -> list[Any]:
    """The optimizer's name, and per group its settings and its number of trained values."""
    groups = [
        {**{k: v for k, v in group.items() if k not in _HOW_IT_STEPS}, "numel": [p.numel() for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return [type(optimizer).__name__, groups]


# --- the table --------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome], stages: Sequence[str]) -> str:
    """The number of configs that pass each stage."""
    rows = ["| stage | configs | upstream | ours | upstream only | ours only |", "|---|---|---|---|---|---|"]
    for stage in stages:
        of_stage = [o for o in outcomes if o.stage == stage]
        asked = [o for o in of_stage if o.upstream != "not asked"]
        upstream = sum(o.upstream is None for o in asked) if asked else "–"
        ours = sum(o.ours is None for o in of_stage)
        alone = sum(o.ours_fails_alone for o in asked)
        ours_alone = sum(o.upstream is not None and o.ours is None for o in asked)
        rows.append(f"| {stage} | {len(of_stage)} | {upstream} | {ours} | {alone} | {ours_alone if asked else '–'} |")
    return "\n".join(rows)


def listed(outcomes: Sequence[Outcome]) -> str:
    """The configs that fail on a side, by the stage at which they fail, with the reason."""
    kinds = {
        "Upstream can, ours cannot": lambda o: o.ours_fails_alone,
        "Neither can": lambda o: o.upstream not in (None, "not asked") and o.ours is not None,
        "Ours can, upstream cannot": lambda o: o.upstream not in (None, "not asked") and o.ours is None,
        "Of ours alone": lambda o: o.upstream == "not asked" and o.ours is not None,
    }
    lines = []
    for title, is_of_kind in kinds.items():
        by_reason: dict[tuple[str, str], list[str]] = {}
        for o in outcomes:
            if is_of_kind(o) and o.cause == o.stage:
                by_reason.setdefault((o.stage, o.ours or o.upstream), []).append(o.config)
        lines += ["", f"## {title}", ""]
        lines += [
            f"- {stage}, {len(configs)}: {', '.join(configs)}: `{reason}`"
            for (stage, reason), configs in sorted(by_reason.items())
        ] or ["None."]
    return "\n".join(lines)


def check_every_config(sides: Any, monkeypatch: Any) -> None:
    """Runs all stages of all configs and prints the table (`pytest -s`).

    Fails for each config that only the library can use.

    Args:
        sides: a module with `prepare`, `config_files`, `UPSTREAM`, `OURS` and `NEEDS`.
    """
    monkeypatch.setattr(logging.root.manager, "disable", logging.ERROR)
    configs, stages = sides.config_files(), list(sides.OURS)
    with without_initial_values():
        outcomes = sweep(configs, sides, stages)
    print(table(outcomes, stages))
    print(listed(outcomes))
    failed = [f"{outcome.config}, {outcome.stage}: {outcome.ours}" for outcome in outcomes if outcome.ours_fails_alone]
    assert not failed, failed
