"""Numbers in data files: which ones an array can hold, and which one in a file is wrong."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from shared.errors import UserError

FARTHEST = 2.0**31  # pixels; images are smaller, and float32 becomes infinite only beyond 3e38
_MOST_SHOWN = 40  # digits
# Python writes the first two, and JSON does not have them; the others are out of a float64's range, for the most part
_SUSPICIOUS = re.compile(rb"(?<=[:\[,\s])(?:NaN|-?Infinity|-?\d+(?:\.\d+)?[eE]\+?\d{3,}|-?\d{309,})(?=[\s,\]}])")


def as_ids(ids: Collection[int], what: str, source: object) -> np.ndarray:
    """(N,) int64.

    Args:
        what: the error's name for one, "category id".

    Raises:
        UserError: an id does not fit in 64 bits.
    """
    try:
        return np.fromiter(ids, np.int64, len(ids))
    except OverflowError as error:
        wrong = next(one for one in ids if not -(2**63) <= one < 2**63)
        raise UserError(f"{source}: the {what} {shown(wrong)} does not fit in 64 bits. Fix: give it another") from error


def is_in_reach(numbers: npt.ArrayLike) -> np.ndarray:
    """Bool of the same shape: a coordinate or a size in pixels that an image can have; not NaN, not infinite."""
    return np.abs(numbers) < FARTHEST


def wrong_number_in(data: bytes | mmap.mmap) -> str:
    """The first number in JSON that is not finite as a float64; "" without one."""
    found = (match[0].decode() for match in _SUSPICIOUS.finditer(data))
    return next((shown(number) for number in found if not np.isfinite(float(number))), "")


def parse_number(text: str | None, what: str, limit: float = math.inf) -> float:
    """A finite number.

    Args:
        what: the error's name for it, "xmin".
        limit: the number and its negative are below.

    Raises:
        ValueError: the text is missing, or no such number.
    """
    if text is None:
        raise ValueError(f"{what} is missing")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} is {shown(text.strip())!r}, which is not a finite number")
    if not abs(number) < limit:
        raise ValueError(f"{what} is {shown(text.strip())!r}, which no image is large enough for")
    return number


def parse_whole_number(text: str | None, what: str) -> int:
    """A whole number, also if it is written as 1.0.

    Raises:
        ValueError: as `parse_number`, or the number has a fraction.
    """
    number = parse_number(text, what)
    if number != int(number):
        raise ValueError(f"{what} is {shown(text.strip())!r}, which is not a whole number")
    return int(number)


def shown(value: object) -> str:
    """The value for an error message, shortened."""
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
