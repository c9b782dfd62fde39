"""The log that a user sees: messages of this project, and one line per warning of a library."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

from shared.redaction import redacted

_OURS = ("shared", "__main__", "model_def")  # packages
_FILES = "_files"  # the end of the name of a detector's package


def show_log(verbose: bool = False) -> None:
    """Logs to stderr, above the progress bar.

    Args:
        verbose: also show the libraries' information, all lines of their warnings, and Python's warnings.
    """
    logging.basicConfig(level=logging.INFO, handlers=[_AboveTheBar(verbose)])
    warnings.showwarning = _log_warning


class _AboveTheBar(logging.Handler):
    def __init__(self, verbose: bool):
        super().__init__()
        self.verbose = verbose
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        ours = _is_ours(record)
        if not (ours or self.verbose or record.levelno >= logging.WARNING):
            return
        text = redacted(self.format(record))
        first, *more = text.splitlines() or [""]
        if more and not (ours or self.verbose or record.exc_info):
            text = f"{first} (and {len(more)} more lines, with --verbose)"
        tqdm.write(text, file=sys.stderr)


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
    """Logs a warning of Python. One in an installed library is for its authors, and shown only with --verbose."""
    level = logging.INFO if "site-packages" in filename else logging.WARNING
    logging.getLogger("warnings").log(level, "%s (%s, %s:%d)", message, category.__name__, filename, lineno)
