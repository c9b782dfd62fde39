"""The 80 categories of COCO: what the published weights detect, where no annotation file says more."""

from __future__ import annotations

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

# ids from 1 to 90, ten of which COCO does not use
COCO_CATEGORIES = [
    {"id": category_id, "name": name}
    for category_id, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
]
