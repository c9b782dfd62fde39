"""What models need of Detectron2's compiled part, in PyTorch and torchvision, for where it was not compiled."""

from __future__ import annotations

import functools
import sys

import torch

from detectron2_files.operations.layers import complete_layers
from detectron2_files.operations.rotated_iou import box_iou_rotated
from detectron2_files.operations.rotated_nms import nms_rotated
from detectron2_files.operations.rotated_roi_align import roi_align_rotated_backward, roi_align_rotated_forward

# by their schemas, which are upstream's (csrc/vision.cpp) with names
_OPERATIONS = {
    "nms_rotated(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor": nms_rotated,
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor": box_iou_rotated,
    "roi_align_rotated_forward(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio) -> Tensor": roi_align_rotated_forward,
    "roi_align_rotated_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int batch_size, int channels, int height, int width, int sampling_ratio) -> Tensor": roi_align_rotated_backward,
}
_library: torch.library.Library | None = None  # keeps the registrations alive


@functools.cache
def install() -> bool:
    """Lets Detectron2's models run, compiled or not. To be called before detectron2.layers is imported.

    Returns:
        Whether the compiled part is in use; else this package is.

    Raises:
        ImportError: the library itself is missing.
    """
    import detectron2

    try:
        import detectron2._C  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "detectron2._C":
            raise
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(
            f"warning: Detectron2's compiled part does not load ({reason}); PyTorch and torchvision do its work",
            file=sys.stderr,
            flush=True,
        )
        # whoever else looks for it finds none, without trying to load it again
        sys.modules["detectron2._C"] = None
    else:
        return True
    _register()
    complete_layers()
    return False


def _register() -> None:
    global _library
    _library = torch.library.Library("detectron2", "FRAGMENT")
    for schema, function in _OPERATIONS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.detectron2, name):
            _library.define(schema)
            _library.impl(name, function, "CompositeExplicitAutograd")
