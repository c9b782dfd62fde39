"""Pictures of images with boxes, masks and keypoints."""

from __future__ import annotations

import functools
import logging
import math
import os
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findSystemFonts
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pycocotools import mask as coco_mask

from shared.data.annotations import ImageRecord
from shared.evaluation.detections import Detections

Color = tuple[int, int, int]

_COUNT = 256  # then they begin again
_FIRST = (31, 119, 180)
# Oklab, in which a distance is about what the eye makes of it: https://bottosson.github.io/posts/oklab
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def color_of(label: int) -> Color:
    """The same in every picture and every run."""
    return _palette()[label % _COUNT]


def on_color(color: Color) -> Color:
    """Black or white: what can be read on the colour."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@functools.cache
def _palette() -> list[Color]:
    """Each is, of the colours that stand out on a photograph, the one farthest from all before it."""
    levels = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    stands_out = (np.hypot(lab[:, 1], lab[:, 2]) > 0.09) & (lab[:, 0] > 0.4) & (lab[:, 0] < 0.9)
    candidates, lab = candidates[stands_out], lab[stands_out]
    chosen, distance = [_FIRST], np.full(len(lab), np.inf)
    for _ in range(_COUNT - 1):
        to_last = np.linalg.norm((lab - _oklab(np.array(chosen[-1]))) * (0.6, 1, 1), axis=1)
        distance = np.minimum(distance, to_last)
        chosen.append(tuple(int(level) for level in candidates[distance.argmax()]))
    return chosen


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) lightness and two axes of colour, of sRGB from 0 to 255."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T


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


def write_pdf(path: Path, image: Image.Image, objects: Objects, scale: float = 1.0) -> None:
    """A page of the image's pixels at 72 an inch, `scale` times as large; its masks are pixels."""
    pixels = with_masks(image, objects, scale)
    figure = Figure(figsize=(pixels.width / 72, pixels.height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), aspect="auto", interpolation="none")
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    axes.set_axis_off()
    line, letters = line_width(pixels.size), letter_size(pixels.size)
    for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        color = tuple(level / 255 for level in color_of(objects.labels[i]))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=line))
        if objects.keypoints is not None:
            for ends in objects.limbs(i):
                axes.plot(*ends.T, color=color, linewidth=line)
            axes.scatter(*objects.joints(i).T, s=(2 * line) ** 2, color="white", edgecolors=[color], zorder=3)
        text = objects.names[i] + objects.endings[i]
        axes.text(
            min(max(x1, 0), image.width),
            max(y1, 0),
            text.replace("$", r"\$"),
            color=tuple(level / 255 for level in on_color(color_of(objects.labels[i]))),
            font=FontProperties(fname=runs_of(text)[0][0], size=0.8 * letters),
            verticalalignment="bottom" if y1 * scale > 1.5 * letters else "top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
            clip_on=True,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # said already, see `runs_of`
        figure.savefig(path, format="pdf")


MASK_OPACITY = 0.45
_KEYPOINT_SCORE = 0.05
_SIDE_OF_SMOOTH_LIMBS = 1600  # pixels; in larger pictures they are smooth enough


@dataclass
class Objects:
    """What is drawn of an image: N objects, in its own pixels.

    Attributes:
        boxes: (N, 4) x1 y1 x2 y2, pixel i reaches from i to i + 1.
        labels: N, which give the colours.
        names, endings: N each, of the captions: where a caption is too long, the name is cut.
        masks: N of COCO's RLE dicts, None where there is none.
        keypoints: (N, K, 3), x y and whether it is there; whole numbers are the pixels' centres.
        skeletons: by label, pairs of keypoints that are joined, from 0 on.
    """

    boxes: np.ndarray
    labels: list[int]
    names: list[str]
    endings: list[str]
    masks: Sequence[dict | None] | None = None
    keypoints: np.ndarray | None = None
    skeletons: Sequence[Sequence[tuple[int, int]]] = ()

    def limbs(self, i: int) -> Iterator[np.ndarray]:
        """(2, 2) x y of the ends of each limb whose ends are both there."""
        points = self.keypoints[i]
        for pair in self.skeletons[self.labels[i]]:
            if max(pair) < len(points) and points[list(pair), 2].all():
                yield points[list(pair), :2] + 0.5

    def joints(self, i: int) -> np.ndarray:
        """(points, 2) x y of those that are there."""
        points = self.keypoints[i]
        return points[points[:, 2] > 0, :2] + 0.5


def objects_of_detections(detections: Detections, categories: Sequence[dict], min_score: float) -> Objects:
    """The detections of at least `min_score`, the surest last, over the others.

    Args:
        categories: COCO categories by label; "skeleton", pairs of keypoints from 1 on, says which are joined.
    """
    keep = np.flatnonzero(detections.scores >= min_score)
    keep = keep[np.argsort(detections.scores[keep], kind="stable")]
    labels = detections.labels[keep].tolist()
    points = None if detections.keypoints is None else detections.keypoints[keep].copy()
    if points is not None:
        points[..., 2] = points[..., 2] > _KEYPOINT_SCORE
    return Objects(
        boxes=detections.boxes[keep],
        labels=labels,
        names=[str(categories[label]["name"]) for label in labels],
        endings=[f" {score:.2f}" for score in detections.scores[keep].tolist()],
        masks=None if detections.masks is None else [detections.masks[i] for i in keep],
        keypoints=points,
        skeletons=_skeletons(categories),
    )


def objects_of_truth(
    record: ImageRecord, categories: Sequence[dict], with_masks: bool = False, with_keypoints: bool = False
) -> Objects:
    """The annotated objects; a crowd says so, and lies below the others."""
    order = np.argsort(~record.iscrowd, kind="stable")
    labels = record.labels[order].tolist()
    segmentations = record.segmentations if with_masks else None
    return Objects(
        boxes=record.boxes[order],
        labels=labels,
        names=[str(categories[label]["name"]) for label in labels],
        endings=[" (crowd)" if crowd else "" for crowd in record.iscrowd[order]],
        masks=None if segmentations is None else [_rle(segmentations[i], record) for i in order],
        keypoints=record.keypoints[order] if with_keypoints and record.keypoints is not None else None,
        skeletons=_skeletons(categories),
    )


def _skeletons(categories: Sequence[dict]) -> list[list[tuple[int, int]]]:
    return [[(a - 1, b - 1) for a, b in category.get("skeleton") or ()] for category in categories]


def _rle(segmentation: list | dict | None, record: ImageRecord) -> dict | None:
    """COCO's polygons or RLE as compressed RLE, None where there is nothing that can be filled."""
    if isinstance(segmentation, list):  # a polygon has three points or more
        segmentation = [polygon for polygon in segmentation if isinstance(polygon, list) and len(polygon) >= 6]
    if not segmentation:
        return None
    try:
        if isinstance(segmentation["counts"] if isinstance(segmentation, dict) else None, (str, bytes)):
            return segmentation
        rles = coco_mask.frPyObjects(segmentation, record.height, record.width)
    except (TypeError, ValueError, KeyError):  # to be drawn it need not be right: `check` says what is wrong
        return None
    return coco_mask.merge(rles) if isinstance(rles, list) else rles


def draw(image: Image.Image, objects: Objects, scale: float = 1.0) -> Image.Image:
    """The image, `scale` times as large, with the objects on it; lines and letters are as large as fits the picture."""
    picture = with_masks(image, objects, scale)
    scales = _scales(picture, image)
    boxes = np.asarray(objects.boxes, dtype=np.float64) * np.tile(scales, 2)
    colors = [color_of(label) for label in objects.labels]
    line = line_width(picture.size)
    for box, color in zip(boxes.tolist(), colors, strict=True):
        _draw_box(picture, box, color, line)
    if objects.keypoints is not None:
        for i, color in enumerate(colors):
            _draw_keypoints(picture, objects, i, color, scales, line)
    captions, taken = [], []
    for i in reversed(range(len(boxes))):  # the surest has the best place
        caption = _caption(objects.names[i], objects.endings[i], picture.size, colors[i])
        left, top = _place_of_caption(boxes[i].tolist(), caption.size, picture.size, line, taken)
        taken.append((left, top, left + caption.width, top + caption.height))
        captions.append(caption)
    for caption, (left, top, *_) in reversed([*zip(captions, taken, strict=True)]):  # and lies over the others
        picture.paste(caption, (left, top))
    return picture


def with_masks(image: Image.Image, objects: Objects, scale: float) -> Image.Image:
    """A new image, `scale` times as large, with the objects' masks alone."""
    size = tuple(max(round(side * scale), 1) for side in image.size)
    if size == image.size:
        picture = image.convert("RGB")
        picture = picture.copy() if picture is image else picture
    else:
        how = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
        picture = image.convert("RGB").resize(size, how, reducing_gap=2.0)
    scales = _scales(picture, image)
    for mask, label in zip(objects.masks or (), objects.labels, strict=False):
        if mask is not None:
            _draw_mask(picture, mask, color_of(label), scales)
    return picture


def _scales(picture: Image.Image, image: Image.Image) -> np.ndarray:
    """x and y: a picture has whole pixels."""
    return np.array([picture.width / image.width, picture.height / image.height])


def line_width(size: tuple[int, int]) -> float:
    """Pixels, in a picture of this size."""
    return max(max(size) / 400, 2)


def letter_size(size: tuple[int, int]) -> int:
    """Pixels from line to line, nearly, in a picture of this size."""
    return max(round(max(size) / 62), 9)


def _draw_mask(picture: Image.Image, mask: dict, color: Color, scales: np.ndarray) -> None:
    x, y, width, height = coco_mask.toBbox(mask).tolist()
    inside = coco_mask.decode(mask)
    left, top = (int(v) for v in np.array([x, y]) * scales)
    right, bottom = (math.ceil(v) for v in np.array([x + width, y + height]) * scales)
    columns = ((np.arange(left, right) + 0.5) / scales[0]).astype(int).clip(0, inside.shape[1] - 1)
    rows = ((np.arange(top, bottom) + 0.5) / scales[1]).astype(int).clip(0, inside.shape[0] - 1)
    if len(rows) and len(columns):
        opacity = np.ascontiguousarray(inside[rows[:, None], columns]) * np.uint8(round(255 * MASK_OPACITY))
        picture.paste(color, (left, top), Image.fromarray(opacity))


def _draw_box(picture: Image.Image, box: Sequence[float], color: Color, line: float) -> None:
    """Lines with their middle on the box's edges, a pixel as much as they cover of it."""
    (x1, y1, x2, y2), half = box, line / 2
    for edge in (x1, x2):
        _fill(picture, (edge - half, y1 - half, edge + half, y2 + half), color)
    for edge in (y1, y2):  # between the others
        _fill(picture, (x1 + half, edge - half, x2 - half, edge + half), color)


def _fill(picture: Image.Image, area: tuple[float, float, float, float], color: Color) -> None:
    x1, y1, x2, y2 = (max(value, 0) for value in area)
    x2, y2 = min(x2, picture.width), min(y2, picture.height)
    if x2 <= x1 or y2 <= y1:
        return
    left, top = int(x1), int(y1)
    across, down = _covered(x1, x2), _covered(y1, y2)
    opacity = np.rint(255 * down[:, None] * across).astype(np.uint8)
    picture.paste(color, (left, top), Image.fromarray(opacity))


def _covered(start: float, end: float) -> np.ndarray:
    """How much of each pixel from `int(start)` on lies between both."""
    pixels = np.arange(int(start), math.ceil(end))
    return (np.minimum(pixels + 1, end) - np.maximum(pixels, start)).clip(0, 1)


def _draw_keypoints(
    picture: Image.Image, objects: Objects, i: int, color: Color, scales: np.ndarray, line: float
) -> None:
    joints = objects.joints(i) * scales
    if not len(joints):
        return
    smooth = 4 if max(picture.size) < _SIDE_OF_SMOOTH_LIMBS else 1
    radius = 1.6 * line
    left, top = (int(v) for v in np.floor(joints.min(axis=0) - radius - 1))
    right, bottom = (int(v) for v in np.ceil(joints.max(axis=0) + radius + 1))

    def fill(fill_color: Color, paint: Callable[[ImageDraw.ImageDraw], None]) -> None:
        layer = Image.new("L", ((right - left) * smooth, (bottom - top) * smooth))
        paint(ImageDraw.Draw(layer))
        picture.paste(fill_color, (left, top), layer.reduce(smooth) if smooth > 1 else layer)

    def at(points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(point) for point in ((points - (left, top)) * smooth).tolist()]

    def dots(drawn: ImageDraw.ImageDraw, size: float) -> None:
        for x, y in at(joints):
            drawn.ellipse((x - size * smooth, y - size * smooth, x + size * smooth, y + size * smooth), fill=255)

    def lines_and_rims(drawn: ImageDraw.ImageDraw) -> None:
        for ends in objects.limbs(i):
            drawn.line(at(ends * scales), fill=255, width=max(round(line * smooth), 1))
        dots(drawn, radius)

    fill(color, lines_and_rims)
    fill((255, 255, 255), lambda drawn: dots(drawn, radius - line / 2))


def _caption(name: str, ending: str, size: tuple[int, int], color: Color) -> Image.Image:
    """The text on its colour, no wider than the picture."""
    letters = letter_size(size)
    border = max(letters // 8, 1)
    text = lettering(name + ending, letters)
    kept = len(name)
    while text.width + 2 * border > size[0] and kept > 1:
        kept = max(min(kept - 1, int(kept * size[0] / text.width)), 1)
        text = lettering(f"{name[:kept].rstrip()}…{ending}", letters)
    caption = Image.new("RGB", (text.width + 2 * border, text.height), color)
    caption.paste(on_color(color), (border, 0), text)
    return caption.crop((0, 0, *(min(a, b) for a, b in zip(caption.size, size, strict=True))))


def _place_of_caption(
    box: Sequence[float],
    caption: tuple[int, int],
    picture: tuple[int, int],
    line: float,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int]:
    """Above the box, or else in it or below it, where no other caption is; in the picture in any case."""
    (x1, y1, x2, y2), half = box, line / 2
    width, height = caption
    above, in_top, in_bottom, below = y1 - half - height, y1 + half, y2 - half - height, y2 + half
    starts, ends = x1 - half, x2 + half - width
    best: tuple[int, tuple[int, int]] | None = None
    for x, y in ((starts, above), (starts, in_top), (ends, above), (starts, below), (starts, in_bottom), (ends, below)):
        left = round(min(max(x, 0), picture[0] - width))
        top = round(min(max(y, 0), picture[1] - height))
        moved = round(abs(top - y)) * width if y in (above, below) else 0  # it would cover what it names
        hidden = moved + sum(
            max(min(left + width, right) - max(left, other_left), 0)
            * max(min(top + height, bottom) - max(top, other_top), 0)
            for other_left, other_top, right, bottom in taken
        )
        if best is None or hidden < best[0]:
            best = (hidden, (left, top))
        if hidden == 0:
            break
    return best[1]


MADE_BY = "detection-on-determined"  # PNG's "Software": such a picture is no image to detect on
_MOST_PIXELS = 4000  # on a side of a picture; larger images are drawn smaller
_MARGIN = 8


def picture_of(
    image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float = 0.3
) -> Image.Image:
    """The image with the boxes (masks, keypoints) of at least `min_score`, each labelled with category and score; one
    of more than 4,000 pixels a side is made smaller.

    Args:
        categories: COCO categories by label; "skeleton", pairs of keypoints from 1 on, says which are joined.
    """
    return draw(image, objects_of_detections(detections, categories, min_score), _scale(image))


def save_picture_of(
    path: Path, image: Image.Image, detections: Detections, categories: Sequence[dict], min_score: float = 0.3
) -> None:
    """`picture_of` as a file, PNG or PDF by the path's ending; in a PDF lines and letters stay sharp."""
    if path.suffix == ".pdf":
        write_pdf(path, image, objects_of_detections(detections, categories, min_score), _scale(image))
    else:
        save(picture_of(image, detections, categories, min_score), path)


def side_by_side(
    samples: Sequence[tuple[Image.Image, ImageRecord, Detections]],
    categories: Sequence[dict],
    min_score: float = 0.3,
    width: int = 1400,
) -> Image.Image:
    """A row a sample, `width` pixels wide: the ground truth on the left, the detections on the right."""
    cells = []
    for image, record, found in samples:
        truth = objects_of_truth(record, categories, found.masks is not None, found.keypoints is not None)
        detected = objects_of_detections(found, categories, min_score)
        cells.append((image, truth, f"ground truth, {_named(record)}"))
        cells.append((image, detected, f"detections of score ≥ {min_score:g}, {_named(record)}"))
    return _grid(cells, 2, width)


def page_of_truth(
    samples: Sequence[tuple[Image.Image, ImageRecord]], categories: Sequence[dict], width: int = 1800
) -> Image.Image:
    """Images with their annotated boxes, masks and keypoints, three a row."""
    return _grid(
        [
            (image, objects_of_truth(record, categories, with_masks=True, with_keypoints=True), _named(record))
            for image, record in samples
        ],
        3,
        width,
    )


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """As a file of the kind that the path's ending says; a PNG is marked as drawn, see `is_drawn`."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", MADE_BY)
    # of photographs higher levels save some hundredths and take five times as long; runs alone save a fifth and time
    fast = {"compress_level": 1, "compress_type": zlib.Z_RLE, "pnginfo": about}
    picture.save(path, **(fast if Path(path).suffix == ".png" else {}))


def is_drawn(image: Image.Image) -> bool:
    """Whether an opened file is a picture that `save` has written."""
    return image.info.get("Software") == MADE_BY


def _scale(image: Image.Image) -> float:
    return min(_MOST_PIXELS / max(image.size), 1.0)


def _named(record: ImageRecord) -> str:
    return f"{record.file_name}, id {record.image_id}"


def _grid(cells: Sequence[tuple[Image.Image, Objects, str]], columns: int, width: int) -> Image.Image:
    """Cells of equal width, each an image with its title above; a row is as high as its highest image."""
    room = (width - _MARGIN) // columns - _MARGIN  # for an image
    letters = letter_size((room, room))
    pictures = []
    for image, objects, title in cells:
        # an image that is high is made as small as one that is square
        pictures.append((draw(image, objects, room / max(image.size)), _title(title, letters, room)))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(title.height + picture.height for picture, title in row) + _MARGIN for row in rows]
    page = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    y = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, title) in enumerate(row):
            x = _MARGIN + column * (room + _MARGIN)
            page.paste((0, 0, 0), (x, y), title)
            page.paste(picture, (x + (room - picture.width) // 2, y + title.height))
        y += height
    return page


def _title(text: str, letters: int, room: int) -> Image.Image:
    """The text, its beginning left out where it is too long: a path's end says more."""
    title, kept = lettering(text, letters), len(text)
    while title.width > room and kept > 1:
        kept = min(kept - 1, int(kept * room / title.width))
        title = lettering("…" + text[-kept:], letters)
    return title
