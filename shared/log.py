"""The log that a user sees, and the secrets that are removed from everything that is written, logged or uploaded.

The log has the messages of this project, and one line per warning of a library.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

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
        package = record.name.split(".")[0]
        ours = package in _OURS or package.endswith(_FILES)
        if not (ours or self.verbose or record.levelno >= logging.WARNING):
            return
        text = redacted(self.format(record))
        first, *more = text.splitlines() or [""]
        if more and not (ours or self.verbose or record.exc_info):
            text = f"{first} (and {len(more)} more lines, with --verbose)"
        tqdm.write(text, file=sys.stderr)


def _log_warning(message: Warning | str, category: type, filename: str, lineno: int, *_: Any) -> None:
    """Logs a warning of Python. One in an installed library is for its authors, and shown only with --verbose."""
    level = logging.INFO if "site-packages" in filename else logging.WARNING
    logging.getLogger("warnings").log(level, "%s (%s, %s:%d)", message, category.__name__, filename, lineno)


# --- secrets ----------------------------------------------------------------------------------------


REDACTED = "(redacted)"

# the end of a key whose value is a secret; two are sections of Determined's
_SECRET = re.compile(
    r"(?:password|passwd|passphrase|secrets?|token|credentials?|connection_?string"
    r"|(?:api|access|account|auth|private|secret|shared|signing|storage)_?keys?"
    r"|(?:^|_)(?:pass|pwd|bearer|authorization|sig|signature|registry_auth|environment_variables))"
    r"(?:_id|_value)?$"
)
_USER_OF_URL = re.compile(r"(?<=://)[^/?#\s\"'<>]+@")
_ASSIGNMENT = re.compile(r"([A-Za-z][\w.-]*)=([^\s&;,#\"')\]}]+)")
_OPTION = re.compile(r"--([A-Za-z][\w-]*)\s+([^\s\"'-][^\s\"']*)")


def redacted(text: str) -> str:
    """A text without the passwords in it: `user:password@` of a URL, `token=…`, `--api-key …`."""
    text = _USER_OF_URL.sub(f"{REDACTED}@", text)
    for pattern in (_ASSIGNMENT, _OPTION):
        text = pattern.sub(_without_value, text)
    return text


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with `REDACTED` instead of each secret.

    Secrets are the values of keys such as `password`, `secret_key` or `api_token`, and the passwords that `redacted`
    finds. All values in Determined's `registry_auth` and `environment_variables` are secrets too; their names stay.
    """
    return _clean(config, None, "")


def filled_in(clean: Any, config: Any) -> Any:
    """The result of `without_secrets`, with a config's own values instead of `REDACTED`."""
    if isinstance(clean, Mapping):
        own = config if isinstance(config, Mapping) else {}
        return {key: filled_in(value, own.get(key)) for key, value in clean.items()}
    if isinstance(clean, (list, tuple)):
        own = config if isinstance(config, (list, tuple)) and len(config) == len(clean) else [None] * len(clean)
        return type(clean)(filled_in(*pair) for pair in zip(clean, own, strict=True))
    return config if config is not None and isinstance(clean, str) and REDACTED in clean else clean


def redact_yaml_files(folder: Path) -> None:
    """Rewrites the YAML files below a folder that hold secrets. A file without any stays unchanged."""
    for path in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:  # with tags of a library's own
            content = None
        if isinstance(content, dict):
            clean = without_secrets(content)
            if clean != content:
                path.write_text(yaml.safe_dump(clean, sort_keys=False, allow_unicode=True), encoding="utf-8")
        elif redacted(text) != text:
            path.write_text(redacted(text), encoding="utf-8")


def _clean(value: Any, key: Any, secret: str) -> Any:
    """A copy of a value without secrets.

    Args:
        key: whose value it is, or the key of its list.
        secret: the innermost key around it that makes it a secret; empty if none does.
    """
    if isinstance(key, str) and _is_secret(key):
        secret = key
    if isinstance(value, Mapping):
        # as Kubernetes writes environment variables
        is_variable = "name" in value and "value" in value and key == "env"
        return {
            name: _clean(item, name, "env" if is_variable and name == "value" else secret)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        options = [None, *value]  # `--api-key`, which the next item is the value of
        return type(value)(
            _clean(item, key, before.lstrip("-") if _is_secret_option(before) else secret)
            for before, item in zip(options, value, strict=False)
        )
    if secret:
        return _hidden(value, secret)
    return redacted(value) if isinstance(value, str) else value


def _hidden(value: Any, secret: str) -> Any:
    if value is None or isinstance(value, bool) or value == "":
        return value
    if isinstance(value, str) and secret == "environment_variables":
        name, equals, _ = value.partition("=")
        return f"{name}={REDACTED}" if equals else value
    if isinstance(value, (int, float)) and secret.lower().endswith("token"):
        return value  # a model's number of a token
    return REDACTED


def _is_secret_option(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("--") and _is_secret(value)


def _is_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return _SECRET.search(re.sub(r"\W+", "_", words).lower()) is not None


def _without_value(found: re.Match) -> str:
    if not _is_secret(found[1]):
        return found[0]
    return f"{found[0][: found.start(2) - found.start()]}{REDACTED}"
