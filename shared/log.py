"""What of the log a user sees: what this project says, and of the libraries one line where something is wrong."""

from __future__ import annotations

import logging
import warnings
from typing import TextIO

_OURS = ("shared", "__main__", "model_def")
_FILES = "_files"  # of a detector: efficientdet_files, …


def show_log(verbose: bool = False) -> None:
    """Logs to stderr.

    Args:
        verbose: also what the libraries say below a warning, all lines of their warnings, and Python's own.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: verbose or record.levelno >= logging.WARNING or _is_ours(record))
    handler.verbose = handler.formatter.verbose = verbose
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    warnings.showwarning = _log_warning


class _Formatter(logging.Formatter):
    verbose = False

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.verbose or _is_ours(record) or record.exc_info:
            return text
        first, *more = text.strip().splitlines() or [""]
        return f"{first} (--verbose shows {len(more)} more lines)" if more else first


def _is_ours(record: logging.LogRecord) -> bool:
    package = record.name.split(".")[0]
    return package in _OURS or package.endswith(_FILES)


def _log_warning(
    message: Warning | str,
    category: type,
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Python's own warnings are for whoever wrote the library: below what is shown, but for a module of the user's."""
    level = logging.INFO if "site-packages" in filename else logging.WARNING
    logging.getLogger("warnings").log(level, "%s (%s, %s:%d)", message, category.__name__, filename, lineno)
