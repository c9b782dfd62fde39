"""Detectron2's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shared.config.schema import TrainingHyperparameters
from shared.errors import UserError
from shared.library import PUBLISHED


@dataclass
class Detectron2Hyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; `use_pretrained: true` is another way to say `weights: published`."""

    config_file: str
    global_batch_size: int | None = None
    config_overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    use_pretrained: bool = False
    scale_schedule: bool = False
    custom_imports: list[str] = field(default_factory=list)
    functions_of: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_pretrained and self.weights not in (None, PUBLISHED):
            raise UserError(
                f"hyperparameters: use_pretrained: true is weights: {PUBLISHED}, and weights is {self.weights!r}; give "
                "one"
            )
        if self.use_pretrained:
            self.weights = PUBLISHED
