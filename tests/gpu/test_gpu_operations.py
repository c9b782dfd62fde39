"""The replacements of compiled operations give the same on a GPU as on the CPU."""

import pytest
import torch
from conftest import WITHOUT_LIBRARY
from tiny_mmdetection import use_operations_in_pytorch

from shared.evaluation.detections import encode_masks, encode_on_device

pytestmark = pytest.mark.gpu


@pytest.mark.skipif("mmdetection" in WITHOUT_LIBRARY, reason=WITHOUT_LIBRARY.get("mmdetection", ""))
def test_operations_of_mmcv_are_the_same_on_a_gpu(monkeypatch):
    """And the same as those of mmcv-full, where it is compiled with CUDA."""
    from mmcv import ops

    from mmdetection_files import operations

    torch.manual_seed(0)
    corner = torch.rand(200, 2) * 60
    boxes = torch.cat([corner, corner + torch.rand(200, 2) * 30 + 1], 1)
    scores, few = torch.rand(200), torch.cat([torch.arange(12)[:, None] % 2, boxes[:12]], 1)
    features = torch.rand(2, 8, 24, 25)
    offset, mask, weight = torch.randn(2, 36, 24, 25), torch.rand(2, 18, 24, 25), torch.randn(4, 4, 3, 3)
    target = torch.arange(200) % 9
    calls = {
        "nms": lambda b, s: ops.nms(b, s, 0.5)[1],
        "roi_align": lambda x: ops.roi_align(x, few.to(x), (3, 2), 0.25, 0, "avg", True),
        "roi_align, maximum": lambda x: ops.roi_align(x, few.to(x), (3, 2), 0.25, 2, "max", True),
        "roi_pool": lambda x: ops.roi_pool(x, few.to(x), (3, 2), 0.25),
        "deform_roi_pool": lambda x, o: ops.deform_roi_pool(x, few.to(x), o, (3, 2), 0.25, 2, 0.1),
        "deform_conv2d": lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1, 1, 2, 2),
        "modulated_deform_conv2d": lambda x, o, m, w: ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1, 1, 2, 2),
        "carafe": lambda x, m: ops.carafe(x, m, 3, 2, 2),
        "sigmoid_focal_loss": lambda x: ops.sigmoid_focal_loss(x, target.to(x.device), 2.0, 0.25, None, "none"),
        "softmax_focal_loss": lambda x: ops.softmax_focal_loss(x, target.to(x.device) % 8, 2.0, 0.25, None, "sum"),
    }
    given = {
        "nms": (boxes, scores),
        "deform_roi_pool": (features, torch.rand(12, 2, 3, 2)),
        "deform_conv2d": (features, offset, weight),
        "modulated_deform_conv2d": (features, offset, mask, weight),
        "carafe": (features, torch.rand(2, 18, 48, 50)),
        "sigmoid_focal_loss": (torch.randn(200, 8),),
        "softmax_focal_loss": (torch.randn(200, 8),),
    }

    def run(name, device):
        arguments = [value.to(device, copy=True).requires_grad_() for value in given.get(name, (features,))]
        output = calls[name](*arguments)
        if not output.requires_grad:
            return [output.cpu()]
        torch.manual_seed(1)
        output.backward(torch.rand(output.shape).to(device))
        return [output.detach().cpu(), *(value.grad.cpu() for value in arguments)]

    compiled = {name: run(name, "cuda") for name in calls} if operations.are_compiled() else {}
    use_operations_in_pytorch(monkeypatch)
    for name in calls:
        found = run(name, "cuda")
        for expected in (run(name, "cpu"), *([compiled[name]] if name in compiled else [])):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.skipif("detectron2" in WITHOUT_LIBRARY, reason=WITHOUT_LIBRARY.get("detectron2", ""))
def test_operations_of_detectron2_are_the_same_on_a_gpu():
    from detectron2_files.operations.deform_conv import deform_conv, modulated_deform_conv
    from detectron2_files.operations.rotated_iou import box_iou_rotated
    from detectron2_files.operations.rotated_nms import nms_rotated
    from detectron2_files.operations.rotated_roi_align import roi_align_rotated_backward, roi_align_rotated_forward

    torch.manual_seed(0)
    boxes = torch.rand(3000, 5, dtype=torch.float64) * torch.tensor([400, 400, 90, 90, 360])
    scores = torch.rand(3000, dtype=torch.float64)
    rois = torch.cat([torch.randint(0, 2, (60, 1)), boxes[:60]], 1)
    features = torch.randn(2, 8, 100, 100, dtype=torch.float64)
    grad = torch.randn(60, 8, 3, 4, dtype=torch.float64)
    offset, mask = torch.randn(2, 36, 100, 100, dtype=torch.float64), torch.rand(2, 18, 100, 100, dtype=torch.float64)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    calls = {
        "iou": (box_iou_rotated, boxes, boxes[:200]),
        "nms": (nms_rotated, boxes, scores, 0.5),
        "roi align": (roi_align_rotated_forward, features, rois, 0.25, 3, 4, 0),
        "roi align, sampled": (roi_align_rotated_forward, features, rois, 0.25, 3, 4, 2),
        "its gradient": (roi_align_rotated_backward, grad, rois, 0.25, 3, 4, *features.shape, 0),
        "version 1": (deform_conv, features, offset, weight, 1, 1, 1, 2, 2),
        "version 2": (modulated_deform_conv, features, offset, mask, weight, None, 1, 1, 1, 2, 2),
        "nothing": (nms_rotated, boxes[:0], scores[:0], 0.5),
        "no regions": (roi_align_rotated_forward, features, rois[:0], 0.25, 3, 4, 0),
    }
    for name, (function, *given) in calls.items():
        on_gpu = [value.cuda() if isinstance(value, torch.Tensor) else value for value in given]
        found = function(*on_gpu)
        assert found.is_cuda, name
        torch.testing.assert_close(found.cpu(), function(*given), rtol=0, atol=1e-9, msg=name)


def test_masks_have_the_bytes_of_the_cpu():
    masks = torch.nn.functional.interpolate(torch.rand(20, 1, 7, 9), size=(120, 160), mode="bilinear")[:, 0] > 0.6
    assert encode_on_device(masks.cuda()) == encode_masks(masks.numpy())
