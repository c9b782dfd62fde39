"""One experiment config, read once into an `Experiment`, which every command and the trial receive."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.config.augment import Augment, parse_augment
from shared.config.file import (
    expanded,
    find_path,
    fixed_hyperparameters,
    interpolated,
    load_config,
    refuse_misplaced_keys,
)
from shared.config.schema import (
    BACKEND_ALIASES,
    BACKENDS,
    BUCKET_SCHEMES,
    UNITS,
    DataConfig,
    EarlyStopping,
    Length,
    Schedule,
    SearcherMetric,
    SearcherSection,
    Split,
    TopLevelKeys,
    TrainingHyperparameters,
    is_url,
    key_names,
    parse_section,
)
from shared.errors import UserError, count_of, nearest, nearest_path

_SPLITS = ("train", "val", "test")
_SEARCHERS = ("adaptive_asha", "custom", "grid", "random", "single")  # Determined's
_NOT_GIVEN = (None, 0, {}, *({unit: 0} for unit in UNITS))  # a period, as the master fills it in


@dataclass(frozen=True)
class Sections:
    """A detector's sections of the experiment config.

    Attributes:
        hyperparameters: a dataclass over `TrainingHyperparameters`.
        data: `DataConfig`, or a dataclass over it with more keys.
    """

    hyperparameters: type[TrainingHyperparameters] = TrainingHyperparameters
    data: type[DataConfig] = DataConfig


@dataclass(frozen=True)
class Experiment:
    """One experiment config.

    Attributes:
        config: the dict that is saved and shown: overrides applied, `${key}` replaced, paths absolute.
        sections: the detector's dataclasses.
        hyperparameters: parsed; None if they are a search's ranges, or if a checkpoint's will replace them.
        data: parsed; its paths are absolute, or in its bucket.
        places: the folders in which a relative path is looked for: where the command was run, the YAML file's.
        schedule: the lengths that the config itself sets.
        seed: of initial weights, order and augmentation.
        aggregation_frequency: batches per optimizer step.
    """

    config: dict[str, Any]
    sections: Sections
    hyperparameters: TrainingHyperparameters | None
    data: DataConfig
    places: tuple[Path, ...]
    schedule: Schedule
    seed: int
    aggregation_frequency: int

    @property
    def hang_minutes(self) -> float | None:
        return self.hyperparameters.hang_minutes

    def searcher_metric(self, reported: Iterable[str] | None) -> SearcherMetric:
        """The metric that decides which checkpoint is the best.

        Args:
            reported: the names that a validation reports; None if they are not known in advance.

        Raises:
            UserError: a validation does not report the metric, or `smaller_is_better` contradicts it.
        """
        searcher = self.config.get("searcher") or {}
        if (name := searcher.get("name") or "single") not in _SEARCHERS:
            raise UserError(f"searcher.name: {name!r} is unknown{nearest(str(name), _SEARCHERS)}")
        metric = searcher.get("metric") or "bbox_mAP"
        if reported is not None and metric not in (reported := list(reported)):
            hint = nearest(metric, reported)
            if metric.startswith("val_"):
                fix = "hyperparameters.validation_loss: true reports a validation's losses; val_loss is their total"
                hint = f". Fix: {fix}"
            raise UserError(f"searcher.metric: {metric!r} is not reported{hint}")
        written, known = searcher.get("smaller_is_better"), smaller_is_better(metric)
        if written is None and known is None:
            raise UserError(
                f"searcher.smaller_is_better: it is missing, and the name {metric!r} does not show which values are "
                "better. Fix: give true or false"
            )
        if None not in (written, known) and bool(written) != known:
            raise UserError(
                f"searcher.smaller_is_better is {str(bool(written)).lower()}, and a {'smaller' if known else 'larger'} "
                f"{metric!r} is better. Fix: write {str(known).lower()}; without the key, Determined assumes true"
            )
        return SearcherMetric(metric, bool(written) if known is None else known)

    def with_hyperparameters(self, hyperparameters: Mapping[str, Any]) -> Experiment:
        """The experiment with these hyperparameters, parsed."""
        resolved = _with_absolute_paths(hyperparameters, self.sections.hyperparameters, self.places)
        parsed = parse_section(resolved, self.sections.hyperparameters, "hyperparameters")
        return replace(self, config={**self.config, "hyperparameters": resolved}, hyperparameters=parsed)

    def with_val_of(self, split: str) -> Experiment:
        """The experiment whose `data.val` is another split.

        Raises:
            UserError: the config does not have it.
        """
        if getattr(self.data, split) is None:
            raise UserError(f"data.{split} is missing. Fix: give its `annotations` and `images`, as those of data.val")
        return replace(self, data=replace(self.data, val=getattr(self.data, split)))

    def check_paths(self, splits: Iterable[str], submitted: Path) -> None:
        """Raises UserError if annotations or images of the splits exist neither on disk nor in the folder submitted.
        Opens nothing, and asks no store."""
        for split in splits:
            paths: Split | None = getattr(self.data, split)
            if paths is None or not self.data.reads_files:
                continue
            for name in ("annotations", "images") if self.data.images_on_disk else ("annotations",):
                if not getattr(paths, name):
                    continue
                path = self.data.located(getattr(paths, name))
                if not is_url(path) and not Path(path).exists() and not (submitted / path).exists():
                    raise UserError(f"data.{split}.{name}: {path} does not exist; {nearest_path(path)}")


def read_experiment(
    path: str | Path, overrides: Sequence[str], sections: Sections, with_hyperparameters: bool = True
) -> Experiment:
    """The experiment of a YAML file with `key=value` overrides.

    Args:
        with_hyperparameters: False leaves the hyperparameters unparsed: a search draws them, a checkpoint replaces
            them, or nothing needs them.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    keys = {
        "hyperparameters": key_names(sections.hyperparameters),
        "data": key_names(sections.data),
        "searcher": key_names(SearcherSection),
        "data.augment": key_names(Augment),
        "hyperparameters.early_stopping": key_names(EarlyStopping),
    }
    config = load_config(path, overrides, keys)
    if with_hyperparameters:
        config["hyperparameters"] = fixed_hyperparameters(config)
        _check_config_is_for_this_detector(config["hyperparameters"], keys["hyperparameters"], path)
        for name in ("hyperparameters", "data"):
            refuse_misplaced_keys(config.get(name) or {}, name, {**keys, "": key_names(TopLevelKeys)})
    experiment = _experiment(config, sections, (Path.cwd(), Path(path).absolute().parent))
    return experiment.with_hyperparameters(config["hyperparameters"]) if with_hyperparameters else experiment


