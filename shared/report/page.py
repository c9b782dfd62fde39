"""A page: one file that needs nothing else, from a template."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shared.durable import write_file
from shared.errors import UserError, check_outputs
from shared.report.plots import style_sheet


def write_page(template: str, path: Path, **content: Any) -> None:
    """Fills a template of `templates/` into a file; all that is not `Markup` is escaped.

    Raises:
        UserError: the file cannot be written.
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
    text = environment.get_template(template).render(light=light, dark=dark, **content)
    _write(path, text.encode(errors="replace"))  # names may hold halves of a pair


def write_numbers(page: Path, numbers: Any) -> None:
    """Writes a page's numbers into the JSON file beside it.

    Raises:
        UserError: the file cannot be written.
    """
    _write(page.with_suffix(".json"), json.dumps(numbers, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_page(page: Path, inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raises UserError if the page, or the JSON file beside it, would replace one of the inputs or each other."""
    if page.suffix == ".json":
        raise UserError(f"--output: {page} is the name of the page's numbers. Fix: give it the ending .html")
    check_outputs("--output", (page, page.with_suffix(".json")), inputs)


def number(value: float | None, digits: int = 3) -> str:
    """As a cell has it; a dash where there is nothing to score."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.{digits}f}"
