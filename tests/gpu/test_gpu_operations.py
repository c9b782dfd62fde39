"""What stands in for Detectron2's compiled part does on a GPU what it does on the CPU."""

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("detectron2.config")


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
