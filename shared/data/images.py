"""From an image file's bytes to pixels, alike in all detectors: RGB, 8 bits, turned as the annotations are."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps

from shared.data.storage import ImageStorage
from shared.errors import UserError

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# the formats that OpenCV reads too, with what a whole file ends with; where there is no such end, or more follows,
# the file has to be decoded to know whether it is whole
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "BMP": None, "WEBP": None, "TIFF": None}
_SIXTEEN_BITS = (".png", ".tif", ".tiff", ".pgm", ".jp2")  # formats that can have them
_TWELVE_BITS = 4096
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)


def is_image_name(name: str) -> bool:
    """Whether a file's ending is that of a format that Pillow reads."""
    return Image.registered_extensions().get(PurePosixPath(name).suffix.lower()) in Image.OPEN


class BadImageError(UserError):
    """An image file that is not there, cannot be decoded or contradicts the annotation file."""


def read_image(
    images: ImageStorage,
    file_name: str,
    size: tuple[int, int] | None = None,
    name: str = "",
    decode: Callable[[bytes], Any] | None = None,
) -> Any:
    """The decoded image, by default a PIL image in RGB.

    Args:
        size: (width, height) that the annotation file says; None to take the file's, turned as its EXIF says.
        name: what the error calls the image beside its file name.
        decode: from the bytes of an image of 8 bits to what is wanted.

    Raises:
        BadImageError: it cannot be read or decoded, or has another size.
    """

    def refuse(reason: object) -> NoReturn:
        raise unreadable(file_name, name or str(images), reason)

    try:
        data = images.read(file_name)
        if not data:
            refuse("the file is empty")
        plain = plain_bytes(data, size)
        return decode_rgb(plain) if decode is None else decode(plain)
    except UserError:
        raise
    except SizeMismatch as error:
        raise BadImageError(
            f"{file_name} ({name}) has {error.width}×{error.height} pixels, and the annotation file says "
            f"{size[0]}×{size[1]}; correct the file or the image"
        ) from error
    except DECODING_ERRORS as error:
        refuse(error)


def unreadable(file_name: str, name: str, reason: object) -> BadImageError:
    """The error of an image that cannot be decoded."""
    return BadImageError(f"{file_name} ({name}) cannot be read as an image: {str(reason) or type(reason).__name__}")


class SizeMismatch(ValueError):
    """An image of another size than was asked for."""

    def __init__(self, width: int, height: int):
        super().__init__(f"{width}×{height}")
        self.width, self.height = width, height


def plain_bytes(data: bytes, size: tuple[int, int] | None = None) -> bytes:
    """The bytes as they are, where every library makes the same pixels of them; else a PNG that it does: of 16-bit
    grey, of palettes and CMYK, of an animation's first frame, and where EXIF would turn the image away from `size`.

    Args:
        size: (width, height) in the annotation file. EXIF turns the image sideways only where that makes its size
            this one; upside down, which the size does not tell, it turns as MMDetection and Detectron2 do.

    Raises:
        SizeMismatch: the image has another size, either way.
        OSError, SyntaxError, PIL's DecompressionBombError and others: it cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency, and of images that are large
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
            away = turned and size is not None and image.size == tuple(size) and image.width != image.height
            width, height = image.size[::-1] if turned and not away else image.size
            if size is not None and (width, height) != tuple(size):
                raise SizeMismatch(width, height)
            still = not getattr(image, "is_animated", False)
            if image.format in _ENDINGS and image.mode in ("RGB", "L") and still and not away:
                ending = _ENDINGS[image.format]
                if ending is None or not data.endswith(ending):
                    image.load()  # OpenCV makes grey of what is cut off
                return data
            pixels = np.asarray(_to_rgb(image) if away else ImageOps.exif_transpose(_to_rgb(image)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def darkness(images: ImageStorage, file_name: str) -> str:
    """What to say of an image whose 16 bits hold 12, 10 or 8 alone, as microscopes and X-ray detectors leave them: of
    their upper 8, next to nothing is left. "" for any other, and one that cannot be read."""
    if not file_name.lower().endswith(_SIXTEEN_BITS):
        return ""
    try:
        with Image.open(io.BytesIO(images.read(file_name))) as image:
            levels = np.asarray(image) if image.mode.startswith("I") else np.zeros(1)
    except Exception:  # whatever a store's client raises: the read that counts will say it
        return ""
    brightest = int(levels.max())
    if not 255 < brightest < _TWELVE_BITS:
        return ""
    return (
        f"{file_name} has 16 bits a pixel and no value above {brightest}: of 16 bits the upper 8 are taken, so that it "
        f"is all but black (0 to {brightest >> 8} of 255); multiply the values of such images by "
        f"{2 ** (16 - brightest.bit_length())}"
    )


def decode_rgb(data: bytes) -> Image.Image:
    """The image of `plain_bytes` in RGB, turned as its EXIF orientation says."""
    image = Image.open(io.BytesIO(data))
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB":  # else both would copy it
        return image.convert("RGB")
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion of 16 bits makes white of most
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        grey = Image.fromarray(levels.astype(np.uint8))
        grey.info.update(image.info)  # its orientation
        return grey.convert("RGB")
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the resized image

_SUPPORT = {Image.BILINEAR: 1, Image.HAMMING: 1, Image.BICUBIC: 2, Image.LANCZOS: 3}
_MOST = 0.75  # of the resized image: less is not worth two steps


def resize_visible(image: Image.Image, size: tuple[int, int], box: Box, resample: int) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, bit for bit; `size` is (width, height).

    Where an image becomes higher, every Pillow resizes each row, rounds to 8 bits, then resizes each column: the rows
    are independent of each other, and so are the columns.
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
    """Whether an image of that height becomes higher, and much of it is thrown away."""
    left, top, right, bottom = box
    return height < size[1] and (right - left) * (bottom - top) < _MOST * size[0] * size[1]


def needed_rows(height: int, to: int, rows: tuple[int, int], resample: int) -> tuple[int, int]:
    """From which row and up to which one of an image of that height the rows of the one that is resized to the height
    `to` are made."""
    scale = height / to
    reach = _SUPPORT[resample] * max(scale, 1) + 2
    first, last = math.floor((rows[0] + 0.5) * scale - reach), math.ceil((rows[1] - 0.5) * scale + reach)
    return max(first, 0), min(last, height)


def planes_of(image: Image.Image) -> list[np.ndarray]:
    """The red, green and blue of an RGB image, (height, width) uint8 each, not to be written to."""
    shape = image.height, image.width
    return [np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(shape) for channel in "RGB"]
