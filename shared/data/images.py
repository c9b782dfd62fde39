"""From an image file's bytes to pixels: RGB, 8 bits, rotated as the annotations are; and how images are resized."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from shared.data.storage import ImageStorage
from shared.errors import UserError

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# formats that OpenCV reads too, with the end of a whole file. A file without that end is decoded to see if it is whole.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "BMP": None, "WEBP": None, "TIFF": None}
_SIXTEEN_BITS = (".png", ".tif", ".tiff", ".pgm", ".jp2")  # formats that can have them
_TWELVE_BITS = 4096
_DEFAULT_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow refuses images of more than twice as many
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)


class BadImageError(UserError):
    """An image file that is missing, cannot be decoded, or contradicts the annotation file."""


class SizeMismatch(ValueError):
    """An image of another size than was asked for: its own size, in words."""


def allow_pixels(count: int | None) -> None:
    """Sets how many pixels an image may have, in this process and its forks; None for Pillow's 179 million."""
    Image.MAX_IMAGE_PIXELS = _DEFAULT_PIXELS if count is None else math.ceil(count / 2)


def is_image_name(name: str) -> bool:
    """Whether Pillow reads files with this ending."""
    return Image.registered_extensions().get(PurePosixPath(name).suffix.lower()) in Image.OPEN


def read_image(
    images: ImageStorage,
    file_name: str,
    size: tuple[int, int] | None = None,
    name: str = "",
    decode: Callable[[bytes], Any] | None = None,
) -> Any:
    """Reads and decodes an image, by default to a PIL image in RGB.

    Args:
        size: (width, height) in the annotation file; None for the file's own, rotated as its EXIF says.
        name: what errors call the image beside its file name.
        decode: decodes the bytes of an 8-bit image.

    Raises:
        BadImageError: it cannot be read or decoded, or has another size.
    """
    try:
        data = images.read(file_name)
        if not data:
            raise ValueError("the file is empty")
        plain = plain_bytes(data, size)
        return decode_rgb(plain) if decode is None else decode(plain)
    except UserError:
        raise
    except SizeMismatch as error:
        raise BadImageError(
            f"{file_name} ({name}) has {error} pixels, and the annotation file says "
            f"{size[0]}×{size[1]}. Fix: correct the file or the image"
        ) from error
    except DECODING_ERRORS as error:
        raise unreadable(file_name, name or str(images), error) from error


def unreadable(file_name: str, name: str, reason: object) -> BadImageError:
    """The error for an image that cannot be decoded."""
    is_too_large = isinstance(reason, Image.DecompressionBombError)
    fix = "if you trust it, set data.max_image_pixels" if is_too_large else "replace it, or set data.on_bad_image: skip"
    text = str(reason) or type(reason).__name__
    return BadImageError(f"{file_name} ({name}) cannot be read as an image: {text}. Fix: {fix}")


def plain_bytes(data: bytes, size: tuple[int, int] | None = None) -> bytes:
    """The bytes themselves if all libraries decode them to the same pixels, else a PNG for which they do.

    A PNG replaces gray of more than 8 bits, palettes, CMYK and animations (their first frame). It also replaces images
    that EXIF would rotate away from `size`.

    Args:
        size: (width, height) in the annotation file. EXIF rotates the image sideways only if the result has this size.
            It rotates upside down in any case, as MMDetection and Detectron2 do, because the size does not tell.

    Raises:
        SizeMismatch: the image has another size in both orientations.
        ValueError: its values do not show what is black and what is white.
        OSError, SyntaxError, PIL's DecompressionBombError and others: it cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparent palettes and large images
        with Image.open(io.BytesIO(data)) as image:
            is_deep = _has_16_bit_channels(image)
            turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            away = turned and size is not None and image.size == tuple(size) and image.width != image.height
            width, height = image.size[::-1] if turned and not away else image.size
            if size is not None and (width, height) != tuple(size):
                raise SizeMismatch(f"{width}×{height}")
            still = not getattr(image, "is_animated", False)
            if is_deep:
                _check_brightness(image)
            if image.format in _ENDINGS and image.mode in ("RGB", "L") and still and not away:
                ending = _ENDINGS[image.format]
                if ending is None or not data.endswith(ending):
                    image.load()  # OpenCV makes gray of missing parts
                return data
            pixels = np.asarray(_to_rgb(image) if away else ImageOps.exif_transpose(_to_rgb(image)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def value_range(images: ImageStorage, file_name: str) -> tuple[str, float, float] | None:
    """The mode, the lowest and the highest value of a gray image with more than 8 bits. None for other images and those
    that cannot be read."""
    if not file_name.lower().endswith(_SIXTEEN_BITS):
        return None
    try:
        with Image.open(io.BytesIO(images.read(file_name))) as image:
            if not image.mode.startswith(("I", "F")):
                return None
            levels = np.asarray(image)
            return image.mode, levels.min().item(), levels.max().item()
    except Exception:  # whatever a store's client raises: the real read reports it
        return None


def darkness(file_name: str, found: tuple[str, float, float] | None) -> str:
    """A warning about a 16-bit image whose values have 9 to 12 bits, as microscopes and X-ray detectors write them: its
    upper 8 bits are nearly empty. "" for other images.

    Args:
        found: see `value_range`.
    """
    mode, _, brightest = found or ("", 0, 0)
    if not mode.startswith("I") or not 255 < brightest < _TWELVE_BITS:
        return ""
    return (
        f"{file_name} has 16 bits a pixel and no value above {brightest}: of 16 bits the upper 8 are taken, so that it "
        f"is all but black (0 to {brightest >> 8} of 255); multiply the values of such images by "
        f"{2 ** (16 - brightest.bit_length())}"
    )


def decode_rgb(data: bytes) -> Image.Image:
    """The image of `plain_bytes` in RGB, rotated as its EXIF orientation says."""
    image = Image.open(io.BytesIO(data))
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB":  # else both calls would copy it
        return image.convert("RGB")
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion makes most values white or black
        grey = Image.fromarray(_as_8_bits(np.asarray(image)))
        grey.info.update(image.info)  # which has its orientation
        return grey.convert("RGB")
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _as_8_bits(levels: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 or to 255, and integers of 8 or 16 bits, as uint8. Raises ValueError for others."""
    low, high = levels.min().item(), levels.max().item()
    is_float = levels.dtype.kind == "f"
    if not 0 <= low <= high <= (255 if is_float else 65535):  # NaN too
        fix = "as floats from 0 to 1, or as integers of 8 or 16 bits"
        raise ValueError(f"its values are from {low:g} to {high:g}, of mode {levels.dtype}. Fix: save it {fix}")
    if is_float:
        return np.rint(levels * 255 if high <= 1 else levels).astype(np.uint8)
    return (levels if high <= 255 else levels >> 8).astype(np.uint8)


