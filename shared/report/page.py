"""A page: one HTML file from a template, which needs no other file, and its numbers as JSON beside it."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shared.durable import write_file
from shared.errors import UserError, check_outputs
from shared.report.analysis import RESAMPLES
from shared.report.plots import style_sheet

TITLES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


def write_page(template: str, path: Path, numbers: Any = None, **content: Any) -> None:
    """Fill a template of `templates/`. All text but `Markup` is escaped.

    Args:
        numbers: for the JSON file beside the page; None for no file.

    Raises:
        UserError: a file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed}
    light, dark = (Markup(declarations) for declarations in style_sheet())
    text = environment.get_template(template).render(light=light, dark=dark, titles=TITLES, **content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode(errors="replace"))  # a name may hold half of a surrogate pair
        if numbers is not None:
            write_file(path.with_suffix(".json"), json.dumps(numbers, indent=1).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_page(page: Path, inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raise UserError if the page, or the JSON file beside it, would replace one of the inputs or each other."""
    if page.suffix == ".json":
        raise UserError(f"--output: {page} is the name of the page's numbers. Fix: give it the ending .html")
    check_outputs("--output", (page, page.with_suffix(".json")), inputs)


def number(value: float | None, digits: int = 3) -> str:
    """A cell's text; a dash if there is nothing to score."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """The same, with a plus sign."""
    return "–" if value is None or math.isnan(value) else f"{value:+.{digits}f}"


def parse_page_options(parser: argparse.ArgumentParser, output: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line, with --images, --output and --resamples besides the parser's own options.

    Raises:
        UserError: the images' folder is not there; a number of resamples that gives no interval.
    """
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images, for pictures")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FILE", help=f"default {output}")
    resamples_help = f"of the images, for the intervals; 0 for none; default {RESAMPLES}"
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help=resamples_help)
    given = parser.parse_args(arguments)
    if given.images is not None and not given.images.is_dir():
        raise UserError(f"--images: {given.images} is no folder. Fix: give the folder that holds the images")
    if given.resamples < 0 or given.resamples == 1:
        raise UserError(f"--resamples: {given.resamples} gives no interval. Fix: 0 for none, or 2 and more")
    return given
