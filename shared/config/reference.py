"""What each key of a config section does, as text: for `--help-config` and for the tables of the documentation.

The texts, defaults, ranges and upstream names live in the dataclasses of the sections, and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

from shared.config.schema import as_in_yaml
from shared.errors import UserError, nearest

_BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        default: as YAML writes it; "required" without one.
        allowed: the values that its type lists, or their range; empty if the type says all.
        upstream: the name of the same option in the detector's library.
    """

    name: str
    default: str
    allowed: str
    text: str
    upstream: str = ""


def keys_of(section: type) -> list[Key]:
    """The keys of a section, in the order of the dataclass."""
    hints = get_type_hints(section, include_extras=True)
    return [
        Key(
            name=field.name,
            default=_default(field),
            allowed=_allowed(hints[field.name]),
            text=field.metadata["help"],
            upstream=field.metadata.get("upstream", ""),
        )
        for field in dataclasses.fields(section)
        if field.metadata.get("help")
    ]


def markdown_table(section: type) -> str:
    """The keys of a section as a Markdown table: those of the section itself, then those that all detectors have."""
    own = section.__annotations__
    keys = sorted(keys_of(section), key=lambda key: key.name not in own)
    with_upstream = any(key.upstream for key in keys)
    heads = ["key", "default", *(["upstream"] if with_upstream else []), "what"]
    rows = []
    for key in keys:
        text = f"{key.text} ({key.allowed})" if key.allowed else key.text
        upstream = [f"`{key.upstream}`" if key.upstream else "–"] if with_upstream else []
        default = key.default if key.default in ("required", "–") else f"`{key.default}`"
        rows.append([f"`{key.name}`", default, *upstream, text.replace("|", "\\|")])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines)


def help_text(sections: Mapping[str, type], name: str | None) -> str:
    """What `--help-config [KEY]` prints.

    Args:
        sections: the dataclass of each section of the config.
        name: a key, with or without its section; all keys if None.

    Raises:
        UserError: no section has the key.
    """
    keys = {f"{section}.{key.name}": key for section, into in sections.items() for key in keys_of(into)}
    if name is not None:
        chosen = [whole for whole in keys if name in (whole, whole.partition(".")[2], whole.partition(".")[0])]
        if not chosen:
            short = [whole.partition(".")[2] for whole in keys]
            raise UserError(f"--help-config: there is no key {name!r}; {nearest(name, short)}")
        keys = {whole: keys[whole] for whole in chosen}
    paragraphs = []
    for whole, key in keys.items():
        facts = [f"default: {key.default}" if key.default != "required" else "required", key.allowed]
        facts.append(f"upstream: {key.upstream}" if key.upstream else "")
        paragraphs.append(f"{whole}\n    {key.text}\n    {', '.join(fact for fact in facts if fact)}")
    return "\n".join(paragraphs)


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not MISSING:
        return _yaml(field.default_factory())
    return "required" if field.default is MISSING else _yaml(field.default)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, float):
        return f"{value:g}"
    return as_in_yaml(list(value) if isinstance(value, tuple) else value)


def _allowed(kind: Any) -> str:
    """The listed values of a type, or its range."""
    if get_origin(kind) is Annotated:
        base, *metas = get_args(kind)
        bounds = [
            text.format(value)
            for meta in metas
            if isinstance(meta, Meta)
            for name, text in _BOUNDS.items()
            if (value := getattr(meta, name)) is not None
        ]
        return " and ".join(bounds) or _allowed(base)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(f'`{value}`' for value in get_args(kind))}"
    if get_origin(kind) in (Union, UnionType):
        return ", ".join(filter(None, (_allowed(part) for part in get_args(kind) if part is not NoneType)))
    return ""
