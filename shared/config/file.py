"""The experiment config as a file: read, overridden, its paths found."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.errors import UserError, nearest, nearest_path

# what Determined 0.38 accepts at the top of an experiment config
_TOP_KEYS = [
    "bind_mounts",
    "checkpoint_policy",
    "checkpoint_storage",
    "data",
    "debug",
    "description",
    "entrypoint",
    "environment",
    "hyperparameters",
    "integrations",
    "labels",
    "log_policies",
    "max_restarts",
    "min_checkpoint_period",
    "min_validation_period",
    "name",
    "optimizations",
    "pbs",
    "perform_initial_validation",
    "preemption_timeout",
    "profiling",
    "project",
    "records_per_epoch",
    "reproducibility",
    "resources",
    "retention_policy",
    "scheduling_unit",
    "searcher",
    "security",
    "slurm",
    "tensorboard_storage",
    "workspace",
]
_SEARCHER_KEYS = [
    "bracket_rungs",
    "budget",
    "divisor",
    "max_concurrent_trials",
    "max_length",
    "max_rungs",
    "max_time",
    "max_trials",
    "metric",
    "mode",
    "name",
    "num_rungs",
    "smaller_is_better",
    "source_checkpoint_uuid",
    "source_trial_id",
    "stop_once",
    "time_metric",
    "train_stragglers",
    "unit",
]
_LENGTHS = ("searcher.max_length", "min_validation_period", "min_checkpoint_period")
# Determined's hyperparameter types, of which a searcher draws
RANGES = ("int", "double", "log", "categorical")

# where relative paths may start, beside the folder that is submitted: where the run was started, and the YAML file's
_started_in: list[Path] = []
_LARGEST_CONFIG = 2**20  # bytes


def load_config(
    path: str, overrides: Sequence[str] = (), keys: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The experiment config of a YAML file, with `key=value` overrides (dotted keys) over it.

    Args:
        keys: of sections that are known, to say where an override's key belongs.

    Raises:
        UserError: the file is missing or not YAML, or a key at the top is not one of Determined's.
    """
    _refuse_what_is_no_config(path)
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise UserError(f"{path} is not an experiment config: it holds no keys")
        for override in overrides:
            if "=" not in override:
                raise UserError(f"--set {override}: write it as key=value, for example hyperparameters.lr=0.01")
            _refuse_unknown_override(override, config, keys or {})
            for length in _LENGTHS:
                if override.startswith(length):  # in another unit it takes the place of the old one
                    OmegaConf.update(config, length, None, force_add=True)
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        config = interpolated(config)
    except UserError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # yaml's own errors, whichever library OmegaConf reads with
        if "yaml" in type(error).__module__:
            raise UserError(f"{path} is not YAML: {error}") from error
        raise
    if "images" in config and "annotations" in config:
        raise UserError(_is_annotations(path))
    refuse_unknown_keys(config, _TOP_KEYS, path)
    refuse_unknown_keys(config.get("searcher") or {}, _SEARCHER_KEYS, "searcher")
    _started_in[:] = [Path.cwd(), Path(path).absolute().parent]
    return config


def _refuse_what_is_no_config(path: str) -> None:
    if Path(path).is_dir():
        here = sorted(file.name for file in Path(path).glob("*.yaml"))
        raise UserError(
            f"{path} is a folder; give the experiment config itself" + (f": {', '.join(here)}" if here else "")
        )
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; {nearest_path(path)}")
    if Path(path).suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"{path} is no experiment config, which is a YAML file; const.yaml for example")
    if (size := Path(path).stat().st_size) > _LARGEST_CONFIG:
        if Path(path).suffix == ".json":
            raise UserError(_is_annotations(path))
        raise UserError(f"{path} is no experiment config: it has {size / 2**20:.0f} MiB")


def _is_annotations(path: str) -> str:
    return (
        f"{path} looks like an annotation file; give an experiment config, const.yaml for example, and name the "
        f"annotations in it: --set data.train.annotations={path}"
    )


