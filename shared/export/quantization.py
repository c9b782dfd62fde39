"""INT8 weights and activations of a detector's convolutions, calibrated on images of the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

IMAGES = 64  # to calibrate on


def quantize(path: Path, images: Iterable[np.ndarray]) -> None:
    """Replaces an ONNX file by one whose convolutions compute in 8 bits, by ONNX Runtime. Resizing, decoding and NMS
    stay in 32 bits.

    Args:
        images: (H, W, 3) uint8 RGB, such as the detector will see. The range of each activation is taken from them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._images: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._images, None)
            return None if image is None else {"images": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}

    quantize_static(
        path,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
