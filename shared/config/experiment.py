"""The experiment config: one YAML file for the cluster and for here. Errors name the key."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from shared.config.file import expanded, refuse_unknown_keys
from shared.data import checks, synthetic
from shared.data.annotations import CocoAnnotations, check_same_categories
from shared.data.checks import check_box_format, check_images, first_dark_image, refuse_names_outside, under_a_pixel
from shared.data.remote import StoreError, StoreOptions, is_url
from shared.data.storage import BACKEND_ALIASES, BACKENDS, ImageStorage, open_images
from shared.errors import UserError, count_of, nearest, nearest_path

logger = logging.getLogger(__name__)

T = TypeVar("T")

_UNITS = ("batches", "epochs", "records")
_UNDEFINED = 1e30  # or more: a metric that has no value
_BUCKETS = {"s3": "s3://", "gcs": "gs://"}
LOGGERS = ("wandb", "mlflow")


@dataclass
class Split:
    """One split of the data: a COCO annotation file and the folder of its images."""

    annotations: str
    images: str


@dataclass
class DataConfig:
    """The `data` section; docs/data.md says what each key does."""

    train: Split | None = None
    val: Split | None = None
    backend: str = "disk"
    bucket: str | None = None
    endpoint_url: str | None = None
    anonymous: bool = False
    store_timeout: float = 120.0
    cache_dir: str | None = None
    cache_gb: float = 50.0
    workers: int = 4
    on_bad_image: str = "error"
    check_images: bool = True
    repeat_threshold: float | None = None
    fast_images: bool = False

    @property
    def store_options(self) -> StoreOptions:
        return StoreOptions(self.endpoint_url, self.anonymous, self.store_timeout)

    @property
    def images_on_disk(self) -> bool:
        """Whether the images' paths are folders, where they are not URLs."""
        return self.backend != "fake"

    @property
    def has_val_annotations(self) -> bool:
        """Whether the validation data's annotations are there to be read: a checkpoint does without them."""
        if self.backend == "fake" or self.val is None:
            return self.backend == "fake"
        annotations = self.located(self.val.annotations)
        return is_url(annotations) or Path(annotations).is_file()

    def located(self, path: str) -> str:
        """A path of the config as a URL, where it is one in `bucket`."""
        if self.backend not in _BUCKETS or is_url(path) or path.startswith("/"):
            return path
        return f"{_BUCKETS[self.backend]}{self.bucket}/{path}"


@dataclass
class SplitData:
    """What a split's `DataConfig` opens to."""

    annotations: CocoAnnotations
    images: ImageStorage

    @property
    def categories(self) -> list[dict]:
        return self.annotations.categories


