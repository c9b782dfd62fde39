"""The colors of categories, and lettering in any script with the fonts of the machine."""

from __future__ import annotations

import functools
import logging
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]

_COLORS = 256  # then they repeat
# Oklab: the distance of two colors is about the difference that people see. https://bottosson.github.io/posts/oklab
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def color_of(label: int) -> Color:
    """The color of a category, the same in every picture and every run."""
    return _palette()[label % _COLORS]


def on_color(color: Color) -> Color:
    """Black or white, whichever is readable on the color."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@functools.cache
def _palette() -> list[Color]:
    """Colors that stand out on a photograph. Each is the farthest from all colors before it."""
    levels = np.linspace(0, 255, 16).round()
    rgb = np.vstack([(31, 119, 180), np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)])
    shares = rgb / 255
    linear = np.where(shares > 0.04045, ((shares + 0.055) / 1.055) ** 2.4, shares / 12.92)
    lab = np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T
    stands_out = (np.hypot(lab[:, 1], lab[:, 2]) > 0.09) & (lab[:, 0] > 0.4) & (lab[:, 0] < 0.9)
    rgb, lab = rgb[stands_out].astype(int), lab[stands_out] * (0.6, 1, 1)
    chosen, distance = [0], np.full(len(lab), np.inf)
    for _ in range(_COLORS - 1):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return [tuple(color) for color in rgb[chosen].tolist()]


DEFAULT_FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
_INVISIBLE = frozenset(map(ord, "\u200b\u200c\u200d\u200e\u200f\ufe0e\ufe0f"))  # they change the letter before them
_warned_of: set[str] = set()  # scripts
_font = functools.cache(ImageFont.truetype)  # opening a file takes longer than to draw with it


@functools.lru_cache(maxsize=4096)
def lettering(text: str, size: int) -> Image.Image:
    """The text in white on black, mode "L", as high as a line of the default font at `size` pixels."""
    runs = [(_font(path, size), run) for path, run in runs_of(text)]
    widths = [round(font.getlength(run)) for font, run in runs]
    ascent, descent = _font(DEFAULT_FONT, size).getmetrics()
    picture = Image.new("L", (max(sum(widths), 1), ascent + descent))
    pen, x = ImageDraw.Draw(picture), 0
    for (font, run), width in zip(runs, widths, strict=True):
        pen.text((x, ascent), run, fill=255, font=font, anchor="ls")
        x += width
    return picture


@functools.lru_cache(maxsize=4096)
def runs_of(text: str) -> list[tuple[str, str]]:
    """Split a text into (font file, part of the text).

    One font that has all letters is preferred. A letter that no font has is logged once per script.
    """
    text = unicodedata.normalize("NFC", text.replace("\n", " "))
    letters = {ord(letter) for letter in text if letter.isprintable()} - _INVISIBLE
    fonts = [DEFAULT_FONT] if letters <= _letters_in(DEFAULT_FONT) else [DEFAULT_FONT, *_system_fonts()]
    if font := next((path for path in fonts if letters <= _letters_in(path)), None):
        return [(font, text)]
    _warn_of(letters - set().union(*map(_letters_in, fonts)), text)
    runs: list[tuple[str, str]] = []
    for letter in text:
        code = ord(letter)
        font = next((path for path in fonts if code in _letters_in(path)), DEFAULT_FONT)
        if runs and (font == runs[-1][0] or letter == " " or unicodedata.combining(letter) or code in _INVISIBLE):
            runs[-1] = (runs[-1][0], runs[-1][1] + letter)
        else:
            runs.append((font, letter))
    return runs


@functools.cache
def _system_fonts() -> list[str]:
    """The fonts of the machine, plain ones first."""

    def is_odd(path: str) -> bool:
        return any(style in Path(path).stem.lower() for style in ("bold", "italic", "oblique", "black", "thin", "mono"))

    return sorted(findSystemFonts(), key=lambda path: (is_odd(path), "sans" not in path.lower(), path))


@functools.cache
def _letters_in(path: str) -> frozenset[int]:
    try:
        _font(path, 20)  # fails for bitmap fonts, which have one size
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # not a font that FreeType reads
        return frozenset()


def _warn_of(missing: set[int], text: str) -> None:
    scripts = {unicodedata.name(chr(letter), "UNKNOWN").split()[0] for letter in missing}
    if scripts <= _warned_of:
        return
    _warned_of.update(scripts)
    logger.warning(
        "no font on this machine has %s of %r. Pictures show an empty box for each. Fix: install fonts, on Debian and "
        "Ubuntu with `apt-get install fonts-noto-core fonts-noto-cjk fonts-symbola`",
        "".join(map(chr, sorted(missing)))[:20],
        text,
    )
