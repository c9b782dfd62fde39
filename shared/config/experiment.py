"""The experiment config: one YAML file for the cluster and for here. Errors name the key."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shared.config.file import expanded, refuse_unknown_keys
from shared.config.schema import (
    BACKEND_ALIASES,
    BACKENDS,
    BUCKETS,
    UNITS,
    DataConfig,
    Length,
    Schedule,
    SearcherMetric,
    Split,
    TrainingHyperparameters,
    is_url,
    parse_section,
)
from shared.errors import UserError, count_of, nearest, nearest_path

logger = logging.getLogger(__name__)

T = TypeVar("T")


def hang_minutes_of(config: dict[str, Any]) -> float | None:
    """`hyperparameters.hang_minutes`, before the hyperparameters are read; None also where it is none, which they
    refuse."""
    value = (config.get("hyperparameters") or {}).get("hang_minutes", TrainingHyperparameters.hang_minutes)
    return value if type(value) in (int, float) and value > 0 else None


def check_paths(data: DataConfig, splits: Iterable[str], submitted: Path) -> None:
    """Raises UserError where annotations or images that should be on disk are not there, nor in the folder submitted.
    Looks at nothing else."""
    for split in splits:
        paths: Split | None = getattr(data, split)
        if paths is None or data.backend == "fake":
            continue
        for key in ("annotations", "images") if data.images_on_disk else ("annotations",):
            path = data.located(getattr(paths, key))
            if not is_url(path) and not Path(path).exists() and not (submitted / path).exists():
                raise UserError(f"data.{split}.{key}: {path} does not exist; {nearest_path(path)}")


def refuse_another_detector_s(config: dict[str, Any], hyperparameters: type, path: str) -> None:
    """Raises UserError where most hyperparameters are none of this detector's."""
    section = config["hyperparameters"]
    unknown = [name for name in section if name not in {field.name for field in dataclasses.fields(hyperparameters)}]
    if len(unknown) > 1 and 2 * len(unknown) >= len(section):
        raise UserError(
            f"{path} is another detector's, for this one has no hyperparameters {', '.join(unknown[:4])}"
            f"{', …' if len(unknown) > 4 else ''}; start it in that one's folder"
        )


def parse_data(config: dict[str, Any], into: type[DataConfig] = DataConfig) -> DataConfig:
    """The `data` section; `into` is DataConfig, or a detector's own with more keys.

    Raises:
        UserError: a key is unknown, missing or of the wrong type.
    """
    section = dict(config.get("data") or {})
    refuse_unknown_keys(section, [field.name for field in dataclasses.fields(into)], "data")
    for split in ("train", "val"):
        if section.get(split) is not None:
            if not isinstance(section[split], dict):
                raise UserError(f"data.{split} needs the keys `annotations` and `images`")
            paths = parse_section(section[split], Split, f"data.{split}")
            section[split] = Split(
                *(expanded(getattr(paths, key), f"data.{split}.{key}") for key in ("annotations", "images"))
            )
    if isinstance(section.get("cache_dir"), str):
        section["cache_dir"] = expanded(section["cache_dir"], "data.cache_dir")
    data = parse_section({k: v for k, v in section.items() if k not in ("train", "val")}, into, "data")
    data.train, data.val = section.get("train"), section.get("val")
    data.backend = BACKEND_ALIASES.get(data.backend, data.backend)
    if data.backend not in BACKENDS:
        raise UserError(f"data.backend: {data.backend!r} is not available; {nearest(data.backend, BACKENDS)}")
    if data.backend in BUCKETS and data.bucket is None and not _all_urls(data):
        raise UserError(f"data.bucket is missing, and data.backend is {data.backend}; or give URLs: s3://bucket/folder")
    for key, value in (("store_timeout", data.store_timeout), ("cache_gb", data.cache_gb)):
        if not value > 0:
            raise UserError(f"data.{key} is {value}, and must be greater than 0")
    if data.on_bad_image not in ("error", "skip"):
        raise UserError(f"data.on_bad_image: {data.on_bad_image!r} is neither 'error' nor 'skip'")
    if data.repeat_threshold is not None and not 0 < data.repeat_threshold <= 1:
        raise UserError(
            f"data.repeat_threshold is {data.repeat_threshold:g}, and must be a share of the images: greater than 0, "
            "and at most 1; LVIS's is 0.001"
        )
    if data.workers < 0:
        raise UserError(f"data.workers is {data.workers}, and must be 0 or more")
    return data


def _all_urls(data: DataConfig) -> bool:
    splits = [split for split in (data.train, data.val) if split is not None]
    return bool(splits) and all(is_url(path) for split in splits for path in (split.annotations, split.images))


