"""Parts of a large TIFF file, read by rasterio without decoding the rest. The memory does not grow with the image."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

HOW_TO_READ = (
    "Fix: save it as an 8-bit TIFF in tiles and pip install rasterio; or if you trust it, set data.max_image_pixels"
)
_ENDINGS = (".tif", ".tiff")
_CACHED_MB = 64  # of decoded blocks
_LARGEST_BLOCK = 2**26  # pixels that are decoded at once
_REDUCED_ROWS = 64  # of a reduced image that are read at once


class Windows:
    """An opened TIFF file of 8-bit RGB or grey pixels.

    Attributes:
        size: (width, height).
    """

    def __init__(self, path: Path):
        import rasterio

        self._environment = rasterio.Env(GDAL_CACHEMAX=_CACHED_MB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with self._environment:
                self._file = rasterio.open(path)
        self.size = self._file.width, self._file.height

    @property
    def has_small_blocks(self) -> bool:
        """Whether no block, which is decoded as a whole, takes much memory."""
        return all(height * width <= _LARGEST_BLOCK for height, width in self._file.block_shapes)

    def read(self, box: Box) -> Image.Image:
        """A part of the image, in RGB."""
        from rasterio.windows import Window

        left, top, right, bottom = box
        with self._environment:
            planes = self._file.read(window=Window(left, top, right - left, bottom - top))
        return Image.fromarray(np.ascontiguousarray(planes[:3].transpose(1, 2, 0)).squeeze()).convert("RGB")

    def reduced(self, factor: int) -> Image.Image:
        """The whole image, each side divided by `factor`, as Pillow's `reduce`."""
        (width, height), rows = self.size, factor * _REDUCED_ROWS
        small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        for top in range(0, height, rows):
            strip = self.read((0, top, width, min(top + rows, height)))
            small.paste(strip.reduce(factor), (0, top // factor))
        return small


def open_windows(path: Path | None) -> Windows | None:
    """The file, if windows of it can be read: an upright 8-bit TIFF in strips or tiles, with rasterio installed."""
    if path is None or path.suffix.lower() not in _ENDINGS:
        return None
    try:
        with path.open("rb") as file:
            # `Image.open` would refuse a large image, although nothing is decoded here
            image = TiffImagePlugin.TiffImageFile(file)
            is_plain = image.mode in ("RGB", "L") and image.n_frames == 1
            if not is_plain or image.tag_v2.get(ExifTags.Base.Orientation, 1) != 1:
                return None
        opened = Windows(path)
    except (ImportError, OSError, SyntaxError, ValueError):  # another reader reports what is wrong with the file
        return None
    return opened if opened.has_small_blocks else None
