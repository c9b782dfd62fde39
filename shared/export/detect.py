"""Detects with an exported file: python3 detect.py MODEL IMAGE …   Needs NumPy, Pillow and the file's runtime."""

import json
import sys

import numpy as np
from PIL import Image, ImageOps


def load(path):
    """A function from (B, 3, H, W) uint8 RGB images to [boxes, scores, labels, …], and the file's metadata."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        return lambda images: session.run(None, {"images": images}), session.get_modelmeta().custom_metadata_map
    if path.endswith(".xml"):
        import openvino

        model = openvino.Core().read_model(path)
        metadata = {k: v.value for k, v in model.rt_info.items() if k.startswith("detector.")}
        options = {} if "16" in metadata["detector.precision"] else {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(model, "CPU", options)
        return lambda images: list(compiled(images).values()), metadata
    import torch
    import torchvision.ops  # noqa: F401

    module = torch.export.load(path, extra_files=(files := {"metadata.json": ""})).module()
    metadata = json.loads(files["metadata.json"])
    return lambda images: [output.numpy() for output in module(torch.from_numpy(images))], metadata


if __name__ == "__main__":
    run, metadata = load(sys.argv[1])
    categories, threshold = (json.loads(metadata[f"detector.{name}"]) for name in ("categories", "best_threshold"))
    for path in sys.argv[2:]:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        boxes, scores, labels, *_ = (output[0] for output in run(np.asarray(image).transpose(2, 0, 1)[None].copy()))
        for i in np.flatnonzero(scores >= (threshold or 0.3)):
            print(path, categories[labels[i]]["name"], f"{scores[i]:.3f}", *boxes[i].round(1))
