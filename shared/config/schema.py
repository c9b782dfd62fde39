"""What an experiment config may contain: its sections as dataclasses, and one line on each key."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from shared.config.file import as_in_yaml, refuse_unknown_keys
from shared.errors import UserError, nearest

T = TypeVar("T")
Positive = Annotated[float, Meta(gt=0)]

BACKENDS = ("disk", "s3", "gcs", "http", "fake")
BACKEND_ALIASES = {"gcp": "gcs"}
BUCKET_SCHEMES = {"s3": "s3://", "gcs": "gs://"}  # the start of the URLs of a backend's buckets
_WITHOUT_FILES = ("fake",)  # backends that make their data up
UNITS = ("batches", "epochs", "records")
LOGGERS = ("wandb", "mlflow")
PUBLISHED = "published"  # `weights`: what the library publishes for `config_file`
_UNDEFINED = 1e30  # a metric of this size or larger has no value


def key(default: Any = MISSING, text: str = "", *, is_path: bool = False, upstream: str = "") -> Any:
    """A key of a section.

    Args:
        default: of the key; the key is required without one.
        text: what it does, in one line, for the reference.
        is_path: whether its value may be a path, which the reading makes absolute.
        upstream: the name of the same option in the detector's library, for the reference.
    """
    metadata = {"help": text, "is_path": is_path, "upstream": upstream}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Split:
    """One split of the data."""

    annotations: str = key(
        text="the COCO annotation file: a path or a URL; or YOLO's data.yaml, or a folder of another format"
    )
    images: str = key("", "the folder that the annotations' file names are relative to: a path or a URL")

    @property
    def is_coco(self) -> bool:
        """Whether the annotations are a COCO file; else another format, on disk, that `convert` reads too."""
        path = Path(self.annotations)
        return is_url(self.annotations) or not (path.suffix.lower() in (".yaml", ".yml") or path.is_dir())


@dataclass(frozen=True)
class StoreOptions:
    """How to reach a store.

    Attributes:
        endpoint_url: URL of an S3-compatible store or a GCS emulator; None for the provider's own.
        anonymous: read without credentials; False uses the provider's usual chain.
        timeout: seconds that a store may be unreachable before the error.
    """

    endpoint_url: str | None = None
    anonymous: bool = False
    timeout: float = 120.0


def is_url(path: str) -> bool:
    return "://" in path


@dataclass
class DataConfig:
    """The `data` section."""

    train: Split | None = key(None, "the data to train on: `annotations` and `images`")
    val: Split | None = key(None, "the data to validate on: `annotations` and `images`")
    test: Split | None = key(None, "the data of `evaluate --split test`: `annotations` and `images`")
    backend: str = key("disk", "where the data is: `disk`, `s3`, `gcs`, `http`, or `fake`, which draws shapes")
    bucket: str | None = key(None, "the bucket of `s3` and `gcs`; URLs such as `s3://bucket/folder` need none")
    endpoint_url: str | None = key(None, "the URL of another S3-compatible store, or of a GCS emulator")
    anonymous: bool = key(False, "read a store without credentials")
    store_timeout: Positive = key(120.0, "seconds that a store may be unreachable before the run stops")
    cache_dir: str | None = key(None, "the folder for parsed annotations and for copies of remote images")
    cache_gb: Positive = key(50.0, "GiB that the copies of remote images may take")
    workers: Annotated[int, Meta(ge=0)] = key(4, "loader processes per slot")
    on_bad_image: Literal["error", "skip"] = key("error", "stop at images that cannot be read, or skip them")
    max_image_pixels: Annotated[int, Meta(ge=1)] | None = key(
        None, "pixels that an image may have; Pillow's limit of 179 million without it"
    )
    check_images: bool = key(True, "check at the start that the images exist")
    repeat_threshold: Annotated[float, Meta(gt=0, le=1)] | None = key(
        None, "repeat images whose categories appear in less than this share of the images; LVIS uses 0.001"
    )
    fast_images: bool = key(False, "decode and resize faster, with pixels that differ slightly")
    augment: Any = key(None, "random changes of training images: `light`, `medium`, `strong`, or keys of their own")

    @property
    def store_options(self) -> StoreOptions:
        return StoreOptions(self.endpoint_url, self.anonymous, self.store_timeout)

    @property
    def reads_files(self) -> bool:
        """Whether the data are files; else the backend makes them up."""
        return self.backend not in _WITHOUT_FILES

    @property
    def images_on_disk(self) -> bool:
        """Whether the paths of images that are not URLs are folders."""
        return self.reads_files

    @property
    def has_val_annotations(self) -> bool:
        """Whether the annotations to validate on can be opened. Detection with a checkpoint does not need them."""
        if not self.reads_files or self.val is None:
            return not self.reads_files
        annotations = self.located(self.val.annotations)
        return is_url(annotations) or Path(annotations).exists()

    def located(self, path: str) -> str:
        """A path of the config; its URL if it is in the bucket."""
        scheme = BUCKET_SCHEMES.get(self.backend)
        return path if scheme is None or is_url(path) or path.startswith("/") else f"{scheme}{self.bucket}/{path}"


@dataclass(frozen=True)
class Length:
    """A length of training in batches (of all slots together), epochs or records."""

    unit: str
    count: int

    def batches(self, batches_per_epoch: int, global_batch_size: int) -> int:
        """The same length in batches."""
        if self.unit == "epochs":
            return self.count * batches_per_epoch
        if self.unit == "records":
            return max(self.count // global_batch_size, 1)
        return self.count


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how often to report, validate and save; None if the config does not set it.

    Attributes:
        validation_start, validation_changes: as those of `Periods`; only a detector's own config sets them.
    """

    max_length: Length | None
    validation_period: Length | None
    checkpoint_period: Length | None
    reporting_batches: int
    checkpoint_policy: str
    initial_validation: bool
    profiling: bool
    validation_start: Length | None = None
    validation_changes: tuple[tuple[Length, Length], ...] = ()

    def with_defaults(
        self,
        defaults: Mapping[str, Length] | None = None,
        validation_times: tuple[Length | None, tuple[tuple[Length, Length], ...]] = (None, ()),
    ) -> Schedule:
        """The schedule with a detector's own values for the keys that the experiment config does not set.

        Args:
            defaults: for `searcher.max_length`, `min_validation_period` and `min_checkpoint_period`.
            validation_times: `validation_start` and `validation_changes`.

        Raises:
            UserError: neither config sets a length.
        """
        defaults = defaults or {}
        max_length = self.max_length or defaults.get("searcher.max_length")
        if max_length is None:
            raise UserError("searcher.max_length: it is missing. Fix: give {batches: 1000} or {epochs: 10}")
        start, changes = (None, ()) if self.validation_period else validation_times
        return replace(
            self,
            max_length=max_length,
            validation_period=self.validation_period or defaults.get("min_validation_period"),
            checkpoint_period=self.checkpoint_period or defaults.get("min_checkpoint_period"),
            validation_start=start,
            validation_changes=changes,
        )


