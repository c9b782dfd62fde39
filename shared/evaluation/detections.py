"""What every detector predicts for one image."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import hotcoco
import msgspec
import numpy as np
import torch
from pycocotools import mask as coco_mask

from shared.data.annotations import CocoAnnotations, rows_of
from shared.data.checks import check_boxes, wrong_segmentation
from shared.data.coco_file import as_ids, decode_json, is_in_reach, unpack, wrong_number_in
from shared.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Detections:
    """The M detections of one image.

    Attributes:
        image_id: COCO's image id.
        boxes: (M, 4) float32, x1 y1 x2 y2 in pixels of the original image.
        scores: (M,) float32, higher is surer.
        labels: (M,) int64, 0 to K-1 in the order of category ids.
        masks: M of COCO's RLE dicts ({"size": [height, width], "counts": …}), or None.
        keypoints: (M, K, 3) float32, x y score as COCO has them (whole numbers are the pixels' centers), or None.
        sizes: (M, 2) float64, width and height as a file has them, or None. With sizes, all numbers are float64: an IoU
            that lies on a threshold must not be rounded.
        track_ids: (M,) int64: the same number for the same object in a video's frames, -1 without; or None.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict] | None = None
    keypoints: np.ndarray | None = None
    sizes: np.ndarray | None = None
    track_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        dtype = np.float32 if self.sizes is None else np.float64
        self.boxes = np.asarray(self.boxes, dtype)
        if self.boxes.size == 0:
            self.boxes = self.boxes.reshape(0, 4)
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise ValueError(f"image {self.image_id}: boxes {self.boxes.shape}, and they are (M, 4): x1 y1 x2 y2")
        self.scores = np.asarray(self.scores, dtype)
        self.labels = np.asarray(self.labels, dtype=np.int64)
        count = len(self.boxes)
        if self.scores.shape != (count,) or self.labels.shape != (count,):
            raise ValueError(
                f"image {self.image_id}: {count} boxes, but scores {self.scores.shape} and labels {self.labels.shape}"
            )
        if self.masks is not None and len(self.masks) != count:
            raise ValueError(f"image {self.image_id}: {count} boxes, but {len(self.masks)} masks")
        if self.sizes is not None and self.sizes.shape != (count, 2):
            raise ValueError(f"image {self.image_id}: {count} boxes, but sizes {self.sizes.shape}")
        if self.keypoints is not None:
            self.keypoints = np.asarray(self.keypoints, dtype)
            if self.keypoints.ndim != 3 or len(self.keypoints) != count or self.keypoints.shape[2] != 3:
                raise ValueError(f"image {self.image_id}: {count} boxes, but keypoints {self.keypoints.shape}")

    def __len__(self) -> int:
        return len(self.boxes)

    def reach(self, min_score: float | np.ndarray) -> np.ndarray:
        """(M,) bool: which have at least this score, for all categories or (K,) by label. None reaches nan."""
        limits = np.asarray(min_score, self.scores.dtype)
        return self.scores >= (limits[self.labels] if limits.ndim else limits)

    def only(self, rows: np.ndarray | Sequence[int]) -> Detections:
        """Some of the detections, given by position or as (M,) bool."""
        names = ("boxes", "scores", "labels", "masks", "keypoints", "sizes", "track_ids")
        return rows_of(self, np.arange(len(self))[rows], names)


def sizes_of(detections: Detections) -> np.ndarray:
    """(M, 2) float64, widths and heights."""
    if detections.sizes is not None:
        return detections.sizes
    boxes = detections.boxes.astype(np.float64)
    return boxes[:, 2:] - boxes[:, :2]


def to_coco_results(detections: Detections, category_ids: list[int]) -> list[dict]:
    """The detections in COCO's result format: one dict each, `bbox` as x y width height."""
    boxes = np.hstack([detections.boxes[:, :2], sizes_of(detections)])
    results = []
    for i, (box, score, label) in enumerate(
        zip(boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ):
        result = {"image_id": detections.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        if detections.masks is not None:
            mask = _in_text(detections.masks[i])
            result["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"]}
        if detections.track_ids is not None and detections.track_ids[i] >= 0:
            result["track_id"] = int(detections.track_ids[i])
        if detections.keypoints is not None:
            result["keypoints"] = detections.keypoints[i].astype(np.float64).ravel().tolist()
        results.append(result)
    return results


class _Result(msgspec.Struct, gc=False):
    """One of COCO's results. Other tools name images by file, and write numbers in quotes."""

    category_id: int
    score: float
    image_id: Any = None  # a whole number, or a name
    bbox: list[float] | None = None
    segmentation: Any = None
    keypoints: list[float] | None = None
    file_name: str | None = None  # as `predict` writes it, whose ids may be positions in a folder


def from_coco_results(results: str | os.PathLike | list[dict], annotations: CocoAnnotations) -> list[Detections]:
    """The detections of each image that COCO results have some of, in the order of image ids. They have masks, and
    keypoints, where every result has; a result without `bbox` has its mask's box.

    An image may be named by its file, with or without folders and ending: in `image_id`, or in `file_name` beside it.

    Args:
        results: a file, or what is in it: [{"image_id", "category_id", "bbox": [x, y, width, height], "score"}, …].

    Raises:
        UserError: they are not COCO results, or not of these annotations; says which result, counted from 0.
    """
    source = "the results" if isinstance(results, list) else str(results)
    rows = _decode_results(results, source)
    _find_named_images(rows, annotations, source)
    as_ids([row.image_id for row in rows], "image_id", source)
    positions_of: dict[int, list[int]] = {}  # by image
    for position, row in enumerate(rows):
        positions_of.setdefault(row.image_id, []).append(position)
    index_of = {image_id: index for index, image_id in enumerate(annotations.image_ids.tolist())}
    if unknown := positions_of.keys() - index_of.keys():
        first = min(positions_of[image_id][0] for image_id in unknown)
        raise UserError(
            f"{source}: result {first}: no image of {annotations.path or 'the annotations'} has the id "
            f"{rows[first].image_id}. This holds for {len(unknown)} of the results' {len(positions_of)} images. Fix: "
            "give the annotations that the results belong to"
        )
    heights, widths = annotations.columns["heights"], annotations.columns["widths"]
    label_of = {category_id: label for label, category_id in enumerate(annotations.category_ids)}

    def refuse(position: int, wrong: str) -> None:
        raise UserError(f"{source}: result {position}, of image {rows[position].image_id}: {wrong}. Fix: correct it")

    masks = [None] * len(rows)
    with_masks = bool(rows) and all(row.segmentation for row in rows)
    with_keypoints = bool(rows) and all(row.keypoints for row in rows)
    for position, row in enumerate(rows):
        if row.file_name and not _same_file(row.file_name, named := annotations.file_name(index_of[row.image_id])):
            refuse(position, f"its file is {row.file_name}, and the annotations' image of this id is {named}")
        if row.category_id not in label_of:
            named = ", ".join(map(str, annotations.category_ids[:20]))
            refuse(position, f"no category has the id {row.category_id}; the annotations have {named}")
        if with_masks or (row.bbox is None and row.segmentation):
            try:
                index = index_of[row.image_id]
                size = int(heights[index]), int(widths[index])
                if wrong := wrong_segmentation(_in_text(row.segmentation), *size):
                    raise ValueError(f"it {wrong}")
                masks[position] = as_rle(row.segmentation, *size)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                refuse(position, f"`segmentation` is not a mask of the image ({error})")
        if row.bbox is None and masks[position] is None:
            refuse(position, "`bbox` is missing")
        row.bbox = row.bbox if row.bbox is not None else coco_mask.toBbox(masks[position]).tolist()
        if len(row.bbox) != 4 or not is_in_reach([*row.bbox, row.score]).all():
            refuse(position, f"`bbox` {row.bbox}, `score` {row.score}: 4 numbers and 1, all finite, are needed")
        if with_keypoints and (len(row.keypoints) % 3 or len(row.keypoints) != len(rows[0].keypoints)):
            refuse(position, f"{len(row.keypoints)} numbers in `keypoints`, and result 0 has {len(rows[0].keypoints)}")
        if with_keypoints and not is_in_reach(row.keypoints).all():
            refuse(position, f"`keypoints` {row.keypoints}: all must be finite, in pixels")

    _check_format(rows, index_of, annotations, source)
    found = []
    for image_id, positions in sorted(positions_of.items()):
        own = [rows[i] for i in positions]
        boxes = np.array([row.bbox for row in own], dtype=np.float64)
        sizes = boxes[:, 2:].copy()
        boxes[:, 2:] += boxes[:, :2]
        found.append(
            Detections(
                image_id,
                boxes,
                [row.score for row in own],
                [label_of[row.category_id] for row in own],
                masks=[masks[i] for i in positions] if with_masks else None,
                keypoints=np.reshape([row.keypoints for row in own], (len(own), -1, 3)) if with_keypoints else None,
                sizes=sizes,
            )
        )
    return found


def _in_text(segmentation: Any) -> Any:
    """RLE with its counts as text, which is bytes in the memory of pycocotools."""
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    return {**segmentation, "counts": counts.decode()} if isinstance(counts, bytes) else segmentation


def _check_format(rows: list[_Result], index_of: dict[int, int], annotations: CocoAnnotations, source: str) -> None:
    """Raises UserError if the boxes are shares of the image's size or corners; warns of negative sizes."""
    boxes = np.array([row.bbox for row in rows], dtype=np.float64).reshape(-1, 4)
    if negative := int((boxes[:, 2:] < 0).any(axis=1).sum()):
        logger.warning("%s: boxes with a negative width or height, and so without area: %d", source, negative)
    indices = [index_of[row.image_id] for row in rows]
    sizes = np.stack([annotations.columns["widths"][indices], annotations.columns["heights"][indices]], axis=1)
    in_use = (boxes[:, 2:] > 0).all(axis=1)
    if in_use.any():
        check_boxes([(boxes[in_use], sizes[in_use])], source)


def _decode_results(results: str | os.PathLike | list[dict], source: str) -> list[_Result]:
    data = b""
    try:
        if isinstance(results, list):
            return msgspec.convert(results, list[_Result], strict=False)
        data = unpack(Path(results).read_bytes(), source)
        return decode_json(data, list[_Result], source)
    except OSError as error:
        raise UserError(
            f"{source} cannot be read: {error.strerror}. Fix: correct the path or its permissions"
        ) from error
    except msgspec.ValidationError as error:
        if "out of range" in str(error) and (number := wrong_number_in(data)):
            raise UserError(f"{source} has the number {number}. Fix: write finite numbers only") from error
        if "got `object`" in str(error) and "$" not in str(error):
            raise UserError(
                f"{source} is not a list of results but an object, like an annotation file. Fix: give a results file "
                "in COCO's format"
            ) from error
        said = re.sub(r" - at `\$\[(\d+)\]\.?(.*)`$", lambda at: f" ({at[2] or 'result'})", str(error))
        where = re.search(r"\$\[(\d+)\]", str(error))
        raise UserError(f"{source}: {f'result {where[1]}: ' if where else ''}{said}. Fix: correct it") from error


def _find_named_images(rows: list[_Result], annotations: CocoAnnotations, source: str) -> None:
    """Replace each `image_id` that is a name, or does not fit the `file_name` beside it, by the image's id."""
    for position, row in enumerate(rows):
        if row.image_id is None and row.file_name:
            row.image_id = row.file_name
        if isinstance(row.image_id, float) and row.image_id.is_integer():
            row.image_id = int(row.image_id)
        if type(row.image_id) not in (int, str):
            raise UserError(
                f"{source}: result {position}: `image_id` is {row.image_id!r}. Fix: name images by id or by file"
            )
    if not any(row.file_name or isinstance(row.image_id, str) for row in rows):
        return
    files = dict(zip(annotations.image_ids.tolist(), map(bytes.decode, annotations.file_names.tolist()), strict=True))
    by_name: dict[str, int | None] = {}  # None: several images
    for position, row in enumerate(rows):
        is_name = isinstance(row.image_id, str)
        if not is_name and (not row.file_name or _same_file(row.file_name, files.get(row.image_id, ""))):
            continue
        by_name = by_name or _ids_by_name(files)
        name = PurePosixPath(row.file_name or row.image_id)
        found = next((by_name[key] for key in (str(name), name.name, name.stem) if key in by_name), None)
        if found is None and is_name and row.image_id.isdecimal() and int(row.image_id) in files:
            found = int(row.image_id)
        if found is not None:
            row.image_id = found
        elif is_name:
            raise UserError(
                f"{source}: result {position}: {row.image_id!r} is not the name of one image of "
                f"{annotations.path or 'the annotations'}. Fix: name images by id or by `file_name`"
            )


def _ids_by_name(files: dict[int, str]) -> dict[str, int | None]:
    """Image ids by file name, by the name without folders, and by both without their ending."""
    ids: dict[str, int | None] = {}
    for image_id, name in files.items():
        path = PurePosixPath(name)
        for key in {str(path.with_suffix("")), path.name, path.stem}:
            ids[key] = image_id if key not in ids else None
    return ids | {str(PurePosixPath(name)): image_id for image_id, name in files.items()}


def _same_file(one: str, other: str) -> bool:
    """One may be named from a folder further up."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def as_rle(segmentation: Any, height: int, width: int) -> dict:
    """COCO's polygons, or RLE, as compressed RLE."""
    if isinstance(segmentation, dict) and list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, and the image's is {[height, width]}")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
        coco_mask.area(segmentation)
        return segmentation
    rles = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.merge(rles) if isinstance(rles, list) else rles


PIXELS_AT_ONCE = 2**27  # of masks at an image's size that are worked on together: 128 MiB of booleans


def masks_at_once(height: int, width: int) -> int:
    """How many masks of an image of that size a GPU works on together, so that a large image fits."""
    return max(PIXELS_AT_ONCE // (height * width), 1)


def encode(masks: torch.Tensor) -> list[dict]:
    """COCO's RLE dict of each of (N, H, W) booleans, computed where they are."""
    return encode_on_device(masks) if masks.is_cuda else encode_masks(masks.numpy())


def encode_masks(masks: Sequence[np.ndarray]) -> list[dict]:
    """COCO's RLE dict of each (H, W) mask, all of one size and type: the bytes of `hotcoco.mask.encode`.

    COCO counts pixels column by column, NumPy keeps them row by row, and walking the columns of such an array takes
    most of an encoder's time. So what a mask covers, which is little of an image, is laid into an image that is kept
    column by column.
    """
    if not len(masks):
        return []
    image = np.zeros(masks[0].shape, masks[0].dtype, order="F")
    encoded = []
    for mask in masks:
        columns = _extent(mask.any(axis=0))
        part = _extent(mask[:, columns].any(axis=1)), columns
        image[part] = mask[part]
        encoded.append(hotcoco.mask.encode(image))
        image[part] = 0
    return encoded


def encode_on_device(masks: torch.Tensor) -> list[dict]:
    """The same of (N, H, W) booleans on a GPU, which sends no pixels to the host but only where runs begin."""
    if not len(masks):
        return []
    return [rle for part in masks.split(masks_at_once(*masks.shape[1:])) for rle in _encode_runs(part)]


def _encode_runs(masks: torch.Tensor) -> list[dict]:
    count, height, width = masks.shape
    pixels = masks.transpose(1, 2).flatten(1)  # in COCO's order
    begins = pixels.clone()
    begins[:, 1:] ^= pixels[:, :-1]
    mask_of, positions = begins.nonzero().cpu().numpy().T
    pieces = np.split(positions, np.searchsorted(mask_of, np.arange(1, count)))
    return [
        hotcoco.mask.frPyObjects(
            {"size": [height, width], "counts": np.diff(piece, prepend=0, append=height * width).tolist()},
            height,
            width,
        )
        for piece in pieces
    ]


def _extent(covered: np.ndarray) -> slice:
    """From the first to the last that is true."""
    found = covered.nonzero()[0]
    return slice(found[0], found[-1] + 1) if len(found) else slice(0)
