"""The replacement of Detectron2's compiled part, compared with that part if it is installed, and with definitions."""

import itertools
import json
import math
import sys

import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, reports, run_model_def
from tiny_detectron2 import DETECTRON2, SMALL_YAML, detectron2_config

import detectron2_files
from detectron2_files import operations
from detectron2_files.operations import rotated_iou, rotated_roi_align
from detectron2_files.operations.deform_conv import deform_conv, modulated_deform_conv
from detectron2_files.operations.rotated_iou import box_iou_rotated
from detectron2_files.operations.rotated_nms import nms_rotated
from detectron2_files.operations.rotated_roi_align import roi_align_rotated_backward, roi_align_rotated_forward

against_compiled = pytest.mark.skipif(
    not detectron2_files.COMPILED, reason="needs Detectron2 compiled: make test-compiled"
)
compiled = torch.ops.detectron2
DTYPES = [torch.float32, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
ROTATED = {
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.ANGLES": [[0, 30]],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0, 1.0],
    "MODEL.RPN.HEAD_NAME": "StandardRPNHead",
    "MODEL.ROI_HEADS.NAME": "RROIHeads",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0, 10.0],
    "MODEL.MASK_ON": False,
}


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def boxes_within(extent: float, side: float, count: int, random, dtype=torch.float32) -> torch.Tensor:
    uniform = torch.rand(count, 5, generator=random, dtype=dtype)
    scale = uniform.new_tensor([extent, extent, side, side, 720])
    return uniform * scale + uniform.new_tensor([0, 0, 1, 1, -360])


# --- boxes ------------------------------------------------------------------------------------------


def corners(box):
    x, y, width, height, angle = box
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    halves = [(width / 2, height / 2), (width / 2, -height / 2), (-width / 2, -height / 2), (-width / 2, height / 2)]
    # counter-clockwise as one sees it: to the right and up, where up is smaller
    return [(x + i * cos + j * sin, y - i * sin + j * cos) for i, j in halves]


def area_of(polygon):
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise([*polygon, *polygon[:1]])) / 2


def iou_by_clipping(one, other):
    """The IoU of two boxes, by Sutherland and Hodgman."""
    other = [other[0] - one[0], other[1] - one[1], *other[2:]]
    one = [0, 0, *one[2:]]
    polygon, window = corners(one), corners(other)
    for p, q in itertools.pairwise([*window, *window[:1]]):
        before, polygon = polygon, []
        for a, b in itertools.pairwise([*before, *before[:1]]):
            side_a, side_b = ((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]) for r in (a, b))
            if side_a <= 0:
                polygon.append(a)
            if (side_a <= 0) != (side_b <= 0):
                t = side_a / (side_a - side_b)
                polygon.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
    common = abs(area_of(polygon))
    return common / (one[2] * one[3] + other[2] * other[3] - common)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("extent", "side"), [(100, 200), (800, 200), (10, 3), (0.1, 0.01), (1e6, 1e6)])
def test_iou_equals_that_of_clipped_polygons(dtype, extent, side, random):
    boxes = boxes_within(extent, side, 40, random, dtype)
    expected = [[iou_by_clipping(one, other) for other in boxes.tolist()] for one in boxes.tolist()]
    ious = box_iou_rotated(boxes, boxes)
    assert ious.dtype == dtype
    torch.testing.assert_close(ious.double(), torch.tensor(expected).double(), rtol=0, atol=CLOSE[torch.float32])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ious.double(), expected, rtol=0, atol=CLOSE[dtype])