@dataclass
class SearcherMetric:
    """The metric that decides which checkpoint is the best."""

    name: str
    smaller_is_better: bool

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far. Any value is better than None."""
        return best is None or (value < best if self.smaller_is_better else value > best)

    def best_of(self, values: Iterable[float]) -> float:
        """The best of the defined values; nan if none is defined."""
        defined = [value for value in values if self.is_defined(value)]
        return (min if self.smaller_is_better else max)(defined, default=math.nan)

    def is_defined(self, value: float) -> bool:
        """Whether a value was measured, and is not the placeholder for an undefined one."""
        return abs(value) < _UNDEFINED

    def value_or_worst(self, value: float) -> float:
        """The value; the worst one if it is undefined."""
        return value if math.isfinite(value) else self.worst

    @property
    def worst(self) -> float:
        """The placeholder for an undefined metric: finite, and no better than any value of the metric.

        COCO's metrics are in [0, 1]. Other metrics have no known bounds."""
        if not self.smaller_is_better and self.name.startswith(("bbox_", "segm_", "keypoints_")):
            return 0.0
        return _UNDEFINED if self.smaller_is_better else -_UNDEFINED


@dataclass(kw_only=True)
class TopLevelKeys:
    """The keys outside the sections."""

    min_validation_period: Any = key(None, "how often to validate, as `{epochs: 1}`; without it only at the end")
    min_checkpoint_period: Any = key(None, "how often to save, as `{batches: 500}`; also at validations and the end")
    scheduling_unit: Annotated[int, Meta(ge=1)] = key(100, "batches between two reports of the loss")
    checkpoint_policy: Literal["best", "all", "none"] = key("best", "which checkpoints a cluster keeps")
    perform_initial_validation: bool = key(False, "validate before the first batch")


