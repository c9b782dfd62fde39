"""Rotated boxes, for which Detectron2 has models and an evaluator, and no mapper."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode


class RotatedMapper(DatasetMapper):
    """Annotations with `bbox` as center x, center y, width, height, angle (degrees, counter-clockwise)."""

    def _transform_annotations(self, dataset_dict: dict[str, Any], transforms: T.TransformList, shape: tuple) -> None:
        annotations = []
        for annotation in dataset_dict.pop("annotations"):
            if annotation.get("iscrowd", 0):
                continue
            annotation = copy.deepcopy(annotation)
            annotation["bbox"] = transforms.apply_rotated_box(np.array([annotation["bbox"]], dtype=np.float64))[0]
            annotation["bbox_mode"] = BoxMode.XYWHA_ABS
            annotations.append(annotation)
        instances = utils.annotations_to_instances_rotated(annotations, shape)
        keep = instances.gt_boxes.nonempty() if len(instances) else torch.zeros(0, dtype=torch.bool)
        dataset_dict["instances"] = instances[keep]
