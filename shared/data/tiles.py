"""Large images cut into tiles that overlap: a data set whose images are the tiles, and windows of a TIFF file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from shared.data.annotations import CocoAnnotations
from shared.data.images import Box, read_image
from shared.data.storage import DiskImages, ImageStorage
from shared.errors import UserError

_LARGEST_VIEW = 4096  # pixels of a side of the whole image's view


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        size: pixels of a tile's side.
        overlap: the least share of a tile that the next one shows too.
    """

    size: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap <= 0.9:
            raise UserError(
                f"--tiles: {self.size} pixels that overlap by {self.overlap:g}. Fix: give one pixel or more, and an "
                "overlap between 0 and 0.9"
            )

    def starts(self, length: int) -> list[int]:
        """Where the tiles start along a side of that many pixels. All tiles have one size, and the last one ends with
        the image."""
        if length <= self.size:
            return [0]
        step = self.size - round(self.overlap * self.size)
        count = -(-(length - self.size) // step) + 1
        return np.linspace(0, length - self.size, count).round().astype(int).tolist()

    def boxes(self, width: int, height: int) -> list[Box]:
        """The tiles of an image, row by row."""
        return [
            (left, top, min(left + self.size, width), min(top + self.size, height))
            for top in self.starts(height)
            for left in self.starts(width)
        ]


@dataclass(frozen=True)
class Tile:
    """A part of an image, or a view of all of it.

    Attributes:
        image: the image's index in its annotations.
        box: in pixels of the image.
        factor: by which the part is reduced.
        is_view: whether it shows the whole of an image that is also cut.
    """

    image: int
    box: Box
    factor: int = 1
    is_view: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the reduced part."""
        left, top, right, bottom = self.box
        return -(-(right - left) // self.factor), -(-(bottom - top) // self.factor)


def tiles_of(image: int, width: int, height: int, tiling: Tiling) -> list[Tile]:
    """The tiles of an image, and a view of the whole, which shows the objects that are larger than a tile."""
    boxes = tiling.boxes(width, height)
    if len(boxes) == 1:
        return [Tile(image, boxes[0])]
    factor = -(-max(width, height) // _LARGEST_VIEW)
    return [*(Tile(image, box) for box in boxes), Tile(image, (0, 0, width, height), factor, is_view=True)]


def cut(
    annotations: CocoAnnotations, storage: ImageStorage, images: Sequence[int], tiling: Tiling
) -> tuple[list[Tile], CocoAnnotations, TileImages]:
    """The tiles of some images, given by index, and data of which they are the images: without objects, and the image
    id of a tile is its place in the list."""
    tiles, rows, parts = [], [], {}
    for index in images:
        image = annotations[index]
        for tile in tiles_of(index, image.width, image.height, tiling):
            width, height = tile.size
            reduced = "" if tile.factor == 1 else f"/{tile.factor}"
            name = f"{image.file_name}[{','.join(map(str, tile.box))}]{reduced}"
            rows.append({"id": len(tiles), "file_name": name, "width": width, "height": height})
            parts[name] = tile
            tiles.append(tile)
    cut_up = CocoAnnotations.from_dict({"images": rows, "annotations": [], "categories": annotations.categories})
    cut_up.path = annotations.path
    return tiles, cut_up, TileImages(storage, annotations, parts)


@dataclass
class TileImages:
    """The tiles' bytes. Each process keeps the last image, decoded or opened.

    Attributes:
        annotations: of the whole images.
        parts: the tiles by name.
    """

    images: ImageStorage
    annotations: CocoAnnotations
    parts: dict[str, Tile]
    _last: tuple[int, Image.Image | Windows] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.images)

    def read(self, file_name: str) -> bytes:
        tile = self.parts[file_name]
        if self._last is None or self._last[0] != tile.image:
            self._last = None  # before another is decoded
            whole = self.annotations[tile.image]
            self._last = tile.image, open_image(self.images, whole.file_name, (whole.width, whole.height))
        buffer = io.BytesIO()
        part_of(self._last[1], tile).save(buffer, format="BMP")
        return buffer.getvalue()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}


def open_image(images: ImageStorage, name: str, size: tuple[int, int]) -> Image.Image | Windows:
    """An image in RGB, or its windows if they can be read.

    Raises:
        BadImageError: it cannot be read or decoded, or has another size.
    """
    opened = open_windows(path_of(images, name))
    if opened is not None and opened.size == size:
        return opened
    return read_image(images, name, size, f"in {images}")


def part_of(image: Image.Image | Windows, tile: Tile) -> Image.Image:
    """The pixels of a tile, in RGB."""
    if isinstance(image, Windows):
        return image.reduced(tile.factor) if tile.factor > 1 else image.read(tile.box)
    part = image.crop(tile.box)
    return part.reduce(tile.factor) if tile.factor > 1 else part


def path_of(images: ImageStorage, name: str) -> Path | None:
    """The file of an image on this machine; None without one."""
    if isinstance(images, DiskImages):
        return images.folder / name
    return getattr(images, "path_of", lambda _: None)(name)


# --- windows: parts of a TIFF file. rasterio reads them without decoding the rest, so memory does not grow with it.

HOW_TO_READ = (
    "Fix: save it as an 8-bit TIFF in tiles and pip install rasterio; or if you trust it, set data.max_image_pixels"
)
_ENDINGS = (".tif", ".tiff")
_CACHED_MB = 64  # of decoded blocks
_LARGEST_BLOCK = 2**26  # pixels that are decoded at once
_REDUCED_ROWS = 64  # of a reduced image that are read at once


class Windows:
    """An opened TIFF file of 8-bit RGB or gray pixels.

    Attributes:
        size: (width, height).
        has_small_blocks: whether no block, which is decoded as a whole, takes much memory.
    """

    def __init__(self, path: Path):
        import rasterio

        self._environment = rasterio.Env(GDAL_CACHEMAX=_CACHED_MB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with self._environment:
                self._file = rasterio.open(path)
        self.size = self._file.width, self._file.height
        self.has_small_blocks = all(height * width <= _LARGEST_BLOCK for height, width in self._file.block_shapes)

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
