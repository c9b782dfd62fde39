"""A page: one file that needs nothing else, from a template."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shared.durable import write_file
from shared.errors import UserError
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode("utf-8", errors="replace"))  # names may hold halves of a pair
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def number(value: float | None, digits: int = 3) -> str:
    """As a cell has it; a dash where there is nothing to score."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:+.{digits}f}"
