"""The command line of the benchmarks: each function is a command, and each of its parameters an option."""

import argparse
import contextlib
import importlib
import inspect
import io
import json
import logging
import re
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DETECTORS = tuple(sorted(path.parent.name for path in ROOT.glob("*/model_def.py")))


def main(about: str, *commands: Callable) -> None:
    """Runs the command that the user names, or the only one, and prints its result as JSON.

    An option's type is the parameter's: bool is a flag, a list takes several values, a dict takes KEY=VALUE. An option
    without a default is required. The docstring's lines `name: text` are the help.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(commands) == 1:
        _add_options(parser, commands[0])
    else:
        names = parser.add_subparsers(required=True, metavar="COMMAND")
        for command in commands:
            text = inspect.getdoc(command)
            _add_options(names.add_parser(_option(command), help=text.partition("\n")[0], description=text), command)
    given = vars(parser.parse_args())
    logging.getLogger("determined").setLevel(logging.ERROR)
    result = given.pop("command")(**given)
    if result is not None:
        print(json.dumps(result, indent=1))


def _option(named: Any) -> str:
    return getattr(named, "__name__", named).strip("_").replace("_", "-")


def _add_options(parser: argparse.ArgumentParser, command: Callable) -> None:
    parser.set_defaults(command=command)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, default, line = parameter.annotation, parameter.default, rf"^\s*{name}: (.+)\n?"
        text = re.search(line, inspect.getdoc(command) or "", re.MULTILINE)
        parser.description = re.sub(line, "", parser.description, flags=re.MULTILINE)
        options = {"dest": name, "help": text and text[1], "default": default, "required": default is parameter.empty}
        if isinstance(kind, types.UnionType):  # Path | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options["action"] = "store_true"
        elif kind is dict:
            options |= {"type": switch, "nargs": "+", "metavar": "KEY=VALUE", "default": []}
        elif typing.get_origin(kind) is list:
            options |= {"type": typing.get_args(kind)[0], "nargs": "*"}
        else:
            options["type"] = kind
        parser.add_argument(f"--{_option(name)}", **options)


def switch(given: str) -> tuple[str, Any]:
    """A key and its value, such as `channels_last=true`."""
    key, value = given.split("=", 1)
    return key, yaml.safe_load(value)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def silent() -> contextlib.AbstractContextManager:
    """Drops what a library prints to stdout."""
    return contextlib.redirect_stdout(io.StringIO())


def trial_class_of(detector: str) -> type:
    """The trial in a detector's model_def.py. A process can import one detector's only."""
    assert detector in DETECTORS, detector
    sys.path.insert(0, str(ROOT / detector))
    module = importlib.import_module("model_def")
    from shared.training.trial import DetectionTrial

    classes = (value for value in vars(module).values() if isinstance(value, type))
    return next(c for c in classes if issubclass(c, DetectionTrial) and c.__module__ == "model_def")
