"""mmcv's ways to read weights, which keep downloads under their file name alone and may execute what they load."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from mmcv.runner import CheckpointLoader, checkpoint

from shared.training.checkpoints import load_state, read_url, read_weights_file


class _PlainTorch:
    """torch, with a `load` that executes nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(source: str | IO[bytes], map_location: Any = None) -> Mapping[str, Any]:
        if isinstance(source, str):
            return read_weights_file(Path(source))
        with tempfile.NamedTemporaryFile() as copy:  # of a bucket, through one of mmcv's own file clients
            copy.write(source.read())
            copy.flush()
            return load_state(Path(copy.name))


def _load_from_url(filename: str, map_location: Any = None, model_dir: str | None = None) -> Mapping[str, Any]:
    return read_url(filename)


checkpoint.torch = _PlainTorch()
checkpoint.load_from_http = _load_from_url  # torchvision://, open-mmlab:// and mmcls:// call it by this name
CheckpointLoader.register_scheme(("http://", "https://"), _load_from_url, force=True)
