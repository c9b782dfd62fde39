"""MMDetection's hyperparameters and what its `data` section has beside everybody's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmcv.fileio import FileClient

from shared.data.storage import BACKEND_ALIASES, BACKENDS
from shared.errors import UserError, nearest
from shared.experiment import DataConfig


@dataclass
class MMDetectionHyperparameters:
    """The `hyperparameters` section."""

    config_file: str
    global_batch_size: int = 16
    merge_config: str | None = None
    override_mmdet_config: dict[str, Any] = field(default_factory=dict)
    use_pretrained: bool | str = False


@dataclass
class MMDetectionData(DataConfig):
    """The `data` section: `file_client_args`, as model-hub's users have it, says `backend` and its options; of
    mmcv's own backends, which read the images then, as well.

    Attributes:
        file_client: the arguments of mmcv's FileClient where one of mmcv's own backends reads; else None.
    """

    file_client_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.file_client: dict[str, Any] | None = None
        if self.file_client_args is None:
            return
        options = dict(self.file_client_args)
        name = options.pop("backend", "disk")
        backend = BACKEND_ALIASES.get(name, name)
        if backend in BACKENDS:
            self.backend = backend
            self.bucket = options.pop("bucket", options.pop("bucket_name", self.bucket))
            if options:
                raise UserError(
                    f"data.file_client_args: the backend {name!r} has no option {next(iter(options))!r}; it has "
                    "`bucket`"
                )
            return
        if name not in FileClient._backends:
            raise UserError(
                f"data.file_client_args.backend: {name!r} is not available; "
                f"{nearest(name, [*BACKENDS, *FileClient._backends])}"
            )
        self.file_client = dict(self.file_client_args)
        try:
            FileClient(**self.file_client)
        except Exception as error:  # each backend imports and connects with a library of its own
            raise UserError(f"data.file_client_args: {name!r} cannot be used: {error}") from error