def experiment_of(
    config: Mapping[str, Any], hyperparameters: Mapping[str, Any], sections: Sections, with_hyperparameters: bool = True
) -> Experiment:
    """The experiment of a config that a master hands over or a checkpoint holds.

    Args:
        hyperparameters: those of the trial; `config` may have a search's ranges instead.
        with_hyperparameters: as for `read_experiment`.

    Raises:
        UserError: a key or a value is wrong.
    """
    config = interpolated({**config, "hyperparameters": hyperparameters})
    experiment = _experiment(config, sections, (Path.cwd(),))
    return experiment.with_hyperparameters(config["hyperparameters"]) if with_hyperparameters else experiment


def _experiment(config: dict[str, Any], sections: Sections, places: tuple[Path, ...]) -> Experiment:
    """The experiment without parsed hyperparameters."""
    data = parse_data(config, sections.data, places)
    section = dict(config.get("data") or {})
    section |= {split: dataclasses.asdict(paths) for split in _SPLITS if (paths := getattr(data, split)) is not None}
    section |= {} if data.cache_dir is None else {"cache_dir": data.cache_dir}
    hyperparameters = _with_absolute_paths(config.get("hyperparameters") or {}, sections.hyperparameters, places)
    return Experiment(
        config={**config, "data": section, "hyperparameters": hyperparameters},
        sections=sections,
        hyperparameters=None,
        data=data,
        places=places,
        schedule=parse_schedule(config),
        seed=int((config.get("reproducibility") or {}).get("experiment_seed") or 0),
        aggregation_frequency=(config.get("optimizations") or {}).get("aggregation_frequency") or 1,
    )


def _with_absolute_paths(hyperparameters: Mapping[str, Any], section: type, places: Iterable[Path]) -> dict[str, Any]:
    resolved = dict(hyperparameters)
    for field in dataclasses.fields(section):
        if field.metadata.get("is_path") and isinstance(resolved.get(field.name), str):
            path = expanded(resolved[field.name], f"hyperparameters.{field.name}")
            resolved[field.name] = str(find_path(path, places) or path)
    return resolved


def _check_config_is_for_this_detector(hyperparameters: Mapping[str, Any], known: Iterable[str], path: object) -> None:
    """Raises UserError if this detector lacks most of the hyperparameters."""
    unknown = [name for name in hyperparameters if name not in known]
    if len(unknown) > 1 and 2 * len(unknown) >= len(hyperparameters):
        more = ", …" if len(unknown) > 4 else ""
        raise UserError(
            f"{path} is another detector's: this one has no hyperparameters {', '.join(unknown[:4])}{more}. Fix: run "
            "the command in that detector's folder"
        )


