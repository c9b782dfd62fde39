"""Writes a detector to a file: ONNX, OpenVINO's IR or PyTorch's ExportedProgram."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.environment import torch_release
from shared.errors import UserError
from shared.export.metadata import FORMATS, Metadata
from shared.export.operations import Exportable, Raw, onnx_translations, operations_of_onnx

_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}
_OPSET = 18
_EXAMPLE = (480, 640)  # of the images that a detector is traced with: height, width


def check_format(name: str, precision: str, raw: bool) -> None:
    """Raises UserError if a format has no files of that precision, or no raw files, or if this environment cannot write
    it."""
    if precision == "float16" and name != "openvino":
        raise UserError(f"--half: {name} has no 16-bit files here. Fix: --format openvino")
    if raw and name != "onnx":
        raise UserError(f"--raw: {name} has no raw files here. Fix: --format onnx")
    if precision == "int8" and name not in ("onnx", "openvino"):
        raise UserError(f"--int8: {name} has no 8-bit files here. Fix: --format onnx or openvino")
    if name not in FORMATS:
        return
    if torch_release() < (2, 6):
        raise UserError(
            f"export: it needs torch 2.6, and this is {torch.__version__}. Fix: use a newer environment to export"
        )
    packages = {f"--format {name}": _PACKAGES[name], "--int8": ("onnxruntime",) if precision == "int8" else ()}
    for option, needed in packages.items():
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            raise UserError(
                f"{option}: the package {missing[0]} is missing. Fix: pip install '.[export]', in the project's folder"
            )


def check_detector(detector: Exportable, name: str) -> None:
    """Raises UserError if the format cannot hold the detector."""
    if name == "torch" and detector.input_size is None:
        raise UserError(
            "--format torch: the network's size follows from the image's, and torch.export cannot trace that. Fix: "
            "choose onnx, or resize all images to one height and width"
        )


def write(
    detector: Exportable, name: str, folder: Path, metadata: Metadata, calibration: Iterable[np.ndarray] = ()
) -> Path:
    """Writes the file of a format, and returns its path.

    Args:
        detector: on the CPU, in evaluation mode.
        metadata: also says in which precision the network computes, see `check_format`.
        calibration: images for INT8, see `quantize`.

    Raises:
        UserError: PyTorch cannot trace or translate the detector.
    """
    path = folder / FORMATS[name]
    with _quiet(), torch.no_grad():
        try:
            if name == "torch":
                _write_torch(detector, path, metadata)
            else:
                onnx = path.with_suffix(".onnx")
                with operations_of_onnx(resizes=name == "onnx"):
                    _write_onnx(detector, onnx, metadata)
                if metadata.precision == "int8":
                    quantize(onnx, iter(calibration))
                if name == "openvino":
                    _write_openvino(onnx, path, metadata)
                    onnx.unlink()
        except UserError:
            raise
        except Exception as error:  # tracing fails in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--format {name}: PyTorch cannot export this detector ({reason}). Fix: choose another format; "
                "docs/export.md lists what works"
            ) from error
    return path


def _example(detector: Exportable) -> tuple[torch.Tensor, dict]:
    """Images to trace with, and which of their dimensions vary."""
    size, varying = (detector.input_size, [0]) if isinstance(detector, Raw) else (_EXAMPLE, [0, 2, 3])
    return torch.zeros(2, 3, *size, dtype=torch.uint8), dict.fromkeys(varying, torch.export.Dim.DYNAMIC)


def _write_torch(detector: Exportable, path: Path, metadata: Metadata) -> None:
    images, dynamic = _example(detector)
    given = {"args": (images,), "dynamic_shapes": (dynamic,)}
    try:
        program = torch.export.export(detector, **given, strict=False)
    except Exception:  # as torch.onnx does: only a strict trace keeps the batch variable where a model calls `len`
        program = torch.export.export(detector, **given, strict=True)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata.strings())})


def _write_onnx(detector: Exportable, path: Path, metadata: Metadata) -> None:
    import onnx

    images, dynamic = _example(detector)
    if detector.input_size is not None:
        model = _to_onnx(detector, (images,), (dynamic,), ["images"], list(detector.outputs))
    else:
        # the network's size follows from the image's by a rule that the tracer cannot simplify: as inputs of its own,
        # height and width can be anything
        first = _to_onnx(_Prepare(detector), (images,), (dynamic,), ["images"], ["pixels", "sizes"])
        given = _Prepare(detector)(images)
        second = _to_onnx(_Detect(detector), given, (dynamic, None), ["pixels", "sizes"], list(detector.outputs))
        model = _joined(first, second)
    versions = {each.domain: each.version for each in model.opset_import}  # a translated operation adds one again
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(*each) for each in versions.items())
    onnx.helper.set_model_props(model, metadata.strings())
    onnx.save(model, path)


class _Prepare(torch.nn.Module):
    """From images to the network's input, and sizes."""

    def __init__(self, detector: Exportable):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.detector.prepare(images)


class _Detect(_Prepare):
    """From the network's input to detections."""

    def forward(self, pixels: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.detector.detect(pixels, sizes)


def _to_onnx(module: torch.nn.Module, given: tuple, dynamic: tuple, inputs: list[str], outputs: list[str]) -> Any:
    program = torch.onnx.export(
        module,
        given,
        dynamic_shapes=dynamic,
        input_names=inputs,
        output_names=outputs,
        custom_translation_table=onnx_translations(),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    return program.model_proto


def _joined(first: Any, second: Any) -> Any:
    """One ONNX model, in which the second takes what the first returns."""
    from onnx import compose

    second = compose.add_prefix(second, "network_", rename_inputs=False, rename_outputs=False)
    names = [value.name for value in second.graph.input]
    first.ir_version = second.ir_version
    return compose.merge_models(first, second, io_map=[(name, name) for name in names])


def _write_openvino(onnx: Path, path: Path, metadata: Metadata) -> None:
    import openvino

    model = openvino.convert_model(onnx)
    for name, value in metadata.strings().items():
        model.set_rt_info(value, name)
    openvino.save_model(model, path, compress_to_fp16=metadata.precision == "float16")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own parts."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- INT8 -------------------------------------------------------------------------------------------


CALIBRATION_IMAGES = 64


def quantize(path: Path, images: Iterator[np.ndarray]) -> None:
    """Replaces an ONNX file by one whose convolutions compute in 8 bits, by ONNX Runtime. Resizing, decoding and NMS
    stay in 32 bits.

    Args:
        images: (H, W, 3) uint8 RGB, such as the detector will see. The range of each activation is taken from them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
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
