"""What every detector predicts for one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Detections:
    """The M detections of one image.

    Attributes:
        image_id: COCO's image id.
        boxes: (M, 4) float32, x1 y1 x2 y2 in pixels of the original image.
        scores: (M,) float32, higher is surer.
        labels: (M,) int64, 0 to K-1 in the order of category ids.
        masks: M of COCO's RLE dicts ({"size": [height, width], "counts": …}), or None.
        keypoints: (M, K, 3) float32, x y score as COCO has them (whole numbers are the pixels' centres), or None.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict] | None = None
    keypoints: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.boxes = np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4)
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.labels = np.asarray(self.labels, dtype=np.int64)
        count = len(self.boxes)
        if self.scores.shape != (count,) or self.labels.shape != (count,):
            raise ValueError(
                f"image {self.image_id}: {count} boxes, but scores {self.scores.shape} and labels {self.labels.shape}"
            )
        if self.masks is not None and len(self.masks) != count:
            raise ValueError(f"image {self.image_id}: {count} boxes, but {len(self.masks)} masks")
        if self.keypoints is not None:
            self.keypoints = np.asarray(self.keypoints, dtype=np.float32)
            if self.keypoints.ndim != 3 or len(self.keypoints) != count or self.keypoints.shape[2] != 3:
                raise ValueError(f"image {self.image_id}: {count} boxes, but keypoints {self.keypoints.shape}")

    def __len__(self) -> int:
        return len(self.boxes)


def to_coco_results(detections: Detections, category_ids: list[int]) -> list[dict]:
    """The detections in COCO's result format: one dict each, `bbox` as x y width height."""
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    results = []
    for i, (box, score, label) in enumerate(
        zip(boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ):
        result = {"image_id": detections.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        if detections.masks is not None:
            counts = detections.masks[i]["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            result["segmentation"] = {"size": list(detections.masks[i]["size"]), "counts": counts}
        if detections.keypoints is not None:
            result["keypoints"] = detections.keypoints[i].astype(np.float64).ravel().tolist()
        results.append(result)
    return results
