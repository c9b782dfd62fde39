"""The detections of many images in a few arrays: small to send to the chief, and to keep in a file."""

from __future__ import annotations

import json
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from determined.pytorch import MetricReducer

from shared.durable import writing
from shared.errors import UserError
from shared.evaluation.detections import Detections, sizes_of

Gather = Callable[[Any], "list | None"]
"""Sends a slot's value to the chief, which gets all slots' values in the order of ranks; the others get None. Every
slot calls it. Determined's is `context.distributed.gather`."""


def alone(share: Any) -> list:
    """The `Gather` of a single process."""
    return [share]


class ChiefReducer(MetricReducer):
    """A metric that the chief computes of what all slots have seen, and that no error of it leaves.

    What `per_slot_reduce` returns Determined sends to every slot, and prints where `cross_slot_reduce` raises. So the
    first does everything: the slots' shares go to the chief alone, and it returns the metrics, or what went wrong,
    which `raise_if_failed` raises on every slot.

    Args:
        gather: the way to the chief; `alone` for one process.
    """

    def __init__(self, gather: Gather = alone):
        self.gather = gather
        self._failure: Exception | None = None
        self._cause: Exception | None = None

    @abstractmethod
    def share(self) -> Any:
        """What this slot has seen, small to send: arrays rather than objects."""

    @abstractmethod
    def metrics_of(self, shares: list) -> dict[str, float]:
        """The metrics of all slots' shares, in the order of ranks; called on the chief only."""

    def per_slot_reduce(self) -> dict[str, float] | Exception | None:
        """The metrics on the chief, None on the other slots; the error to raise if something failed."""
        shares = self.gather(self._carried(self.share))
        if shares is None:
            return None
        failed = [share for share in shares if isinstance(share, Exception)]
        return failed[0] if failed else self._carried(self.metrics_of, shares)

    def cross_slot_reduce(self, per_slot_metrics: Sequence[dict[str, float] | Exception | None]) -> dict[str, float]:
        """The metrics, on every slot; {} if they failed, see `raise_if_failed`."""
        chief = per_slot_metrics[0]
        self._failure = chief if isinstance(chief, Exception) else None
        return {} if self._failure else chief

    def raise_if_failed(self) -> None:
        """After `cross_slot_reduce`, raises on every slot what failed on one: its UserError, else a RuntimeError."""
        if self._failure is not None:
            raise self._failure from self._cause

    def compute(self) -> dict[str, float]:
        """The metrics of what a single process has seen."""
        metrics = self.cross_slot_reduce([self.per_slot_reduce()])
        self.raise_if_failed()
        return metrics

    def _carried(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        self._cause = None
        try:
            return compute(*arguments)
        except Exception as error:  # whatever it is, all slots must hear of it
            self._cause = error
            if isinstance(error, UserError):
                return UserError(str(error))
            return RuntimeError(f"the evaluation failed: {type(error).__name__}: {error}")


@dataclass
class GatheredDetections:
    """The detections of some images, in arrays: M of them, in the order of images.

    Attributes:
        images: (images,) int64 positions among the data's image ids, sorted; in a file the ids themselves.
        counts: (images,) int64, each image's detections.
        skipped: (skipped,) int64, as `images`: those that cannot be read.
        boxes: (M, 4) float32, x1 y1 x2 y2; float64 with `sizes`.
        scores: (M,) float32; float64 with `sizes`.
        labels: (M,) int32.
        keypoints: (M, 3K) float32 where they are evaluated.
        mask_sizes: (M, 2) int32, height and width; this and the next two where masks are evaluated.
        mask_bytes: (bytes,) uint8, the masks' compressed RLE, one after the other.
        mask_lengths: (M,) int32, bytes of each.
        sizes: (M, 2) float64, see `Detections`; None if no image has them.
    """

    images: np.ndarray
    counts: np.ndarray
    skipped: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    keypoints: np.ndarray | None = None
    mask_sizes: np.ndarray | None = None
    mask_bytes: np.ndarray | None = None
    mask_lengths: np.ndarray | None = None
    sizes: np.ndarray | None = None

    @classmethod
    def of(
        cls, images: np.ndarray, skipped: np.ndarray, detections: list[Detections], masks: bool, keypoints: bool
    ) -> GatheredDetections:
        """Of detections in the order of `images`."""
        share = cls(
            images=images,
            counts=np.array([len(detection) for detection in detections], dtype=np.int64),
            skipped=skipped,
            boxes=np.concatenate([np.empty((0, 4), np.float32), *(d.boxes for d in detections)]),
            scores=np.concatenate([np.empty(0, np.float32), *(d.scores for d in detections)]),
            labels=np.concatenate([np.empty(0, np.int64), *(d.labels for d in detections)]).astype(np.int32),
        )
        if any(detection.sizes is not None for detection in detections):
            share.sizes = np.concatenate([sizes_of(detection) for detection in detections])
        if keypoints:
            share.keypoints = np.concatenate(
                [d.keypoints.reshape(len(d), -1) for d in detections if len(d)] or [np.empty((0, 0), np.float32)]
            )
        if masks:
            rles = [mask for detection in detections for mask in detection.masks]
            pieces = [c.encode() if isinstance(c := rle["counts"], str) else c for rle in rles]
            share.mask_sizes = np.array([rle["size"] for rle in rles], dtype=np.int32).reshape(-1, 2)
            share.mask_bytes = np.frombuffer(b"".join(pieces), np.uint8)
            share.mask_lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
        return share

    def rows(self) -> np.ndarray:
        """(M, 7) float64 of COCO's array format: image, x, y, width, height, score, category."""
        rows = np.empty((len(self.boxes), 7), dtype=np.float64)
        rows[:, 0] = np.repeat(self.images, self.counts)
        rows[:, 1:5] = self.boxes
        rows[:, 3:5] = rows[:, 3:5] - rows[:, 1:3] if self.sizes is None else self.sizes
        rows[:, 5] = self.scores
        rows[:, 6] = self.labels
        return rows

    def rles(self) -> list[dict]:
        """M of COCO's RLE dicts."""
        data, offsets = self.mask_bytes.tobytes(), _offsets(self.mask_lengths).tolist()
        # a few sizes, that all masks share; pairs as one number each sort in a hundredth of the time
        heights, widths = self.mask_sizes.astype(np.int64).T
        pairs, size_of = np.unique(heights << 32 | widths, return_inverse=True)
        sizes = [[pair >> 32, pair & 0xFFFFFFFF] for pair in pairs.tolist()]
        return [
            {"size": sizes[size], "counts": data[start:end]}
            for size, start, end in zip(size_of.tolist(), offsets[:-1], offsets[1:], strict=True)
        ]

    def detections(self) -> list[Detections]:
        """One for each of `images`, which are ids."""
        ends = _offsets(self.counts).tolist()
        rles = None if self.mask_sizes is None else self.rles()
        found = []
        for image_id, start, end in zip(self.images.tolist(), ends[:-1], ends[1:], strict=True):
            points = None if self.keypoints is None else self.keypoints[start:end]
            found.append(
                Detections(
                    image_id,
                    self.boxes[start:end],
                    self.scores[start:end],
                    self.labels[start:end],
                    masks=None if rles is None else rles[start:end],
                    keypoints=None if points is None else points.reshape(end - start, points.shape[1] // 3, 3),
                    sizes=None if self.sizes is None else self.sizes[start:end],
                )
            )
        return found


def save_detections(
    path: Path, found: GatheredDetections, category_names: Sequence[str], max_detections: int | None = None
) -> None:
    """Writes an npz file as a whole.

    Args:
        found: its `images` and `skipped` are ids.
        max_detections: as of `evaluate`.
    """
    arrays = {name: value for name, value in vars(found).items() if value is not None}
    if max_detections is not None:
        arrays["max_detections"] = np.int64(max_detections)
    names = np.frombuffer(json.dumps(list(category_names)).encode(), np.uint8)
    with writing(path) as file:
        np.savez(file, category_names=names, **arrays)


def load_detections(path: Path) -> tuple[GatheredDetections, list[str], int | None]:
    """What `save_detections` wrote: detections, the names of the categories, and `max_detections`.

    Raises:
        UserError: it is no such file, or cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        names = json.loads(arrays.pop("category_names").tobytes())
        most = arrays.pop("max_detections", None)
        return GatheredDetections(**arrays), names, None if most is None else int(most)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} has no detections of a run: it is damaged, or another program's. Fix: validate the run again, or "
            "give a results.json"
        ) from error


def merge(shares: list[GatheredDetections]) -> GatheredDetections:
    """All slots' detections, each image once and in the order of positions: the same for any number of slots."""
    if len(shares) == 1:
        return shares[0]
    images = np.concatenate([share.images for share in shares])
    counts = np.concatenate([share.counts for share in shares])
    kept_images, kept = np.unique(images, return_index=True)  # the first slot's, where several have an image
    kept_counts, starts = counts[kept], _offsets(counts)[kept]
    rows = np.repeat(starts - _offsets(kept_counts)[:-1], kept_counts) + np.arange(kept_counts.sum())

    def rows_of(name: str) -> np.ndarray | None:
        # those without detections do not know how many keypoints there are
        parts = [part for share in shares if (part := getattr(share, name)) is not None and len(part)]
        return np.concatenate(parts)[rows] if parts else getattr(shares[0], name)

    merged = GatheredDetections(
        images=kept_images,
        counts=kept_counts,
        skipped=np.unique(np.concatenate([share.skipped for share in shares])),
        boxes=rows_of("boxes"),
        scores=rows_of("scores"),
        labels=rows_of("labels"),
        keypoints=rows_of("keypoints"),
        mask_sizes=rows_of("mask_sizes"),
        mask_lengths=rows_of("mask_lengths"),
        sizes=rows_of("sizes"),
    )
    if merged.mask_sizes is not None:
        ends = _offsets(np.concatenate([share.mask_lengths for share in shares]))
        data = np.concatenate([share.mask_bytes for share in shares])
        pieces = zip(ends[starts].tolist(), ends[starts + kept_counts].tolist(), strict=True)
        merged.mask_bytes = np.concatenate([data[:0], *(data[start:end] for start, end in pieces)])
    return merged


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
