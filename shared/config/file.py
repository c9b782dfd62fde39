"""The experiment config as text: YAML, overrides, references, paths and hyperparameter ranges; the help on each key."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from msgspec import Meta
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.errors import UserError, any_of, nearest, nearest_path, similar_names

# what Determined 0.38 accepts at the top of an experiment config, and in its `searcher`
_TOP_KEYS = (
    "bind_mounts checkpoint_policy checkpoint_storage data debug description entrypoint environment hyperparameters "
    "integrations labels log_policies max_restarts min_checkpoint_period min_validation_period name optimizations pbs "
    "perform_initial_validation preemption_timeout profiling project records_per_epoch reproducibility resources "
    "retention_policy scheduling_unit searcher security slurm tensorboard_storage workspace"
).split()
_SEARCHER_KEYS = (
    "bracket_rungs budget divisor max_concurrent_trials max_length max_rungs max_time max_trials metric mode name "
    "num_rungs smaller_is_better source_checkpoint_uuid source_trial_id stop_once time_metric train_stragglers unit"
).split()
_LIST_KEYS = "`python3 model_def.py --help-config` lists all keys"
_MOST_LISTED = 12  # keys that the error about an unknown one lists
_LENGTHS = ("searcher.max_length", "min_validation_period", "min_checkpoint_period")
_SECTIONS = ("data", "hyperparameters", "searcher")
# Determined's hyperparameter types from which a searcher draws
_RANGES = ("int", "double", "log", "categorical")
_LARGEST_CONFIG = 2**20  # bytes
_MOST_VALUES = 100_000


def load_config(path: str | Path, overrides: Sequence[str], keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The experiment config of a YAML file, with `key=value` overrides (dotted keys) applied.

    Args:
        keys: the known keys of sections, for the error about an override without its section.

    Raises:
        UserError: the file is missing or not YAML, or has a top-level key that Determined does not know.
    """
    _check_is_config_file(Path(path))
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise UserError(f"{path} is not an experiment config: it holds no keys. Fix: give one, such as const.yaml")
        for override in overrides:
            if "=" not in override:
                raise UserError(f"--set {override}: it has no value. Fix: write key=value, as hyperparameters.lr=0.01")
            _check_override(override, config, keys)
            for length in _LENGTHS:
                if override.startswith(length):  # a length in another unit replaces the old one
                    OmegaConf.update(config, length, None, force_add=True)
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        config = interpolated(config)
    except UserError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: {error}. Fix: correct the file") from error
    except Exception as error:  # the YAML library's own errors, whichever OmegaConf reads with
        if "yaml" in type(error).__module__:
            raise UserError(f"{path} is not YAML: {error}. Fix: correct that line") from error
        raise
    if "images" in config and "annotations" in config:
        raise UserError(_is_annotations(path))
    refuse_misplaced_keys(config, "", {**keys, "": _TOP_KEYS})
    refuse_unknown_keys(config, _TOP_KEYS, str(path))
    for name in _SECTIONS:
        if not isinstance(config.get(name), (dict, type(None))):
            raise UserError(f"{name}: {config[name]!r} is not a section. Fix: give its keys, one per line")
    refuse_misplaced_keys(config.get("searcher") or {}, "searcher", {**keys, "searcher": _SEARCHER_KEYS})
    refuse_unknown_keys(config.get("searcher") or {}, _SEARCHER_KEYS, "searcher")
    return config


def _check_is_config_file(path: Path) -> None:
    if path.is_dir():
        configs = ", ".join(sorted(file.name for file in path.glob("*.yaml")))
        raise UserError(
            f"{path} is a folder. Fix: give the experiment config itself" + (f": {configs}" if configs else "")
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist; {nearest_path(str(path))}")
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"{path} is not an experiment config. Fix: give a YAML file, such as const.yaml")
    if (size := path.stat().st_size) > _LARGEST_CONFIG:
        if path.suffix == ".json":
            raise UserError(_is_annotations(path))
        raise UserError(
            f"{path} is not an experiment config: it has {size / 2**20:.0f} MiB. Fix: give the experiment config, such "
            "as const.yaml"
        )
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # OmegaConf reports what is wrong with the file
        if _values_below(yaml.compose(path.read_text()), {}) > _MOST_VALUES:
            raise UserError(f"{path}: its aliases make more than {_MOST_VALUES:,} values. Fix: write them once")