@dataclass(frozen=True)
class Length:
    """A length of training: so many batches (of all slots together), epochs or records."""

    unit: str
    count: int

    def batches(self, batches_per_epoch: int, global_batch_size: int) -> int:
        """The same length in batches."""
        if self.unit == "epochs":
            return self.count * batches_per_epoch
        if self.unit == "records":
            return max(self.count // global_batch_size, 1)
        return self.count


@dataclass
class Schedule:
    """How long to train, and how often to report, validate and save; None where the config says nothing.

    Attributes:
        validation_start, validation_changes: as those of `Periods`; a detector's own configuration alone says them.
    """

    max_length: Length
    validation_period: Length | None
    checkpoint_period: Length | None
    reporting_batches: int
    checkpoint_policy: str
    initial_validation: bool
    profiling: bool
    validation_start: Length | None = None
    validation_changes: tuple[tuple[Length, Length], ...] = ()


@dataclass
class SearcherMetric:
    name: str
    smaller_is_better: bool

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far, None where there is none."""
        return best is None or (value < best if self.smaller_is_better else value > best)

    def best_of(self, values: Iterable[float]) -> float:
        """The best of those that are defined; nan where none is."""
        defined = [value for value in values if self.is_defined(value)]
        return (min if self.smaller_is_better else max)(defined, default=math.nan)

    def is_defined(self, value: float) -> bool:
        """Whether a value was measured, and does not only stand for one."""
        return abs(value) < _UNDEFINED

    @property
    def worst(self) -> float:
        """What stands for a metric that is undefined: finite, and no better than any value of it.

        COCO's numbers are in [0, 1]; anything else may be as bad as a double can say."""
        if not self.smaller_is_better and self.name.startswith(("bbox_", "segm_", "keypoints_")):
            return 0.0
        return _UNDEFINED if self.smaller_is_better else -_UNDEFINED


@dataclass
class EarlyStopping:
    """`hyperparameters.early_stopping`.

    Attributes:
        patience: validations in a row without a better searcher metric, after which the training ends.
    """

    patience: int

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(
                f"hyperparameters.early_stopping.patience is {self.patience}, and must be 1 or more; leave "
                "early_stopping out to train to the end"
            )


@dataclass(kw_only=True)
class TrainingHyperparameters:
    """The hyperparameters that every detector has; docs/config.md says what each does."""

    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool = False
    torch_compile: bool = False
    sync_bn: bool = False
    clip_grad: float | None = None
    model_ema_decay: float | None = None
    freeze: list[str] = dataclasses.field(default_factory=list)
    early_stopping: EarlyStopping | None = None
    max_hours: float | None = None
    checkpoint_every_minutes: float | None = None
    hang_minutes: float | None = 10.0
    validation_loss: bool = False
    loggers: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS:
                raise UserError(f"hyperparameters.loggers: {name!r} is unknown; {nearest(name, LOGGERS)}")
        for key in ("clip_grad", "max_hours", "checkpoint_every_minutes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"hyperparameters.{key} is {value:g}, and must be greater than 0; or leave it out")
        if self.model_ema_decay is not None and not 0 <= self.model_ema_decay < 1:
            raise UserError(f"hyperparameters.model_ema_decay: {self.model_ema_decay} is not in [0, 1)")
        if self.hang_minutes is not None and not self.hang_minutes > 0:
            raise UserError(
                f"hyperparameters.hang_minutes is {self.hang_minutes:g}, and must be greater than 0; give null to "
                "wait for ever"
            )


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


def parse_section(section: dict[str, Any] | None, into: type[T], where: str) -> T:
    """The dataclass `into` from a config section.

    Raises:
        UserError: an unknown key, a missing one or a value of the wrong type; `where` and the key are named.
    """
    section = dict(section or {})
    refuse_unknown_keys(section, [field.name for field in dataclasses.fields(into)], where)
    for field in dataclasses.fields(into):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in section:
            raise UserError(f"{where}.{field.name} is missing")
    _check_sections_in(section, into, where)
    try:
        return msgspec.convert(section, into)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):  # the dataclass's own check, which names its key
            raise error.__cause__ from None
        message, _, at = str(error).partition(" - at `$")
        key = at.rstrip("`")
        if choices := _choices(into, key.removeprefix(".")):
            message = f"{_as_in_yaml(section[key.removeprefix('.')])} is none of {', '.join(choices)}"
        raise UserError(f"{where}{key}: {message}") from error


def _check_sections_in(section: dict[str, Any], into: type, where: str) -> None:
    """Raises UserError where a key that is a section of its own is none, or not a right one."""
    for name, kind in get_type_hints(into).items():
        for part in get_args(kind) or (kind,):
            if dataclasses.is_dataclass(part) and section.get(name) is not None:
                if not isinstance(section[name], dict):
                    keys = ", ".join(f"{field.name}: …" for field in dataclasses.fields(part))
                    raise UserError(f"{where}.{name}: {_as_in_yaml(section[name])} is no section; give {{{keys}}}")
                parse_section(section[name], part, f"{where}.{name}")


def _choices(into: type, key: str) -> list[str]:
    """The values that a key takes, as YAML has them, where its type lists them."""
    kind = get_type_hints(into).get(key)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [*choices, *(["null"] if choices and NoneType in parts else [])]


def _as_in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


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
    if data.backend in _BUCKETS and data.bucket is None and not _all_urls(data):
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


def open_split(data: DataConfig, split: str, images: ImageStorage | None = None) -> SplitData:
    """Annotations and images of "train" or "val", checked.

    Args:
        images: where the images are, in place of the folder in `data`.

    Raises:
        UserError: a path is missing, the annotations are not COCO or contradict themselves, image files are missing.
    """
    if data.backend == "fake":
        if getattr(data, split) is not None:
            logger.warning("data.%s is not read: data.backend is fake, which makes its data up; say disk", split)
        return SplitData(
            CocoAnnotations.from_dict(synthetic.fake_split(split)), open_images("fake", images=None, split=split)
        )
    paths: Split | None = getattr(data, split)
    if paths is None:
        raise UserError(f"data.{split} is missing; it needs the keys `annotations` and `images`")
    try:
        annotations = CocoAnnotations.open(data.located(paths.annotations), data.cache_dir, data.store_options)
    except UserError as error:
        raise UserError(f"data.{split}.annotations: {error}") from error
    folder = data.located(paths.images)
    where = f"data.{split}.images ({folder})"
    images = images or open_images(
        data.backend, folder, split, data.store_options, data.cache_dir, int(data.cache_gb * 2**30)
    )
    try:
        refuse_names_outside(annotations, where, getattr(images, "folder", None))
        check_box_format(annotations, f"data.{split}.annotations")
        if data.check_images:
            check_images(annotations, images, where, skip=data.on_bad_image == "skip")
            if _is_first_process() and (dark := first_dark_image(annotations, images)):
                logger.warning("data.%s: %s", split, dark)
    except StoreError as error:
        raise StoreError(f"data.{split}.images: {error}") from error
    return SplitData(annotations, images)


def open_train_and_val(data: DataConfig) -> tuple[SplitData, SplitData]:
    """Both splits, with the same categories.

    Raises:
        UserError: as `open_split`; the categories differ; there is nothing to train on.
    """
    train, val = open_split(data, "train"), open_split(data, "val")
    check_same_categories(train.annotations, val.annotations)
    check_trainable(train.annotations)
    check_evaluable(val.annotations)
    return train, val


def check_trainable(annotations: CocoAnnotations) -> None:
    """Raises UserError where there is nothing to train on, warns of boxes that are next to nothing."""
    objects, small = ~annotations.without_area & ~annotations.columns["iscrowd"], under_a_pixel(annotations)
    if not objects.any():
        raise UserError(f"data.train.annotations: {annotations.path} has no box to train on")
    if small[objects].all():
        raise UserError(
            f"data.train.annotations: {annotations.path} has no box to train on: all {int(objects.sum())} are less "
            "than a pixel wide or high; COCO's boxes are x y width height in pixels"
        )
    if small.any() and _is_first_process():
        logger.warning("data.train: %d boxes are less than a pixel wide or high", small.sum())


def _is_first_process() -> bool:
    """Whether a warning of this process's is not one of many."""
    return os.environ.get("RANK", "0") == "0"


def check_evaluable(annotations: CocoAnnotations) -> None:
    """Raises UserError where there is nothing to validate on."""
    if not (~annotations.columns["iscrowd"]).any():
        raise UserError(f"data.val.annotations: {annotations.path} has no box to evaluate detections with")


def check_masks(annotations: CocoAnnotations, split: str) -> None:
    """Raises UserError where annotations to train masks on, or to evaluate them with, have none, or wrong ones."""
    columns, wrong = annotations.columns, checks.wrong_rows(annotations)
    counting = ~columns["iscrowd"] & ~annotations.without_area
    absent = np.flatnonzero(checks.is_absent(annotations) & counting)
    wrong = wrong[counting[wrong]]
    for rows, what in ((absent, "have no segmentation"), (wrong, "have a segmentation that is wrong")):
        if len(rows):
            ids = columns["annotation_ids"]
            why = f": it {checks.why_wrong(annotations, rows[0])}" if rows is wrong else ""
            raise UserError(
                f"data.{split}.annotations: {len(rows)} annotations of {annotations.path} {what}, the first has id "
                f"{ids[rows[0]]}{why}; hyperparameters.config_file detects masks: choose a config of boxes alone, or "
                f"{'correct' if why else 'add'} the masks"
            )


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
    not_given = (None, 0, {}, *({unit: 0} for unit in _UNITS))
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
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _UNITS:
        raise UserError(f"{key}: {value!r} is not a length; give it as {{batches: 1000}} or {{epochs: 10}}")
    unit, count = next(iter(value.items()))
    if type(count) is not int or count < 1:
        raise UserError(f"{key}.{unit}: {count!r} is not a positive whole number")
    return Length(unit, count)