@dataclass(frozen=True, kw_only=True)
class SearcherSection:
    """The `searcher` section: how long to train, what is best, and which trials a search has."""

    metric: str = key("bbox_mAP", "the metric that decides which checkpoint and which trial is best")
    smaller_is_better: bool | None = key(
        None, "whether small values are good; always write it, Determined assumes true"
    )
    max_length: Any = key(None, "length of the training: `{epochs: 10}`, `{batches: 1000}` or `{records: 50000}`")
    name: Literal["adaptive_asha", "grid", "random", "single"] = key("single", "the method")
    time_metric: str | None = key(None, "the unit of `max_time`: `batches`, `epochs` or `records`")
    max_time: int | None = key(None, "the length of a full trial of `adaptive_asha`, instead of `max_length`")
    max_trials: Annotated[int, Meta(ge=1)] | None = key(None, "trials of the search; a grid has one per point")
    max_concurrent_trials: Annotated[int, Meta(ge=0)] = key(0, "the most trials at once; 0 for no limit")
    mode: Literal["aggressive", "standard", "conservative"] = key("standard", "how many brackets there are")
    max_rungs: Annotated[int, Meta(ge=1)] = key(5, "the most rungs of a bracket")
    bracket_rungs: list[int] = key([], "the rungs of each bracket, instead of `mode` and `max_rungs`")
    divisor: Annotated[int, Meta(ge=2)] = key(4, "at each rung, one in this many trials continues")

    def __post_init__(self) -> None:
        if self.name in ("adaptive_asha", "random") and self.max_trials is None:
            raise UserError("searcher.max_trials: it is missing. Fix: give the number of trials")
        if any(rungs < 1 for rungs in self.bracket_rungs):
            raise UserError(f"searcher.bracket_rungs: {self.bracket_rungs} has a number below 1. Fix: give 1 or more")


@dataclass
class EarlyStopping:
    """`hyperparameters.early_stopping`."""

    patience: Annotated[int, Meta(ge=1)] = key(
        text="validations in a row without a better searcher metric, after which the training stops"
    )


