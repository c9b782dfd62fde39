"""MMDetection's hyperparameters and what its `data` section has beside everybody's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.config.augment import refuse_augment
from shared.config.schema import BACKEND_ALIASES, BACKENDS, PUBLISHED, DataConfig, TrainingHyperparameters, key
from shared.errors import UserError, nearest


@dataclass
class MMDetectionHyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; `override_mmdet_config` and `use_pretrained` are the older names of
    `config_overrides` and `weights`.

    Attributes:
        weights: what to start from: "published", a file, a URL or a checkpoint; "" for nothing, None for the config's
            own start.
        overrides_key, weights_key: the names that were used, for errors.
    """

    config_file: str = key(text="a config of the folder submitted, or one that mmdet ships", is_path=True)
    global_batch_size: int | None = key(None, "images per step, over all slots; default: the config's own")
    merge_config: str | None = key(None, "a file (`.py`, `.yaml` or `.json`) that is merged over it", is_path=True)
    config_overrides: dict[str, Any] = key({}, "single fields, applied last: `{optimizer.lr: 0.01}`")
    weights: str | None = key(
        None, 'start from `published`, a file, a URL or a checkpoint; `""` nothing, `null` the config\'s', is_path=True
    )
    scale_schedule: bool | None = key(None, "scale the rate by `global_batch_size` over the config's own")
    custom_imports: list[str] = key([], "Python files beside the YAML that register what a config names")
    override_mmdet_config: dict[str, Any] | None = key(None, "an alias of `config_overrides`")
    use_pretrained: bool | str | None = key(None, "an alias of `weights`; `true` is `published`", is_path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.overrides_key, self.weights_key = "hyperparameters.config_overrides", "hyperparameters.weights"
        if self.override_mmdet_config:
            if self.config_overrides and self.config_overrides != self.override_mmdet_config:
                raise UserError(
                    "hyperparameters: config_overrides and its older name override_mmdet_config differ. Fix: keep "
                    "config_overrides"
                )
            self.config_overrides = self.override_mmdet_config
            self.overrides_key = "hyperparameters.override_mmdet_config"
        if self.use_pretrained is not None:
            meant = PUBLISHED if self.use_pretrained is True else self.use_pretrained or None
            if self.weights is not None and self.weights != meant:
                raise UserError(
                    f"hyperparameters: weights, {self.weights!r}, and its older name use_pretrained, "
                    f"{self.use_pretrained!r}, differ. Fix: keep weights"
                )
            self.weights, self.weights_key = meant, "hyperparameters.use_pretrained"


@dataclass
class MMDetectionData(DataConfig):
    """The `data` section: `file_client_args`, as model-hub's users have it, says `backend` and its options; of
    mmcv's own backends, which read the images then, as well.

    Attributes:
        file_client: the arguments of mmcv's FileClient where one of mmcv's own backends reads; else None.
    """

    file_client_args: dict[str, Any] | None = key(
        None, "`backend` and its options as MMDetection writes them, or one of mmcv's own backends"
    )

    def __post_init__(self) -> None:
        self.file_client: dict[str, Any] | None = None
        refuse_augment(self.augment, "data.train.pipeline in hyperparameters.config_overrides")
        if self.file_client_args is None:
            return
        options = dict(self.file_client_args)
        name = options.pop("backend", "disk")
        backend = BACKEND_ALIASES.get(name, name)
        if backend in BACKENDS:
            self.backend = backend
            self.bucket = options.pop("bucket", options.pop("bucket_name", self.bucket))
            self.endpoint_url = options.pop("endpoint_url", self.endpoint_url)
            if options:
                raise UserError(
                    f"data.file_client_args: the backend {name!r} has no option {next(iter(options))!r}. Fix: use "
                    "`bucket` and `endpoint_url`"
                )
            return
        from mmcv.fileio import FileClient  # here, for mmcv takes a while to load

        if name not in FileClient._backends:
            raise UserError(
                f"data.file_client_args.backend: {name!r} is not available"
                f"{nearest(name, [*BACKENDS, *FileClient._backends])}"
            )
        self.file_client = dict(self.file_client_args)
        try:
            FileClient(**self.file_client)
        except Exception as error:  # each backend imports and connects with a library of its own
            raise UserError(
                f"data.file_client_args: {name!r} cannot be used: {error}. Fix: correct its options"
            ) from error

    @property
    def images_on_disk(self) -> bool:
        return super().images_on_disk and self.file_client is None
