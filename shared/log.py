"""What of the log a user sees: what this project says, and of the libraries one line where something is wrong."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

from shared.redaction import redacted

_OURS = ("shared", "__main__", "model_def")
_FILES = "_files"  # of a detector: efficientdet_files, …


def show_log(verbose: bool = False) -> None:
    """Logs to stderr, above a progress bar where there is one.

    Args:
        verbose: also what the libraries say that is no warning, all lines of their warnings, and Python's own.
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
    """Python's own warnings are meant for whoever wrote the library; those of a module of the user's are shown."""
    level = logging.INFO if "site-packages" in filename else logging.WARNING
    logging.getLogger("warnings").log(level, "%s (%s, %s:%d)", message, category.__name__, filename, lineno)