def _values_below(node: Any, counted: dict[int, int]) -> int:
    """The values of a YAML node, or of a pair of key and value, once aliases are copies."""
    if isinstance(node, tuple):
        return sum(_values_below(each, counted) for each in node)
    if id(node) not in counted:
        counted[id(node)] = 1  # also for an alias in itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        counted[id(node)] += sum(_values_below(each, counted) for each in inner)
    return counted[id(node)]


def _is_annotations(path: str | Path) -> str:
    return (
        f"{path} looks like an annotation file. Fix: give an experiment config, such as const.yaml, and name the "
        f"annotations in it: --set data.train.annotations={path}"
    )


def _check_override(override: str, config: Any, keys: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if the override's first key is not a top-level key; names the section that has it."""
    given = override.partition("=")[0].split(".")[0]
    if given in _TOP_KEYS:
        return
    sections = {str(name): [*section] for name, section in config.items() if OmegaConf.is_dict(section)}
    sections |= {name: [*known, *sections.get(name, ())] for name, known in keys.items()}
    if owner := next((name for name, known in sections.items() if given in known), None):
        raise UserError(f"--set {override}: {given!r} is a key of {owner}. Fix: --set {owner}.{override}")
    wholes = [*_TOP_KEYS, *(f"{name}.{key}" for name, known in sections.items() for key in known)]
    raise UserError(f"--set {override}: {given!r} is not a key of an experiment config{_nearest_whole(given, wholes)}")


def _nearest_whole(name: str, wholes: Iterable[str]) -> str:
    """The end of an error message about a key without its section: at most three similar ones, with their sections."""
    wholes = list(wholes)
    near = similar_names(name, wholes) if "." in name else []
    near = near or similar_names(name.rpartition(".")[2], {whole.rpartition(".")[2] for whole in wholes})
    found = [whole for last in near for whole in wholes if whole == last or whole.endswith(f".{last}")][:3]
    return f"; did you mean {any_of(found)}? {_LIST_KEYS}" if found else f". Fix: {_LIST_KEYS}"


def refuse_misplaced_keys(section: Mapping[str, Any], name: str, keys: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for the first key of a section that only another section has; names that section.

    Args:
        name: of the section; "" for the top of the config.
        keys: the known keys of each section.
    """
    for key in section:
        owner = None if key in keys[name] else next((other for other, known in keys.items() if key in known), None)
        if owner is not None:
            whole = f"{owner}.{key}" if owner else key
            place = f"of {owner}" if owner else "of the top of the config"
            raise UserError(f"{name + '.' if name else ''}{key}: it is a key {place}. Fix: write {whole}")


def interpolated(config: Any) -> dict[str, Any]:
    """The config with each `${key}` replaced by the value of that key. A `${…}` that names no key stays.

    Raises:
        UserError: a `${` is not closed.
    """
    try:
        nodes = OmegaConf.create(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error}. Fix: in a config, ${{key}} stands for the value of another key") from error

    def resolved(section: Any, key: Any, raw: Any) -> Any:
        try:
            value = section[key]
            if isinstance(raw, dict):
                return {name: resolved(value, name, raw[name]) for name in raw}
            if isinstance(raw, list):
                return [resolved(value, i, raw[i]) for i in range(len(raw))]
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            return raw

    return resolved([nodes], 0, OmegaConf.to_container(nodes, resolve=False))


def expanded(path: str, key: str) -> str:
    """A path of the config with `~` and environment variables replaced.

    Raises:
        UserError: a variable is not set.
    """
    whole = os.path.expanduser(os.path.expandvars(path))
    if (unset := re.search(r"\$(\w+|\{\w+\})", whole)) and not Path(path).exists():
        raise UserError(f"{key}: the variable {unset[0]} of {path} is not set. Fix: export it, or write out the path")
    return path if unset else whole


def find_path(name: str, places: Iterable[Path]) -> Path | None:
    """The absolute path of a file or folder in the first of the places that has it. None if none has it, or if the
    name is an absolute path or a URL."""
    if not name or "://" in name or Path(name).is_absolute():
        return None
    return next((found.absolute() for place in places if (found := place / name).exists()), None)


def refuse_unknown_keys(section: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Raises UserError for the first key of `section` that is not in `valid`; names the nearest valid one."""
    valid = list(valid)
    for key in section:
        if key not in valid:
            if len(valid) <= _MOST_LISTED:
                raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), valid)}")
            near = nearest(str(key), valid, _LIST_KEYS)
            raise UserError(f"{where}: unknown key {key!r}{near}{'' if 'Fix:' in near else f' {_LIST_KEYS}'}")


