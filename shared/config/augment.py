"""`data.augment`: what changes the training images at random, in one vocabulary for several detectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from shared.config.schema import as_in_yaml, key, key_names, parse_section
from shared.errors import UserError, nearest

Probability = Annotated[float, Meta(ge=0, le=1)]
_KEY = "data.augment"
_KEPT_TO_THE_END = ("flip", "vertical_flip")


@dataclass
class OffForLast:
    """`data.augment.off_for_last`."""

    epochs: Annotated[int, Meta(ge=1)] = key(text="epochs at the end of the training that only flip images")


@dataclass
class Augment:
    """The `data.augment` section."""

    preset: str = key("none", "where the other keys start: `none`, `light`, `medium` or `strong`")
    flip: Probability = key(0.0, "the probability of a horizontal flip")
    vertical_flip: Probability = key(0.0, "the probability of a vertical flip")
    scale: tuple[float, float] = key((1.0, 1.0), "the range of the random scale, such as `[0.5, 1.5]`")
    multi_scale: tuple[float, float] = key((1.0, 1.0), "the range of the input's size, drawn per batch")
    crop: Probability = key(0.0, "the probability of a crop that keeps one object whole")
    color: Probability = key(0.0, "how much brightness, contrast, saturation and hue change, from 0 to 1")
    mosaic: Probability = key(0.0, "the probability of combining the image with three others")
    mixup: Probability = key(0.0, "the probability of blending the image with another one")
    copy_paste: Probability = key(0.0, "the probability of pasting objects of another image")
    erase: Probability = key(0.0, "the probability of erasing rectangles of the image")
    transforms: list[str | dict[str, Any]] = key(
        [], "transforms by name: `[GaussianBlur: {kernel_size: 5}, albumentations.CLAHE: {p: 0.3}]`"
    )
    off_for_last: OffForLast | None = key(None, "epochs at the end that only flip images: `{epochs: N}`")

    def __post_init__(self) -> None:
        for name in ("scale", "multi_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{_KEY}.{name}: [{low:g}, {high:g}] is not a range above 0. Fix: give [low, high]")
        for given in self.transforms:
            if not isinstance(given, str) and len(given) != 1:
                raise UserError(
                    f"{_KEY}.transforms: {given!r} is not one transform. Fix: give a list: [Name: {{argument: value}}]"
                )

    @property
    def others(self) -> int:
        """Other images that a sample may need."""
        return 3 * (self.mosaic > 0) + (self.mixup > 0) + (self.copy_paste > 0)

    @property
    def at_the_end(self) -> Augment:
        """What remains in the epochs of `off_for_last`."""
        return Augment(**{name: getattr(self, name) for name in _KEPT_TO_THE_END})

    @property
    def named_transforms(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, arguments) of `transforms`."""
        named = [(given, {}) if isinstance(given, str) else next(iter(given.items())) for given in self.transforms]
        return [(str(name), dict(arguments or {})) for name, arguments in named]

    def __str__(self) -> str:
        """The keys that differ from `preset: none`, on one line."""
        plain = Augment()
        changed = [name for name in key_names(Augment)[1:] if getattr(self, name) != getattr(plain, name)]
        texts = {name: _in_short(getattr(self, name)) for name in changed}
        return ", ".join(f"{name} {text}" for name, text in texts.items()) or "none"


def _in_short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:g}–{value[1]:g}"
    if isinstance(value, OffForLast):
        return f"{value.epochs} epochs"
    if isinstance(value, list):
        return "+".join(given if isinstance(given, str) else next(iter(given)) for given in value)
    return f"{value:g}"


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"flip": 0.5, "scale": (0.8, 1.25), "color": 0.3},
    "medium": {"flip": 0.5, "scale": (0.6, 1.5), "color": 0.5, "crop": 0.3, "mosaic": 0.3},
    "strong": {
        **{"flip": 0.5, "scale": (0.4, 1.8), "color": 0.7, "crop": 0.4},
        **{"mosaic": 0.7, "mixup": 0.15, "copy_paste": 0.15, "erase": 0.2},
    },
}


def parse_augment(given: Any) -> Augment | None:
    """`data.augment`: the name of a preset, a section, or None.

    Raises:
        UserError: a key or a value is wrong.
    """
    if given is None:
        return None
    section = {"preset": given} if isinstance(given, str) else given
    if not isinstance(section, Mapping):
        raise UserError(f"{_KEY}: {as_in_yaml(given)} is not a section. Fix: give {', '.join(PRESETS)}, or its keys")
    preset = section.get("preset", "none")
    if preset not in PRESETS:
        where = _KEY if isinstance(given, str) else f"{_KEY}.preset"
        raise UserError(f"{where}: {preset!r} is unknown{nearest(str(preset), PRESETS)}")
    return parse_section({**PRESETS[preset], **section}, Augment, _KEY)


def refuse_augment(given: Any, instead: str) -> None:
    """Raises UserError if `data.augment` is given to a detector whose library has its own pipeline.

    Args:
        instead: the key that changes that pipeline.
    """
    if given is not None:
        raise UserError(f"{_KEY}: this detector has its library's own pipeline. Fix: remove it, and change {instead}")