def _has_16_bit_channels(image: Image.Image) -> bool:
    """Whether a color image that was opened and not yet loaded has 16 bits per channel."""
    arguments = image.tile[0][3] if image.tile and image.mode in ("RGB", "RGBA") else ""
    return ";16" in str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _check_brightness(image: Image.Image) -> None:
    """Raises ValueError if 16 bits per channel hold 12 or fewer: Pillow reads the upper 8 bits alone."""
    brightest = max(high for _, high in image.getextrema()[:3])
    if brightest < _TWELVE_BITS >> 8:
        raise ValueError(
            f"it has 16 bits per channel and no value above {_TWELVE_BITS - 1}, so that it is nearly black (0 to "
            f"{brightest} of 255). Fix: multiply its values by 16, or save it with 8 bits per channel"
        )


# --- resizing ---------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

_SUPPORT = {Image.BILINEAR: 1, Image.HAMMING: 1, Image.BICUBIC: 2, Image.LANCZOS: 3}
_MAX_SHARE = 0.75  # of the resized image: two steps save less for a larger box


@dataclass
class InputScale:
    """How large objects are for the model.

    Attributes:
        smallest: pixels of the model's input: the side of its smallest anchor or stride.
        kind: which of these, "anchor" or "stride".
        short, long: the largest sides, in pixels, of a resized image, which keeps its aspect ratio.
    """

    smallest: float
    kind: str
    short: float
    long: float

    def factor(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """(images,) input pixels per pixel of each image."""
        return np.minimum(self.short / np.minimum(widths, heights), self.long / np.maximum(widths, heights))


def resize_visible(image: Image.Image, size: tuple[int, int], box: Box, resample: int) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, bit for bit, but quicker; `size` is (width, height).

    If an image becomes higher, Pillow resizes each row, rounds to 8 bits, and then resizes each column. The rows are
    independent of each other, and so are the columns.
    """
    (width, height), (left, top, right, bottom) = size, box
    if not in_two_steps(image.height, size, box):
        resized = image.resize(size, resample)
        return resized if box == (0, 0, *size) else resized.crop(box)
    first, last = needed_rows(image.height, height, (top, bottom), resample)
    wide = image.crop((0, first, image.width, last)).resize((width, last - first), resample)
    tall = Image.new(image.mode, (right - left, image.height))
    tall.paste(wide.crop((left, 0, right, last - first)), (0, first))
    return tall.resize((right - left, height), resample).crop((0, top, right - left, bottom))


def in_two_steps(height: int, size: tuple[int, int], box: Box) -> bool:
    """Whether an image of that height becomes higher, and much of it is cropped."""
    left, top, right, bottom = box
    return height < size[1] and (right - left) * (bottom - top) < _MAX_SHARE * size[0] * size[1]


def needed_rows(height: int, to: int, rows: tuple[int, int], resample: int) -> tuple[int, int]:
    """The first and the last row of an image of that height that rows of the image resized to height `to` need."""
    scale = height / to
    reach = _SUPPORT[resample] * max(scale, 1) + 2
    first, last = math.floor((rows[0] + 0.5) * scale - reach), math.ceil((rows[1] - 0.5) * scale + reach)
    return max(first, 0), min(last, height)


def planes_of(image: Image.Image) -> list[np.ndarray]:
    """The red, green and blue planes of an RGB image: (height, width) uint8 each, read-only."""
    shape = image.height, image.width
    return [np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(shape) for channel in "RGB"]
