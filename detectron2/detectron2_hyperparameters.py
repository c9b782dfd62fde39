"""Detectron2's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.config.augment import refuse_augment
from shared.config.schema import PUBLISHED, DataConfig, TrainingHyperparameters, key
from shared.errors import UserError


@dataclass
class Detectron2Hyperparameters(TrainingHyperparameters):
    """The `hyperparameters` section; `use_pretrained: true` is another way to say `weights: published`."""

    config_file: str = key(text="a config of the folder submitted or of the model zoo, YAML or Python", is_path=True)
    global_batch_size: int | None = key(None, "images per step, over all slots; default: the config's own")
    config_overrides: dict[str, Any] = key({}, "fields of the config, dotted or nested: `{SOLVER.BASE_LR: 0.01}`")
    weights: str | None = key(
        None, 'start from `published`, a file, a URL or a checkpoint; `""` nothing, `null` the config\'s', is_path=True
    )
    use_pretrained: bool = key(False, "`true` is `weights: published`")
    scale_schedule: bool = key(False, "scale rate and schedule by `global_batch_size` over the config's own")
    custom_imports: list[str] = key([], "Python files beside the YAML, or modules, that register data sets or modules")
    functions_of: str | None = key(None, "a Python config whose functions a checkpoint's config may use", is_path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_pretrained and self.weights not in (None, PUBLISHED):
            raise UserError(
                f"hyperparameters.use_pretrained: true means weights: {PUBLISHED}, but weights is {self.weights!r}. "
                "Fix: remove one of the two"
            )
        if self.use_pretrained:
            self.weights = PUBLISHED


@dataclass
class Detectron2Data(DataConfig):
    """The `data` section, without `augment`: the library has its own."""

    def __post_init__(self) -> None:
        refuse_augment(self.augment, "INPUT in hyperparameters.config_overrides")