KNOWN = {
    "itself": ([5, 5, 10, 6, 55], [5, 5, 10, 6, 55], 1),
    "itself turned over": ([5, 5, 10, 6, 55], [5, 5, 10, 6, 235], 1),
    "a side for the other": ([5, 5, 10, 6, 55], [5, 5, 6, 10, -35], 1),
    "across": ([5, 5, 10, 6, 55], [5, 5, 10, 6, -35], 36 / 84),
    "half": ([0.5, 0.5, 1, 1, 0], [0.25, 0.5, 0.5, 1, 0], 0.5),
    "inside": ([50, 50, 40, 40, 20], [52, 49, 4, 4, 70], 0.01),
    "touching": ([0, 0, 10, 10, 0], [10, 0, 10, 10, 0], 0),
    "touching at a corner": ([0, 0, 10, 10, 30], [10 * 3**0.5 / 2 + 5, 10 * 3**0.5 / 2 - 5, 10, 10, 30], 0),
    "apart": ([0, 0, 10, 10, 0], [500, 0, 10, 10, 0], 0),
    "no width": ([5, 5, 0, 6, 3], [5, 5, 10, 6, 3], 0),
    "negative width": ([5, 5, -10, 6, 3], [5, 5, 10, 6, 3], 0),
    "counter-clockwise": ([0, 0, 100, 1, 45], [25, -25, 20, 1, 45], 0.2),  # up to the right
    "far from the origin": ([1e7, 1e7, 16, 8, 0], [1e7 + 8, 1e7, 16, 8, 0], 1 / 3),
    "beyond any picture": ([160, 153, 230, 23, -37], [-1.117407639806935e17, 1.38584204e18, 1000, 1000, 1612], 0),
    "issue 2154": (
        [296.6620178222656, 458.73883056640625, 23.515729904174805, 47.677001953125, 0.08795166015625],
        [296.66201, 458.73882, 23.51573, 47.67702, 0.087951],
        1,
    ),
    "issue 2167": (
        [2563.744628906250, 1436.7901611328125, 2174.703369140625, 214.0950012207031, 115.1183471679687],
        [2563.744628906250, 1436.790283203125, 2174.702880859375, 214.0949554443359, 115.1183547973632],
        1,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_iou_of_known_pairs(name, dtype):
    one, other, expected = KNOWN[name]
    one, other = torch.tensor([one], dtype=dtype), torch.tensor([other], dtype=dtype)
    loose = 1e-5 if name.startswith("issue") else CLOSE[dtype]  # upstream's regression cases: near 1
    assert box_iou_rotated(one, other).item() == pytest.approx(expected, abs=loose)
    assert box_iou_rotated(other, one).item() == pytest.approx(expected, abs=loose)
    if detectron2_files.COMPILED:
        assert compiled.box_iou_rotated(one.float(), other.float()).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_iou_of_no_boxes(shape):
    ious = box_iou_rotated(torch.ones(shape[0], 5), torch.ones(shape[1], 5))
    assert ious.shape == shape
    assert ious.dtype == torch.float32


def test_iou_is_the_same_in_parts(random, monkeypatch):
    boxes = boxes_within(100, 100, 50, random)
    whole = box_iou_rotated(boxes, boxes[:33])
    monkeypatch.setattr(rotated_iou, "_PAIRS", 100)
    monkeypatch.setattr(rotated_iou, "_CLOSE_PAIRS", 7)
    assert torch.equal(box_iou_rotated(boxes, boxes[:33]), whole)


@against_compiled
def test_iou_is_the_compiled_one_s(random):
    for extent, side in ((800, 200), (3000, 50), (20, 20), (1e5, 1e5)):
        ours, theirs = boxes_within(extent, side, 250, random), boxes_within(extent, side, 130, random)
        found = box_iou_rotated(ours, theirs)
        assert (found > 0).any()
        torch.testing.assert_close(found, compiled.box_iou_rotated(ours, theirs), rtol=0, atol=1e-5)


@against_compiled
def test_iou_in_float64_is_the_compiled_one_s(random):
    """Only the compiled suppression takes float64. The threshold at which it starts is the IoU."""
    boxes = boxes_within(30, 30, 12, random, torch.float64)
    for pair in boxes.split(2):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            suppressed = len(compiled.nms_rotated(pair, pair.new_tensor([1, 0]), middle)) == 1
            low, high = (middle, high) if suppressed else (low, middle)
        assert box_iou_rotated(pair[:1], pair[1:]).item() == pytest.approx(low, abs=1e-9)


def greedy(ious, scores, threshold):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(ious[k][i] < threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("pairs", [None, 500])  # compared at once
def test_nms_is_greedy_and_of_equal_scores_the_first_stays(dtype, threshold, pairs, random, monkeypatch):
    boxes = boxes_within(200, 100, 120, random, dtype)
    boxes[60:80] = boxes[:20]
    scores = torch.randint(0, 10, (120,), generator=random).to(dtype)
    expected = greedy(box_iou_rotated(boxes, boxes).tolist(), scores.tolist(), threshold)
    if pairs:
        monkeypatch.setattr(rotated_iou, "_PAIRS", pairs)
    kept = nms_rotated(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_nms_of_no_boxes_is_empty():
    kept = nms_rotated(torch.zeros(0, 5), torch.zeros(0), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@against_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.9])
def test_nms_is_the_compiled_one_s(dtype, threshold, random):
    boxes = boxes_within(400, 150, 400, random, dtype)
    boxes[:40] = boxes[0]
    scores = torch.rand(400, generator=random, dtype=dtype)
    assert torch.equal(nms_rotated(boxes, scores, threshold), compiled.nms_rotated(boxes, scores, threshold))
    # of equal scores, upstream's order is that of a sort which is not stable: of the same boxes any may stay
    scores[:40] = 2
    ours, theirs = nms_rotated(boxes, scores, threshold), compiled.nms_rotated(boxes, scores, threshold)
    assert ours[0] == 0
    assert torch.equal(boxes[ours], boxes[theirs])
    assert torch.equal(scores[ours], scores[theirs])


# --- regions ----------------------------------------------------------------------------------------


def regions(count, images, size, scale, random, dtype):
    """(count, 6) in the image's pixels, some beyond the features, some empty."""
    rois = boxes_within(1.0, 1.0, count, random, dtype)
    height, width = size
    rois[:, :2] = (rois[:, :2] * 1.4 - 0.2) * rois.new_tensor([width, height]) / scale
    rois[:, 2:4] = (rois[:, 2:4] - 1) * max(size) / scale
    rois[:5] = rois.new_tensor(
        [
            [width / 2 / scale, height / 2 / scale, (width + 2) / scale, (height + 2) / scale, 0],  # to the very edge
            [width / scale, 0, 3 / scale, 0, 40],
            [0, 0, 0, 0, 0],
            [-1e4, 5, 4 / scale, 4 / scale, 90],
            [5 / scale, 5 / scale, 4 / scale, 4 / scale, 180],
        ]
    )
    return torch.cat([torch.randint(0, images, (count, 1), generator=random).to(dtype), rois], 1)


@against_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_roi_align_is_the_compiled_one_s_and_its_gradient(dtype, sampling_ratio, scale, random, monkeypatch):
    features = torch.randn(3, 5, 17, 23, generator=random, dtype=dtype)
    rois = regions(40, 3, (17, 23), scale, random, dtype)
    arguments = (rois, scale, 4, 3)
    monkeypatch.setattr(rotated_roi_align, "_SAMPLES", 3000)  # in some parts
    ours = roi_align_rotated_forward(features, *arguments, sampling_ratio)
    theirs = compiled.roi_align_rotated_forward(features, *arguments, sampling_ratio)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE[dtype])
    grad = torch.randn(ours.shape, generator=random, dtype=dtype)
    ours = roi_align_rotated_backward(grad, *arguments, *features.shape, sampling_ratio)
    theirs = compiled.roi_align_rotated_backward(grad, *arguments, *features.shape, sampling_ratio)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_upright_regions_is_torchvision_s(dtype, sampling_ratio, random):
    features = torch.randn(2, 3, 19, 14, generator=random, dtype=dtype)
    rois = regions(30, 2, (19, 14), 0.5, random, dtype)
    rois[:, 5] = 0
    halves = rois[:, 3:5] / 2
    upright = torch.cat([rois[:, :1], rois[:, 1:3] - halves, rois[:, 1:3] + halves], 1)
    expected = torchvision.ops.roi_align(features, upright, (3, 5), 0.5, max(sampling_ratio, 0) or -1, aligned=True)
    ours = roi_align_rotated_forward(features, rois, 0.5, 3, 5, sampling_ratio)
    torch.testing.assert_close(ours, expected, rtol=0, atol=10 * CLOSE[dtype])

    # a region turned by 90 degrees on features turned by as much: (x, y) of an image so wide goes to (y, width - x)
    turned = rois.clone()
    turned[:, 1], turned[:, 2], turned[:, 5] = rois[:, 2], 28 - rois[:, 1], 90
    of_turned = roi_align_rotated_forward(features.rot90(1, (2, 3)), turned, 0.5, 3, 5, sampling_ratio)
    inside = expected.flatten(1).abs().amin(1) > 0  # whole: at the edge, rounding says what is off the features
    assert inside.sum() > 5
    torch.testing.assert_close(of_turned[inside], expected[inside], rtol=0, atol=10 * CLOSE[dtype])


@pytest.mark.parametrize("angle", [30, -75, 200])
def test_roi_align_samples_where_the_region_is(angle):
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    rois = torch.tensor([[0, 26.0, 18.0, 12.0, 8.0, angle]])
    bins = roi_align_rotated_forward(torch.stack([x, y])[None] + 0.5, rois, 1.0, 2, 3, 0)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    for row, column in itertools.product(range(2), range(3)):
        along, across = (column - 1) * 4.0, (row - 0.5) * 4.0
        expected = [26 + along * cos + across * sin, 18 - along * sin + across * cos]
        assert bins[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_the_gradient_of_roi_align_is_its_transpose(sampling_ratio, random):
    features = torch.randn(2, 3, 11, 9, generator=random, dtype=torch.float64)
    rois = regions(20, 2, (11, 9), 0.5, random, torch.float64)
    output = roi_align_rotated_forward(features, rois, 0.5, 3, 2, sampling_ratio)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64)
    back = roi_align_rotated_backward(grad, rois, 0.5, 3, 2, *features.shape, sampling_ratio)
    assert (output * grad).sum().item() == pytest.approx((features * back).sum().item(), rel=1e-12)


def test_roi_align_of_nothing(random):
    features = torch.randn(2, 3, 8, 8, generator=random)
    none = torch.zeros(0, 6)
    assert roi_align_rotated_forward(features, none, 1.0, 2, 2, 0).shape == (0, 3, 2, 2)
    back = roi_align_rotated_backward(torch.zeros(0, 3, 2, 2), none, 1.0, 2, 2, 2, 3, 8, 8, 0)
    assert torch.equal(back, torch.zeros(2, 3, 8, 8))
    assert roi_align_rotated_forward(features[:0], none, 1.0, 2, 2, 2).shape == (0, 3, 2, 2)
    with pytest.raises(ValueError, match="negative width or height"):
        roi_align_rotated_forward(features, torch.tensor([[0, 4.0, 4.0, -1.0, 2.0, 0]]), 1.0, 2, 2, 0)


# --- deformable convolutions ------------------------------------------------------------------------


def convolve_by_definition(input, offset, mask, weight, bias, stride, padding, dilation, deformable_groups):
    """A loop over the taps, each a bilinear sample of the zero-padded input."""
    batch, channels, height, width = input.shape
    out_channels, _, kernel_height, kernel_width = weight.shape
    groups = channels // weight.shape[1]
    out_height, out_width = offset.shape[2:]
    per_group = channels // deformable_groups
    offset = offset.view(batch, deformable_groups, kernel_height * kernel_width, 2, out_height, out_width)
    columns = input.new_zeros(batch, channels, kernel_height * kernel_width, out_height, out_width)
    for n, c, tap, i, j in itertools.product(
        range(batch), range(channels), range(kernel_height * kernel_width), range(out_height), range(out_width)
    ):
        d = c // per_group
        y = i * stride[0] - padding[0] + tap // kernel_width * dilation[0] + offset[n, d, tap, 0, i, j].item()
        x = j * stride[1] - padding[1] + tap % kernel_width * dilation[1] + offset[n, d, tap, 1, i, j].item()
        value = 0.0
        for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * input[n, c, row, column].item()
        if mask is not None:
            value *= mask.view(batch, deformable_groups, -1, out_height, out_width)[n, d, tap, i, j].item()
        columns[n, c, tap, i, j] = value
    of_groups = columns.view(batch, groups, channels // groups, -1, out_height, out_width)
    weights = weight.view(groups, out_channels // groups, channels // groups, -1)
    output = torch.einsum("ngckij,gock->ngoij", of_groups, weights).reshape(batch, -1, out_height, out_width)
    return output if bias is None else output + bias[None, :, None, None]


SHAPES = {  # channels, groups, deformable groups, kernel, stride, padding, dilation
    "plain": (2, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "groups": (4, 2, 2, (3, 3), (2, 2), (1, 1), (1, 1)),
    "deformable groups": (4, 1, 4, (1, 3), (1, 2), (0, 2), (1, 2)),
    "dilated": (4, 4, 2, (2, 2), (1, 1), (2, 2), (3, 3)),
}


def tensors_of(shape, random, dtype=torch.float64, batch=2, size=(5, 6)):
    channels, groups, deformable_groups, kernel, stride, padding, dilation = SHAPES[shape]
    input = torch.randn(batch, channels, *size, generator=random, dtype=dtype)
    weight = torch.randn(4, channels // groups, *kernel, generator=random, dtype=dtype)
    out = torch.nn.functional.conv2d(input, weight, None, stride, padding, dilation, groups).shape[2:]
    taps = deformable_groups * kernel[0] * kernel[1]
    offset = torch.randn(batch, 2 * taps, *out, generator=random, dtype=dtype) * 2
    mask = torch.rand(batch, taps, *out, generator=random, dtype=dtype)
    bias = torch.randn(4, generator=random, dtype=dtype)
    return (input, offset, mask, weight, bias), (stride, padding, dilation), (groups, deformable_groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_deformable_convolutions_are_as_defined(shape, dtype, random):
    (input, offset, mask, weight, bias), how, groups = tensors_of(shape, random, dtype)
    ours = deform_conv(input, offset, weight, *how, *groups, 64)
    expected = convolve_by_definition(input, offset, None, weight, None, *how, groups[1])
    torch.testing.assert_close(ours, expected, rtol=0, atol=CLOSE[dtype])
    ours = modulated_deform_conv(input, offset, mask, weight, bias, *how, *groups)
    expected = convolve_by_definition(input, offset, mask, weight, bias, *how, groups[1])
    torch.testing.assert_close(ours, expected, rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_deformable_convolutions_have_their_gradients(shape, random):
    (input, offset, mask, weight, bias), how, groups = tensors_of(shape, random, batch=1, size=(3, 4))
    tensors = [tensor.requires_grad_() for tensor in (input, offset, mask, weight, bias)]
    assert torch.autograd.gradcheck(lambda i, o, _m, w, _b: deform_conv(i, o, w, *how, *groups), tensors)
    assert torch.autograd.gradcheck(lambda *given: modulated_deform_conv(*given, *how, *groups), tensors)


@against_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_version_is_upstream_s(dtype, random):
    from detectron2.layers.deform_conv import deform_conv as upstream

    (input, offset, _, weight, _), how, groups = tensors_of("plain", random, dtype)
    ours, theirs = (function(input, offset, weight, *how, *groups) for function in (deform_conv, upstream))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE[dtype])


def test_an_empty_batch_gives_every_parameter_a_gradient(random):
    (input, offset, mask, weight, bias), how, groups = tensors_of("groups", random)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    output = modulated_deform_conv(input[:0], offset[:0], mask[:0], *parameters, *how, *groups)
    assert output.shape == (0, 4, *offset.shape[2:])
    output.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)
    with pytest.raises(ValueError, match="convolution input is too small"):
        deform_conv(input[:, :, :1, :1], offset, weight, 1, 0, 1)
    with pytest.raises(ValueError, match="Expected 4D tensor"):
        deform_conv(input[0], offset, weight)


# --- without the compiled part ----------------------------------------------------------------------

STEPS = f"""
import json, sys
import detectron2.modeling  # before the stand-in
sys.path[:0] = [{str(DETECTRON2)!r}]
import detectron2_files
import torch
from detectron2 import model_zoo
from detectron2.evaluation import coco_evaluation
from detectron2.layers import deform_conv
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage

def built(**overrides):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    items = {{**json.loads(sys.argv[1]), "MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", **overrides}}
    cfg.merge_from_list([part for item in items.items() for part in item])
    torch.manual_seed(0)
    return build_model(cfg)

def stepped(model, boxes):
    instances = Instances((128, 128), gt_boxes=boxes, gt_classes=torch.tensor([1, 2]))
    inputs = [{{"image": torch.rand(3, 128, 128) * 255, "height": 128, "width": 128, "instances": instances}}]
    with EventStorage(0):
        loss = sum(model(inputs).values())
    loss.backward()
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    return loss.item(), len(found)

result = {{"compiled": detectron2_files.COMPILED, "fast": coco_evaluation.COCOeval_opt.__name__}}
boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [50, 60, 120, 120]]))
for modulated in (False, True):
    model = built(**{{
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True], "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": 2,
    }})
    losses = stepped(model, boxes)
    convolutions = [m for m in model.modules() if "DeformConv" in type(m).__name__]
    gradients = [m.weight.grad.abs().sum().item() for m in convolutions]
    kinds = {{type(m).__name__ for m in convolutions}}
    result[f"modulated {{modulated}}"] = [*losses, *kinds, len(gradients), min(gradients)]
rotated = RotatedBoxes(torch.tensor([[35.0, 40, 50, 60, 20], [85, 90, 70, 60, -40]]))
result["rotated"] = stepped(built(**json.loads(sys.argv[2])), rotated)
try:
    deform_conv._C.deform_conv_forward(1)
except NotImplementedError as error:
    result["missing"] = str(error)
try:
    from detectron2 import _C
except ImportError:
    result["none there"] = True
print(json.dumps(result))
"""


@pytest.fixture
def without_compiled(tmp_path):
    """Environment variables under which importing `detectron2._C` fails with `error`."""

    def environment(error):
        (tmp_path / "sitecustomize.py").write_text(
            f"""
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "detectron2._C":
            raise {error}

sys.meta_path.insert(0, Finder())
"""
        )
        return {"PYTHONPATH": str(tmp_path)}

    return environment


def test_deformable_and_rotated_models_work_without_compiled_operations(without_compiled):
    environment = without_compiled("ModuleNotFoundError(name, name=name)")
    arguments = (json.dumps({**SMALL_YAML, "MODEL.ROI_HEADS.NUM_CLASSES": 3}), json.dumps(ROTATED))
    done = run_model_def("-c", STEPS, *arguments, cwd=ROOT, env=environment, script="-u")
    result = json.loads(done.stdout.splitlines()[-1])
    assert "warning: Detectron2" not in done.stderr
    assert result["compiled"] is False
    assert result["fast"] == "COCOeval"
    for modulated, kind in ((False, "DeformConv"), (True, "ModulatedDeformConv")):
        loss, _, name, layers, smallest_gradient = result[f"modulated {modulated}"]
        assert 0 < loss < 100
        assert (name, layers) == (kind, 13)
        assert smallest_gradient > 0
    loss, found = result["rotated"]
    assert 0 < loss < 100
    assert found > 0
    assert result["missing"] == ("detectron2._C.deform_conv_forward is not there: only the compiled Detectron2 has it")
    assert result["none there"]


@pytest.mark.slow
def test_a_compiled_part_that_fails_to_load_is_a_warning(shapes, tmp_path, without_compiled):
    environment = without_compiled("ImportError('_C.so: undefined symbol: _ZN5torch')")
    changes = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]}
    config = detectron2_config(shapes, "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", **changes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = {"batches": 2}
    path, run = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config))
    done = run_model_def("train", path, "--output-dir", run, cwd=DETECTRON2, env=environment)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: Detectron2")]
    assert len(warnings) == 1
    assert "undefined symbol: _ZN5torch" in warnings[0]
    (row,) = [line for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith("operations")]
    assert row.endswith("PyTorch and torchvision")
    assert reports(run, "val")


class Broken:
    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "detectron2._C":
            raise self.error


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("libcudart.so: cannot open\nmore")])
def test_any_exception_of_a_broken_part_becomes_one_line(error, monkeypatch, capsys):
    import detectron2

    called = []
    monkeypatch.setattr(operations, "_register", lambda: called.append("register"))
    monkeypatch.setattr(operations, "complete_layers", lambda: called.append("layers"))
    monkeypatch.setitem(sys.modules, "detectron2._C", None)  # what was there comes back
    del sys.modules["detectron2._C"]
    monkeypatch.delattr(detectron2, "_C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    assert operations.install.__wrapped__() is False
    assert called == ["register", "layers"]
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(error).splitlines()[0] in line
