"""What an experiment config may say: its sections as dataclasses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from shared.config.file import refuse_unknown_keys
from shared.errors import UserError, nearest

T = TypeVar("T")

BACKENDS = ("disk", "s3", "gcs", "http", "fake")
BACKEND_ALIASES = {"gcp": "gcs"}

UNITS = ("batches", "epochs", "records")
_UNDEFINED = 1e30  # or more: a metric that has no value
BUCKETS = {"s3": "s3://", "gcs": "gs://"}
LOGGERS = ("wandb", "mlflow")


@dataclass
class Split:
    """One split of the data: a COCO annotation file and the folder of its images."""

    annotations: str
    images: str


@dataclass(frozen=True)
class StoreOptions:
    """How to reach a store.

    Attributes:
        endpoint_url: of an S3-compatible store, or of a GCS emulator; the provider's own where None.
        anonymous: without credentials; else the provider's usual chain is gone through.
        timeout: seconds that a store may stay away before the error.
    """

    endpoint_url: str | None = None
    anonymous: bool = False
    timeout: float = 120.0


def is_url(path: str) -> bool:
    return "://" in path


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
        if self.backend not in BUCKETS or is_url(path) or path.startswith("/"):
            return path
        return f"{BUCKETS[self.backend]}{self.bucket}/{path}"


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

    def value_or_worst(self, value: float) -> float:
        """The value; the worst one if it is undefined."""
        return value if math.isfinite(value) else self.worst

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
            message = f"{as_in_yaml(section[key.removeprefix('.')])} is none of {', '.join(choices)}"
        raise UserError(f"{where}{key}: {message}") from error


def _check_sections_in(section: dict[str, Any], into: type, where: str) -> None:
    """Raises UserError where a key that is a section of its own is none, or not a right one."""
    for name, kind in get_type_hints(into).items():
        for part in get_args(kind) or (kind,):
            if dataclasses.is_dataclass(part) and section.get(name) is not None:
                if not isinstance(section[name], dict):
                    keys = ", ".join(f"{field.name}: …" for field in dataclasses.fields(part))
                    raise UserError(f"{where}.{name}: {as_in_yaml(section[name])} is no section; give {{{keys}}}")
                parse_section(section[name], part, f"{where}.{name}")


def _choices(into: type, key: str) -> list[str]:
    """The values that a key takes, as YAML has them, where its type lists them."""
    kind = get_type_hints(into).get(key)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [*choices, *(["null"] if choices and NoneType in parts else [])]


def as_in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