def without_ranges(
    hyperparameters: Mapping[str, Any], value_of: Callable[[tuple[str, ...], Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """Hyperparameters with a value instead of each range that a searcher draws from, and with plain constants.

    Args:
        value_of: gives the value of a range from its keys, ("config_overrides", "optimizer.lr"), and the range.
    """

    def filled(value: Any, at: tuple[str, ...]) -> Any:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "const":
            return value.get("val")
        if kind in _RANGES:
            return value_of(at, value)
        if isinstance(value, Mapping):
            return {key: filled(inner, (*at, str(key))) for key, inner in value.items()}
        return value

    return {key: filled(value, (str(key),)) for key, value in hyperparameters.items()}


def flattened(section: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"SOLVER": {"STEPS": [1]}, "A.B": 2} as {"SOLVER.STEPS": [1], "A.B": 2}."""
    leaves = {}
    for key, value in section.items():
        nested = isinstance(value, Mapping) and value
        leaves.update(flattened(value, f"{before}{key}.") if nested else {f"{before}{key}": value})
    return leaves


def fixed_hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a config that has no ranges.

    Raises:
        UserError: some are ranges; the message names the keys to set.
    """
    searched: list[str] = []
    hyperparameters = without_ranges(
        config.get("hyperparameters") or {}, lambda at, _: searched.append(f"--set hyperparameters.{'.'.join(at)}=…")
    )
    if searched:
        raise UserError(
            "this config is for a search. Fix: run `search`; or, to train once, choose a value for each key: "
            + " ".join(searched)
        )
    return hyperparameters


# --- the text on each key, for `--help-config` and the documentation --------------------------------

# The texts, defaults, ranges and upstream names live in the dataclasses of the sections, and nowhere else.
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


def help_text(sections: Mapping[str, type], name: str | None) -> str:
    """What `--help-config [KEY]` prints.

    Args:
        sections: the dataclass of each section of the config; "" for the keys outside of sections.
        name: a key, with or without its section; all keys if None.

    Raises:
        UserError: no section has the key.
    """
    keys = {whole: key for section, into in sections.items() for whole, key in _whole_keys(section, into)}
    if name is not None:
        chosen = [whole for whole in keys if f".{name}." in f".{whole}."]
        if not chosen:
            raise UserError(f"--help-config: there is no key {name!r}{_nearest_whole(name, keys)}")
        keys = {whole: keys[whole] for whole in chosen}
    paragraphs = []
    for whole, key in keys.items():
        facts = [f"default: {key.default}" if key.default != "required" else "required", key.allowed]
        facts.append(f"upstream: {key.upstream}" if key.upstream else "")
        paragraphs.append(f"{whole}\n    {key.text}\n    {', '.join(fact for fact in facts if fact)}")
    return "\n".join(paragraphs)


def _whole_keys(section: str, into: type) -> Iterator[tuple[str, Key]]:
    """(name with its sections, key) of a section and of the sections in it."""
    hints = get_type_hints(into)
    for key in keys_of(into):
        whole = f"{section}.{key.name}" if section else key.name
        yield whole, key
        for part in get_args(hints[key.name]) or (hints[key.name],):
            if dataclasses.is_dataclass(part):
                yield from _whole_keys(whole, part)


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
    if get_origin(kind) is Literal and len(get_args(kind)) > 1:  # the text names a single one
        return f"one of {', '.join(f'`{value}`' for value in get_args(kind))}"
    if get_origin(kind) in (Union, UnionType):
        return ", ".join(filter(None, (_allowed(part) for part in get_args(kind) if part is not NoneType)))
    return ""


def as_in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
