"""The one exception for what a user can put right: shown as a single line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what is wrong, where (file, key, image id) and what to do."""


def nearest(name: str, valid: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error message about an unknown name: the nearest valid one, else `otherwise`, else all of them."""
    valid = sorted(valid)
    ending = [name_ for name_ in valid if name_.endswith(f"_{name}")]
    close = ending or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"valid ones: {', '.join(valid)}"