def parse_schedule(
    config: dict[str, Any],
    defaults: Mapping[str, Length] | None = None,
    validation_times: tuple[Length | None, tuple[tuple[Length, Length], ...]] = (None, ()),
) -> Schedule:
    """How long to train and how often to validate, by Determined's own keys.

    Args:
        defaults: of the keys `searcher.max_length`, `min_validation_period` and `min_checkpoint_period`; a period of 0
            is one that is not given, as the master hands it over.
        validation_times: `validation_start` and `validation_changes` where min_validation_period is not given.

    Raises:
        UserError: no length is given, or one is not understood.
    """
    searcher, defaults = config.get("searcher") or {}, defaults or {}
    if searcher.get("max_length") is not None:
        max_length = _length(searcher["max_length"], "searcher.max_length")
    elif searcher.get("max_time") is not None:
        max_length = _length({searcher.get("time_metric"): searcher["max_time"]}, "searcher.time_metric and max_time")
    elif "searcher.max_length" in defaults:
        max_length = defaults["searcher.max_length"]
    else:
        raise UserError("searcher.max_length is missing; give it as {batches: 1000} or {epochs: 10}")
    not_given = (None, 0, {}, *({unit: 0} for unit in UNITS))
    periods = {
        key: defaults.get(key) if config.get(key) in not_given else _length(config[key], key)
        for key in ("min_validation_period", "min_checkpoint_period")
    }
    by_default = config.get("min_validation_period") in not_given
    policy = config.get("checkpoint_policy") or "best"
    if policy not in ("best", "all", "none"):
        raise UserError(f"checkpoint_policy: {policy!r} is not one of best, all, none")
    reporting = config.get("scheduling_unit") or 100
    if type(reporting) is not int or reporting < 1:
        raise UserError(f"scheduling_unit: {reporting!r} is not a number of batches")
    return Schedule(
        max_length=max_length,
        validation_period=periods["min_validation_period"],
        checkpoint_period=periods["min_checkpoint_period"],
        reporting_batches=reporting,
        checkpoint_policy=policy,
        initial_validation=bool(config.get("perform_initial_validation")),
        profiling=bool((config.get("profiling") or {}).get("enabled")),
        **dict(zip(("validation_start", "validation_changes"), validation_times, strict=True) if by_default else ()),
    )


def parse_searcher_metric(config: dict[str, Any], reported: Iterable[str] | None) -> SearcherMetric:
    """The metric that decides which checkpoint is the best.

    Args:
        reported: the names that a validation reports; None where they are not known before.

    Raises:
        UserError: it is not one of those that a validation reports, or `smaller_is_better` contradicts it.
    """
    searcher = config.get("searcher") or {}
    metric = searcher.get("metric") or "bbox_mAP"
    if reported is not None and metric not in (reported := list(reported)):
        hint = nearest(metric, reported)
        if metric.startswith("val_"):
            hint = "hyperparameters.validation_loss: true reports the losses of a validation, of which val_loss steers"
        raise UserError(f"searcher.metric: {metric!r} is not reported; {hint}")
    said, known = searcher.get("smaller_is_better"), smaller_is_better(metric)
    if said is None and known is None:
        raise UserError(f"searcher.smaller_is_better is missing, and {metric!r} does not tell which values are better")
    if None not in (said, known) and bool(said) != known:
        raise UserError(
            f"searcher.smaller_is_better is {str(bool(said)).lower()}, and a {'smaller' if known else 'larger'} "
            f"{metric!r} is better: say {str(known).lower()}, for Determined takes true where it is left out"
        )
    return SearcherMetric(metric, bool(said) if known is None else known)


def smaller_is_better(metric: str) -> bool | None:
    """Which values of a metric are better; None where its name does not tell."""
    words = re.findall("[A-Za-z]+", metric)
    if any(re.fullmatch("loss|error|miss", word, re.IGNORECASE) for word in words):
        return True
    if any(re.fullmatch("(m|i|p|fw)?(AP|AR|PQ|SQ|RQ|IoU|acc|recall|precision)", word, re.IGNORECASE) for word in words):
        return False
    return None


def parse_seed(config: dict[str, Any]) -> int:
    """`reproducibility.experiment_seed`, 0 where it is not given."""
    return int((config.get("reproducibility") or {}).get("experiment_seed") or 0)


def per_slot_batch_size(global_batch_size: Any, slots: int) -> int:
    """Images a batch on each slot.

    Raises:
        UserError: the global batch does not divide by the slots.
    """
    if type(global_batch_size) is not int or global_batch_size < 1:
        raise UserError(f"hyperparameters.global_batch_size: {global_batch_size!r} is not a number of images")
    if global_batch_size % slots:
        lower, upper = (global_batch_size // slots) * slots, math.ceil(global_batch_size / slots) * slots
        raise UserError(
            f"hyperparameters.global_batch_size: {global_batch_size} images do not divide by "
            f"{count_of(slots, 'slot')}; use {f'{lower} or ' if lower else ''}{upper}"
        )
    return global_batch_size // slots


def _length(value: Any, key: str) -> Length:
    if type(value) is int:
        value = {"batches": value}
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in UNITS:
        raise UserError(f"{key}: {value!r} is not a length; give it as {{batches: 1000}} or {{epochs: 10}}")
    unit, count = next(iter(value.items()))
    if type(count) is not int or count < 1:
        raise UserError(f"{key}.{unit}: {count!r} is not a positive whole number")
    return Length(unit, count)