def _refuse_unknown_override(override: str, config: Any, keys: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where the key at the top is none, and says in which section it is one."""
    given = override.partition("=")[0].split(".")
    if given[0] in _TOP_KEYS:
        return
    sections = {name: set(map(str, section)) for name, section in config.items() if OmegaConf.is_dict(section)}
    for name, known in keys.items():
        sections[name] = sections.get(name, set()) | set(known)
    here = [name for name in (*keys, *sections) if given[0] in sections[name]]
    if here:
        raise UserError(f"--set {override}: {given[0]!r} is a key of {here[0]}: --set {here[0]}.{override}")
    dotted = {key: f"{name}.{key}" for name, section in sections.items() for key in section}
    close = nearest(given[0], [*_TOP_KEYS, *dotted])
    for key, whole in dotted.items():
        close = close.replace(f"did you mean {key!r}", f"did you mean {whole!r}")
    raise UserError(f"--set {override}: {given[0]!r} is no key of an experiment config; {close}")


def interpolated(config: Any) -> dict[str, Any]:
    """A config with the values of the keys that its `${key}` name in their place, the same here and on a cluster; what
    names no key stays as it is.

    Raises:
        UserError: a `${` is not closed.
    """
    try:
        nodes = OmegaConf.create(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error}; in a config ${{key}} stands for the value of another key") from error

    def plain(node: Any, raw: Any) -> Any:
        if isinstance(raw, dict):
            return {key: value_of(node, key, raw) for key in raw}
        return [value_of(node, i, raw) for i in range(len(raw))] if isinstance(raw, list) else node

    def value_of(section: Any, key: Any, raw: Any) -> Any:
        try:
            value = section[key]
            if isinstance(raw[key], (dict, list)):
                return plain(value, raw[key])
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            return raw[key]

    return plain(nodes, OmegaConf.to_container(nodes, resolve=False))


def expanded(path: str, key: str) -> str:
    """A path of the config, its `~` and environment variables replaced.

    Raises:
        UserError: a variable is not set.
    """
    whole = os.path.expanduser(os.path.expandvars(path))
    if (unset := re.search(r"\$(\w+|\{\w+\})", whole)) and not Path(path).exists():
        raise UserError(f"{key}: the variable {unset[0]} of {path} is not set; export it, or write the path out")
    return path if unset else whole


def find_path(name: str, places: Iterable[Path] = ()) -> Path | None:
    """A relative path of the config in these places, where the run was started or beside the YAML file; None where it
    is in none of them, absolute or a URL."""
    if not name or "://" in name or Path(name).is_absolute():
        return None
    return next((place / name for place in (*places, *_started_in) if (place / name).exists()), None)


def make_paths_absolute(config: dict[str, Any], path_hyperparameters: Iterable[str]) -> None:
    """Paths of the config that are relative to where the run was started, or to the YAML file, made good for any
    working directory: of the data, and of the hyperparameters that may be one."""

    def absolute(section: Any, key: str, name: str) -> None:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            path = expanded(section[key], f"{name}.{key}")
            section[key] = str(found.absolute()) if (found := find_path(path)) else path

    data = config.get("data") or {}
    for split in ("train", "val") if data.get("backend", "disk") == "disk" else ():  # in a bucket, relative is to it
        absolute(data.get(split), "annotations", f"data.{split}")
        absolute(data.get(split), "images", f"data.{split}")
    if isinstance(data.get("cache_dir"), str):
        data["cache_dir"] = str(Path(expanded(data["cache_dir"], "data.cache_dir")).absolute())
    for name in path_hyperparameters:
        absolute(config["hyperparameters"], name, "hyperparameters")


def refuse_unknown_keys(section: dict[str, Any], valid: Iterable[str], where: str) -> None:
    """Raises UserError that names the first key of `section` that is not in `valid`, and the nearest valid one."""
    valid = list(valid)
    for key in section:
        if key not in valid:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), valid)}")


def without_ranges(
    hyperparameters: Mapping[str, Any], value_of: Callable[[tuple[str, ...], Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """Hyperparameters with a value in the place of each range that a searcher draws from, and constants plain.

    Args:
        value_of: the value, given where the range is, ("config_overrides", "optimizer.lr"), and what it is.
    """

    def filled(section: Mapping[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
        new = {}
        for key, value in section.items():
            kind = value.get("type") if isinstance(value, Mapping) else None
            if not isinstance(value, Mapping):
                new[key] = value
            elif kind == "const":
                new[key] = value.get("val")
            elif kind in RANGES:
                new[key] = value_of((*at, str(key)), value)
            else:
                new[key] = filled(value, (*at, str(key)))
        return new

    return filled(hyperparameters, ())


def fixed_hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a config that leaves nothing to a searcher.

    Raises:
        UserError: some are ranges; the message names the keys to set.
    """
    searched: list[tuple[str, ...]] = []

    def note(at: tuple[str, ...], searched_range: Mapping[str, Any]) -> Any:
        searched.append(at)
        return searched_range

    hyperparameters = without_ranges(config.get("hyperparameters") or {}, note)
    if searched:
        choices = " ".join(f"--set hyperparameters.{'.'.join(at)}=…" for at in searched)
        raise UserError(
            f"this config is for a search: `search` does it here; to train once, choose a value for each key: {choices}"
        )
    return hyperparameters