@dataclass(kw_only=True)
class TrainingHyperparameters:
    """The hyperparameters that every detector has."""

    amp: Literal["bf16", "fp16"] | None = key(None, "mixed precision: `bf16`, or `fp16` with a GradScaler (GPUs)")
    channels_last: bool = key(False, "keep images and convolution weights in channels-last memory format")
    torch_compile: bool = key(False, "compile the model with PyTorch's compiler")
    sync_bn: bool = key(False, "compute batch norm over the images of all slots (GPUs)")
    clip_grad: Positive | None = key(None, "the norm to which the gradient of all parameters is clipped")
    model_ema_decay: Annotated[float, Meta(ge=0, lt=1)] | None = key(
        None, "average the weights; validations, `predict` and `best` use the average"
    )
    freeze: list[str] = key([], "modules or parameters that stay unchanged, such as `[backbone]`")
    early_stopping: EarlyStopping | None = key(
        None, "stop after N validations without a better metric: `{patience: N}`"
    )
    max_hours: Positive | None = key(None, "hours of training after which the run validates, saves and stops")
    checkpoint_every_minutes: Positive | None = key(None, "also save when the last checkpoint is this many minutes old")
    hang_minutes: Positive | None = key(10.0, "minutes without progress after which a run stops; `null` for never")
    validation_loss: bool = key(False, "also compute the training's losses at each validation")
    max_detections: Annotated[int, Meta(ge=1)] | None = key(
        None, "detections that are kept per image, and scored per category; default: the model's, and 100"
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = key(
        None, "weight of each category in the classification loss: `balanced`, or `{name: weight}`, others 1"
    )
    loggers: list[str] = key([], "where to log off a cluster: `wandb`, `mlflow`")

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS:
                raise UserError(f"hyperparameters.loggers: {name!r} is unknown{nearest(name, LOGGERS)}")
        for name, weight in self.class_weights.items() if isinstance(self.class_weights, dict) else ():
            if not 0 < weight < math.inf:
                raise UserError(f"hyperparameters.class_weights.{name}: it is {weight:g}. Fix: give a number above 0")


def key_names(section: type) -> list[str]:
    """The keys of a section."""
    return [field.name for field in dataclasses.fields(section)]


def parse_section(section: Mapping[str, Any] | None, into: type[T], where: str) -> T:
    """The dataclass `into` from a config section.

    Args:
        where: the section's name; "" for the top of the config.

    Raises:
        UserError: an unknown key, a missing one or a value of the wrong type; the message names `where` and the key.
    """
    section = dict(section or {})
    refuse_unknown_keys(section, key_names(into), where)
    for field in dataclasses.fields(into):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in section:
            raise UserError(f"{where}.{field.name} is missing. Fix: add it")
    _check_nested_sections(section, into, where)
    try:
        return msgspec.convert(section, into)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):  # the dataclass's own check, which names its key
            raise error.__cause__ from None
        message, _, at = str(error).partition(" - at `$")
        at = at.rstrip("`")
        name = at.removeprefix(".")
        if choices := _choices(into, name):
            message = f"{as_in_yaml(section[name])} is unknown. Fix: use one of {', '.join(choices)}"
        elif bound := re.fullmatch(r"Expected `(?:int|float)` ([<>]=?) (\S+)", message):
            text = {field.name: field.metadata["help"] for field in dataclasses.fields(into)}[name]
            message = f"it is {section[name]:g}. Fix: give a number {bound[1]} {float(bound[2]):g} ({text})"
        else:
            message += ". Fix: give a value of that type"
        raise UserError(f"{where}{at}: {message}".removeprefix(".")) from error


def _check_nested_sections(section: Mapping[str, Any], into: type, where: str) -> None:
    """Raises UserError if the value of a key that is a section of its own is not a valid section."""
    for name, kind in get_type_hints(into).items():
        for part in get_args(kind) or (kind,):
            if dataclasses.is_dataclass(part) and section.get(name) is not None:
                if not isinstance(section[name], dict):
                    keys = ", ".join(f"{nested}: …" for nested in key_names(part))
                    raise UserError(
                        f"{where}.{name}: {as_in_yaml(section[name])} is not a section. Fix: give {{{keys}}}"
                    )
                parse_section(section[name], part, f"{where}.{name}")


def _choices(into: type, name: str) -> list[str]:
    """The values that a key accepts, as YAML writes them; empty if its type does not list them."""
    kind = get_type_hints(into).get(name)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    others = {"{name: number}": any(get_origin(part) is dict for part in parts), "null": NoneType in parts}
    return [*choices, *(other for other, is_one in others.items() if choices and is_one)]
