"""Detectron2's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shared.errors import UserError


@dataclass
class Detectron2Hyperparameters:
    """The `hyperparameters` section."""

    config_file: str
    global_batch_size: int | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    use_pretrained: bool = False
    weights: str | None = None
    scale_schedule: bool = False
    custom_imports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.use_pretrained and self.weights is not None:
            raise UserError("hyperparameters: use_pretrained and weights both say what to start from; give one")