def parse_data(
    config: Mapping[str, Any], into: type[DataConfig] = DataConfig, places: Iterable[Path] = ()
) -> DataConfig:
    """The `data` section.

    Args:
        into: DataConfig, or a detector's own with more keys.
        places: where relative paths are looked for.

    Raises:
        UserError: a key is unknown, missing or of the wrong type.
    """
    section = dict(config.get("data") or {})
    section |= {split: {"annotations": section[split]} for split in _SPLITS if isinstance(section.get(split), str)}
    data = parse_section(section, into, "data")
    data.augment = parse_augment(data.augment)
    data.backend = BACKEND_ALIASES.get(data.backend, data.backend)
    if data.backend not in BACKENDS:
        raise UserError(f"data.backend: {data.backend!r} is not available{nearest(data.backend, BACKENDS)}")
    if data.cache_dir is not None:
        data.cache_dir = str(Path(expanded(data.cache_dir, "data.cache_dir")).absolute())
    in_bucket = data.backend in BUCKET_SCHEMES
    located: list[str] = []
    for split in _SPLITS:
        if (given := getattr(data, split)) is not None:
            paths = [expanded(path, f"data.{split}.{name}") for name, path in dataclasses.asdict(given).items() if path]
            if not in_bucket:  # in a bucket, relative paths are relative to it
                paths = [str(find_path(path, places) or path) for path in paths]
            setattr(data, split, Split(*paths))
            located += paths
            if not given.images and getattr(data, split).is_coco:
                raise UserError(
                    f"data.{split}.images is missing. Fix: give the folder that the file names of {paths[0]} are "
                    "relative to"
                )
    if in_bucket and data.bucket is None and not (located and all(map(is_url, located))):
        raise UserError(
            f"data.bucket is missing, and data.backend is {data.backend}. Fix: give it, or URLs: s3://bucket/folder"
        )
    return data


def parse_schedule(config: Mapping[str, Any]) -> Schedule:
    """The lengths that a config itself sets, by Determined's own keys; a period of 0 is not set.

    Raises:
        UserError: a key has a wrong value.
    """
    searcher = config.get("searcher") or {}
    max_length = None
    if searcher.get("max_length") is not None:
        max_length = _length(searcher["max_length"], "searcher.max_length")
    elif searcher.get("max_time") is not None:
        max_length = _length({searcher.get("time_metric"): searcher["max_time"]}, "searcher.time_metric and max_time")
    validation_period, checkpoint_period = (
        None if config.get(name) in _NOT_GIVEN else _length(config[name], name)
        for name in ("min_validation_period", "min_checkpoint_period")
    )
    given = {name: config[name] for name in key_names(TopLevelKeys) if config.get(name)}
    keys = parse_section(given, TopLevelKeys, "")
    return Schedule(
        max_length=max_length,
        validation_period=validation_period,
        checkpoint_period=checkpoint_period,
        reporting_batches=keys.scheduling_unit,
        checkpoint_policy=keys.checkpoint_policy,
        initial_validation=keys.perform_initial_validation,
        profiling=bool((config.get("profiling") or {}).get("enabled")),
    )


def _length(value: Any, key: str) -> Length:
    if type(value) is int:
        value = {"batches": value}
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in UNITS:
        raise UserError(f"{key}: {value!r} is not a length. Fix: give {{batches: 1000}} or {{epochs: 10}}")
    unit, count = next(iter(value.items()))
    if type(count) is not int or count < 1:
        raise UserError(f"{key}.{unit}: {count!r} is not a positive whole number. Fix: give 1 or more")
    return Length(unit, count)


def smaller_is_better(metric: str) -> bool | None:
    """Whether smaller values of a metric are better; None if its name does not show it."""
    words = re.findall("[A-Za-z]+", metric)
    if any(re.fullmatch("loss|error|miss", word, re.IGNORECASE) for word in words):
        return True
    if any(re.fullmatch("(m|i|p|fw)?(AP|AR|PQ|SQ|RQ|IoU|acc|recall|precision)", word, re.IGNORECASE) for word in words):
        return False
    return None


def per_slot_batch_size(global_batch_size: Any, slots: int) -> int:
    """Images per batch on each slot.

    Raises:
        UserError: the slots cannot divide the global batch evenly.
    """
    if type(global_batch_size) is not int or global_batch_size < 1:
        raise UserError(
            f"hyperparameters.global_batch_size: {global_batch_size!r} is not a number of images. Fix: give a whole "
            "number above 0"
        )
    if global_batch_size % slots:
        lower, upper = (global_batch_size // slots) * slots, math.ceil(global_batch_size / slots) * slots
        raise UserError(
            f"hyperparameters.global_batch_size: {global_batch_size} images cannot be divided evenly among "
            f"{count_of(slots, 'slot')}. Fix: use {f'{lower} or ' if lower else ''}{upper}"
        )
    return global_batch_size // slots
