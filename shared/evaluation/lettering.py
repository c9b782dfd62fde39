"""Text as pixels, in a font of this machine that has its letters."""

from __future__ import annotations

import functools
import logging
import unicodedata
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

DEFAULT_FONT = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
_PACKAGES = {"CJK": "fonts-noto-cjk", "HIRAGANA": "fonts-noto-cjk", "KATAKANA": "fonts-noto-cjk"}
_PACKAGES |= {"HANGUL": "fonts-noto-cjk", "BOPOMOFO": "fonts-noto-cjk", "FULLWIDTH": "fonts-noto-cjk"}
# they ask for a form of the letter before them, and are no letters
_INVISIBLE = frozenset(map(ord, "\u200b\u200c\u200d\u200e\u200f\ufe0e\ufe0f"))
_told: set[str] = set()


@functools.lru_cache(maxsize=4096)
def lettering(text: str, size: int) -> Image.Image:
    """The text as an "L" image, white on black, as high as the font's lines are at `size` pixels."""
    runs = [(_font(path, size), run) for path, run in runs_of(text)]
    widths = [round(font.getlength(run)) for font, run in runs]
    ascent, descent = _font(DEFAULT_FONT, size).getmetrics()
    picture = Image.new("L", (max(sum(widths), 1), ascent + descent))
    draw, x = ImageDraw.Draw(picture), 0
    for (font, run), width in zip(runs, widths, strict=True):
        draw.text((x, ascent), run, fill=255, font=font, anchor="ls")
        x += width
    return picture


@functools.lru_cache(maxsize=4096)
def runs_of(text: str) -> list[tuple[str, str]]:
    """The text's parts, each with the file of a font that has its letters: one part where one font has them all,
    else the letters that one lacks come from another. Where none has a letter, a warning says what to install."""
    text = unicodedata.normalize("NFC", text.replace("\n", " "))
    letters = {ord(letter) for letter in text if letter.isprintable()} - _INVISIBLE
    if font := next((path for path in _fonts_for(frozenset(letters)) if letters <= _letters_in(path)), None):
        return [(font, text)]
    missing = letters - set().union(*map(_letters_in, _fonts_for(frozenset(letters))))
    _warn_of(missing, text)
    runs: list[tuple[str, str]] = []
    for letter in text:
        having = (path for path in _fonts_for(frozenset([ord(letter)])) if ord(letter) in _letters_in(path))
        font = DEFAULT_FONT if ord(letter) in missing else next(having, DEFAULT_FONT)
        joins = runs and (letter == " " or unicodedata.combining(letter) or ord(letter) in _INVISIBLE)
        if runs and (joins or runs[-1][0] == font):
            runs[-1] = (runs[-1][0], runs[-1][1] + letter)
        else:
            runs.append((font, letter))
    return runs


def _fonts_for(letters: frozenset[int]) -> list[str]:
    """The machine's own fonts are looked through only where the default lacks a letter."""
    return [DEFAULT_FONT] if letters <= _letters_in(DEFAULT_FONT) else [DEFAULT_FONT, *_system_fonts()]


@functools.cache
def _system_fonts() -> list[str]:
    """Upright ones of usual weight first."""

    def is_odd(path: str) -> bool:
        return any(style in Path(path).stem.lower() for style in ("bold", "italic", "oblique", "black", "thin", "mono"))

    return sorted(findSystemFonts(), key=lambda path: (is_odd(path), "sans" not in path.lower(), path))


@functools.cache
def _letters_in(path: str) -> frozenset[int]:
    try:
        ImageFont.truetype(path, 20)  # bitmap fonts, of emoji for the most part, have one size of their own
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # no font, or none of FreeType's
        return frozenset()


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _warn_of(missing: set[int], text: str) -> None:
    scripts = {script_of(chr(letter)) for letter in missing}
    if scripts <= _told:
        return
    _told.update(scripts)
    packages = sorted({_PACKAGES.get(script, "fonts-noto-core") for script in scripts - {"EMOJI"}})
    packages += ["fonts-symbola"] * ("EMOJI" in scripts)
    logger.warning(
        "no font on this machine has %s of %r (%s): boxes stand in pictures in its place; install one, on Debian and "
        "Ubuntu by `apt-get install %s`",
        "".join(map(chr, sorted(missing)[:20])),
        text,
        ", ".join(sorted(scripts)),
        " ".join(packages),
    )


def script_of(letter: str) -> str:
    """Unicode's name for what the letter belongs to: "CJK", "THAI"; "EMOJI" for any picture."""
    if unicodedata.category(letter) in ("So", "Sk") or ord(letter) >= 0x1F000:
        return "EMOJI" if ord(letter) < 0x20000 else "CJK"
    return unicodedata.name(letter, "UNKNOWN").split()[0]
