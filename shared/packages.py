"""A package that is not installed is one line, which says how to install it: imported before those that may be."""

from __future__ import annotations

import sys
from types import TracebackType

_INSTALL = (
    "`make demo` in the project's folder sets up an environment with all that is needed (.venv/bin/python); into your "
    "own, with torch, torchvision and determined in it: python3 -m shared.container, in the detector's folder"
)


def _say_what_is_missing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, ModuleNotFoundError):
        print(f"error: {sys.executable} lacks the package {error.name!r}; {_INSTALL}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.version_info < (3, 10):  # noqa: UP036 the code runs from its folders, which no installer looked at
    sys.exit(f"error: Python 3.10 or later is needed, and {sys.executable} is {sys.version.split()[0]}; {_INSTALL}")
sys.excepthook = _say_what_is_missing
