"""An exported file as a detector: ONNX Runtime, OpenVINO and PyTorch behind one interface."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.environment import available_cores
from shared.errors import UserError
from shared.evaluation.detections import Detections, encode_masks
from shared.export import detect_raw
from shared.export.metadata import PREFIX, Metadata

# from (B, 3, H, W) uint8 images to the outputs, in the order of the metadata
Run = Callable[[np.ndarray], Sequence[np.ndarray]]
_IN_MASK = 0.5  # the least probability of a pixel in a mask


class ExportedDetector:
    """Detects with a file of `model_def.py export`.

    Attributes:
        path, metadata: the file, and what it says about itself.
        categories: COCO categories; the position is the label.
        device: where the runtime computes.
        iou_types: "bbox", and "segm" if the file finds masks.
    """

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
            UserError: the file is missing or not an exported detector, or its runtime is not installed.
        """
        self.path = Path(path)
        if self.path.suffix not in ENDINGS:
            raise UserError(
                f"--model: {path} is not an exported file. Fix: give a file that ends in {', '.join(ENDINGS)}"
            )
        if not self.path.is_file():
            raise UserError(f"--model: {path} does not exist. Fix: write it with `model_def.py export`")
        try:
            self._run, strings, self.device = ENDINGS[self.path.suffix](self.path)
        except ModuleNotFoundError as error:
            raise UserError(
                f"--model: {path} needs the package {error.name}. Fix: pip install '.[export]', in the project's folder"
            ) from error
        except Exception as error:  # a file that is cut off or foreign fails in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--model: {path} cannot be read ({reason}). Fix: export it again") from error
        self.metadata = Metadata.of_strings(strings, self.path)
        self.categories = self.metadata.categories
        has_masks = any(name.endswith("masks") for name in self.metadata.outputs)
        self.iou_types = ("bbox", "segm") if has_masks else ("bbox",)

    def detect(self, images: Sequence[np.ndarray], image_ids: Sequence[int] | None = None) -> list[Detections]:
        """The detections of (H, W, 3) uint8 RGB images, the best first. Images of one size share a batch.

        Args:
            image_ids: for the detections; None for the positions.
        """
        image_ids = range(len(images)) if image_ids is None else image_ids
        if self.metadata.decoding is not None:
            raw = detect_raw.detections(self._run, images, self.metadata.input_size, self.metadata.decoding)
            return [Detections(image_id, *found) for image_id, found in zip(image_ids, raw, strict=True)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for position, image in enumerate(images):
            groups.setdefault(image.shape, []).append(position)
        found: dict[int, Detections] = {}
        for positions in groups.values():
            batch = np.stack([images[position] for position in positions]).transpose(0, 3, 1, 2)
            outputs = dict(zip(self.metadata.outputs, self._run(np.ascontiguousarray(batch)), strict=True))
            for row, position in enumerate(positions):
                own = {name: values[row] for name, values in outputs.items()}
                found[position] = _detections(own, image_ids[position], images[position].shape[:2])
        return [found[position] for position in range(len(images))]


def _detections(outputs: dict[str, np.ndarray], image_id: int, size: tuple[int, int]) -> Detections:
    kept = outputs["scores"] > 0
    boxes = outputs["boxes"][kept]
    masks = None
    if "masks" in outputs:
        masks = paste_masks(outputs["masks"][kept], boxes, *size)
    elif "image_masks" in outputs:
        whole = np.tile(np.float32([0, 0, size[1], size[0]]), (len(boxes), 1))
        masks = paste_masks(outputs["image_masks"][kept], whole, *size, least=np.finfo(np.float32).tiny)
    return Detections(image_id, boxes, outputs["scores"][kept], outputs["labels"][kept], masks)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int, least: float = _IN_MASK) -> list[dict]:
    """COCO's RLE dict of each mask at the size of the image.

    Args:
        masks: (M, h, w) float32, the cells of each box.
        boxes: (M, 4) x1 y1 x2 y2.
        least: the lowest value of a pixel in a mask. Outside of the box all pixels are 0.
    """
    pasted = []
    for mask, box in zip(masks, boxes, strict=True):
        whole = np.zeros((height, width), dtype=bool)
        (left, right), (top, bottom) = _pixels(box[0::2], width), _pixels(box[1::2], height)
        if left < right and top < bottom:
            rows = _weights(top, bottom, box[1], box[3], mask.shape[0])
            columns = _weights(left, right, box[0], box[2], mask.shape[1])
            whole[top:bottom, left:right] = rows @ mask @ columns.T >= least
        pasted.append(whole)
    return encode_masks(pasted)


def _pixels(ends: np.ndarray, most: int) -> tuple[int, int]:
    """The first pixel that a box reaches, and the one after its last."""
    return max(int(np.floor(ends[0])) - 1, 0), min(int(np.ceil(ends[1])) + 1, most)


def _weights(first: int, last: int, start: float, end: float, cells: int) -> np.ndarray:
    """(pixels, cells) how much each cell counts for each pixel: linear between the two nearest, 0 outside."""
    at = (np.arange(first, last) + 0.5 - start) / max(end - start, 1e-6) * cells - 0.5
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)


def threads() -> int:
    """How many threads a runtime gets: as many as PyTorch has in this program."""
    return int(os.environ.get("OMP_NUM_THREADS") or available_cores())


def _open_onnx(path: Path) -> tuple[Run, dict[str, str], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    (given,) = (each.name for each in session.get_inputs())
    device = "cuda" if session.get_providers()[0].startswith("CUDA") else "cpu"
    return lambda images: session.run(None, {given: images}), session.get_modelmeta().custom_metadata_map, device


def _open_openvino(path: Path) -> tuple[Run, dict[str, str], str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    strings = {name: str(value.value) for name, value in model.get_rt_info().items() if name.startswith(PREFIX)}
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads()}
    if strings.get(f"{PREFIX}precision") != '"float16"':  # without it, a CPU that can computes in 16 bits
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(model, "CPU", options)
    return lambda images: list(compiled(images).values()), strings, "cpu"


def _open_torch(path: Path) -> tuple[Run, dict[str, str], str]:
    import torch
    import torchvision.ops  # noqa: F401 the file names its operations

    strings = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=strings).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run, json.loads(strings["metadata.json"] or "{}"), "cpu"


# by a file's ending, what gives its outputs, its metadata and the device
ENDINGS = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch}
