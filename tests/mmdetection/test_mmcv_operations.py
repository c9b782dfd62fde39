"""mmcv's operations without its compiled module, compared with mmcv-full if it is compiled, else with definitions."""

import importlib
import subprocess
import sys

import mmcv.ops
import mmcv.runner
import numpy as np
import pytest
import torch
import torchvision
from tiny_mmdetection import MMDETECTION, use_operations_in_pytorch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmdetection_files import operations

COMPILED = operations.are_compiled()
compiled = pytest.mark.skipif(not COMPILED, reason="needs mmcv-full: make test-compiled")
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-9}
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def in_pytorch(monkeypatch):
    """mmcv.ops over the operations in PyTorch, even if mmcv-full is installed."""
    use_operations_in_pytorch(monkeypatch)


@pytest.fixture
def against_compiled(monkeypatch):
    """Asserts that both give the same values and the same derivatives by floating arguments."""

    def compare(function, *arguments, tolerance=1e-5):
        results = [_with_derivatives(function, arguments)]
        with monkeypatch.context() as patch:
            use_operations_in_pytorch(patch)
            results.append(_with_derivatives(function, arguments))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    return compare


def _with_derivatives(function, arguments):
    arguments = [
        given.clone().requires_grad_() if isinstance(given, torch.Tensor) and given.is_floating_point() else given
        for given in arguments
    ]
    outputs = function(*arguments)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    found = list(outputs)
    if outputs and outputs[0].requires_grad:
        torch.manual_seed(5)
        (outputs[0] * torch.rand_like(outputs[0])).sum().backward()
        # regions and boxes have no derivative in either
        found += [given.grad for given in arguments if isinstance(given, torch.Tensor) and given.grad is not None]
    return found


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: values that are read, and shapes that depend on values."""

    WAITS = ("tolist", "item", "nonzero", "unique", "cpu", "__bool__", "__int__", "__float__", "__index__")

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_function__(self, function, types, arguments=(), named=None):
        name = function.__name__
        index = arguments[1] if name == "__getitem__" else ()
        by_list = any(isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,)))
        if name in self.WAITS or by_list:
            self.found.append(name)
        return function(*arguments, **(named or {}))


def boxes_and_scores(count, seed=0, grid=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 60 - 10
    size = torch.rand(count, 2, generator=generator, dtype=dtype) * 30 + 1
    boxes = torch.cat([corner, corner + size], 1)
    scores = torch.rand(count, generator=generator, dtype=dtype)
    # whole pixels and tenths: overlaps and scores that are equal
    return (boxes.round(), (scores * 10).round() / 10) if grid else (boxes, scores)


def regions(count=7, images=2, dtype=torch.float32, seed=1):
    """Regions inside, partly outside and wholly outside the image, empty, and as large as the image."""
    boxes, _ = boxes_and_scores(count, seed, dtype=dtype)
    boxes = torch.cat([boxes, torch.tensor([[90.0, 90, 120, 130], [5, 5, 5, 5], [0, 0, 60, 44], [-1, -2, 3, 4]])])
    index = torch.arange(len(boxes)) % images
    return torch.cat([index[:, None], boxes], 1).to(dtype)


def features(dtype=torch.float32, channels=3, images=2, height=11, width=15):
    return torch.rand(images, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(3)) - 0.3


# Suppression


@compiled
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7])
def test_nms_keeps_what_mmcv_full_keeps(against_compiled, offset, grid, threshold):
    for count in (0, 1, 200):
        boxes, scores = boxes_and_scores(count, grid=grid)
        if grid:  # which of two equal scores is first is not said
            scores = scores + torch.arange(count) * 1e-4
        against_compiled(lambda b, s: mmcv.ops.nms(b.detach(), s.detach(), threshold, offset=offset), boxes, scores)


@compiled
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms_gives_the_scores_of_mmcv_full(against_compiled, method, grid, offset):
    for count, min_score in ((1, 0.001), (2, 0.9), (120, 0.001), (120, 0.05), (120, 0.4)):
        boxes, scores = boxes_and_scores(count, seed=count, grid=grid)
        against_compiled(
            lambda b, s, lowest: mmcv.ops.soft_nms(
                b.detach(), s.detach(), 0.3, sigma=0.5, min_score=lowest, method=method, offset=offset
            ),
            boxes,
            scores,
            min_score,
        )


@compiled
@pytest.mark.parametrize("grid", [False, True])
def test_nms_match_groups_as_mmcv_full(grid):
    boxes, scores = boxes_and_scores(150, grid=grid)
    dets = torch.cat([boxes, (scores + torch.arange(150) * 1e-4)[:, None]], 1)
    assert operations.suppression.nms_match(dets, 0.5) == importlib.import_module("mmcv._ext").nms_match(dets, 0.5)


def test_nms_keeps_a_box_whose_overlap_is_the_threshold(in_pytorch):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])  # 0.6, which as a float32 is more than 0.6
    kept = mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.6)[1]
    assert kept.tolist() == [0, 1]


def test_nms_of_nothing_is_nothing(in_pytorch):
    dets, kept = mmcv.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.dtype == torch.int64
    dets, kept = mmcv.ops.soft_nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert len(kept) == 0


def test_soft_nms_lowers_the_score_of_a_neighbour_only(in_pytorch):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]])
    dets, kept = mmcv.ops.soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3, method="linear")
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.7, 0.8 * 0.2]))


def test_soft_nms_of_boxes_without_an_area_gives_numbers(in_pytorch):
    dets, _ = mmcv.ops.soft_nms(torch.ones(3, 4), torch.tensor([0.9, 0.8, 0.7]), 0.3, method="gaussian")
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8, 0.7]))  # nan in mmcv-full


# Regions


@compiled
@both_dtypes
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_equals_mmcv_full_s(against_compiled, dtype, aligned, sampling, mode):
    for rois in (regions(dtype=dtype), regions(dtype=dtype)[:0]):
        against_compiled(
            lambda image, chosen: mmcv.ops.roi_align(image, chosen.detach(), (3, 2), 0.25, sampling, mode, aligned),
            features(dtype),
            rois,
            tolerance=DTYPES[dtype],
        )


def test_roi_align_has_the_derivative_of_its_values(in_pytorch):
    image = features(torch.float64).requires_grad_()
    for mode in ("avg", "max"):
        rois = regions(3, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda given, mode=mode, rois=rois: mmcv.ops.roi_align(given, rois, (2, 3), 0.25, 0, mode, True),
            image,
            fast_mode=True,  # along one direction of all inputs: their number is what takes long
        )


@both_dtypes
def test_roi_pool_is_the_maximum_of_each_bin(in_pytorch, dtype):
    image, rois, scale = features(dtype), regions(dtype=dtype), 0.25
    pooled = mmcv.ops.roi_pool(image, rois, (3, 2), scale)
    for region, found in zip(rois, pooled, strict=True):
        index, x1, y1, x2, y2 = region.tolist()
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for row in range(3):
            for column in range(2):
                top, bottom = (np.clip(y1 + (y2 - y1) / 3 * at, -1e3, 1e3) for at in (row, row + 1))
                left, right = (x1 + (x2 - x1) / 2 * at for at in (column, column + 1))
                rows = slice(*np.clip([np.floor(top), np.ceil(bottom)], 0, 11).astype(int))
                columns = slice(*np.clip([np.floor(left), np.ceil(right)], 0, 15).astype(int))
                bin_of = image[int(index), :, rows, columns].flatten(1)
                expected = bin_of.max(1)[0] if bin_of.numel() else torch.zeros(3, dtype=dtype)
                torch.testing.assert_close(found[:, row, column], expected)


def test_roi_pool_has_the_derivative_of_its_values(in_pytorch):
    image = features(torch.float64).requires_grad_()
    rois = regions(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: mmcv.ops.roi_pool(given, rois, (2, 3), 0.25), image)
    assert mmcv.ops.roi_pool(image, rois[:0], 2, 0.25).shape == (0, 3, 2, 2)


@both_dtypes
@pytest.mark.parametrize("sampling", [0, 2])
def test_deformable_pooling_without_offsets_is_roi_align(in_pytorch, dtype, sampling):
    image, rois = features(dtype), regions(dtype=dtype)
    pooled = mmcv.ops.deform_roi_pool(image, rois, None, (3, 2), 0.25, sampling)
    expected = torchvision.ops.roi_align(image, rois, (3, 2), 0.25, sampling or -1, aligned=True)
    torch.testing.assert_close(pooled, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_deformable_pooling_moves_each_bin_by_its_offset(in_pytorch):
    image = features(torch.float64)
    rois = torch.tensor([[0.0, 12, 8, 32, 24]], dtype=torch.float64)
    right = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    right[:, 0] = 0.5
    moved = mmcv.ops.deform_roi_pool(image, rois, right, (2, 2), 0.25, 2, 0.4)
    rois[:, [1, 3]] += 0.5 * 0.4 * 20
    torch.testing.assert_close(moved, mmcv.ops.deform_roi_pool(image, rois, None, (2, 2), 0.25, 2))


def test_deformable_pooling_has_the_derivatives_of_its_values(in_pytorch):
    image = features(torch.float64).requires_grad_()
    # inside, for mmcv's derivative by an offset does not see the edge
    rois = torch.tensor([[0.0, 12.3, 8.1, 32.7, 24.9], [1, 9.2, 7.7, 40.1, 30.3]], dtype=torch.float64)
    offset = (torch.rand(2, 2, 2, 3, dtype=torch.float64) * 0.3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given, moved: mmcv.ops.deform_roi_pool(given, rois, moved, (2, 3), 0.25, 2, 0.1), (image, offset)
    )


def test_pooling_reads_the_device_as_often_for_many_regions_as_for_one(in_pytorch):
    image = features()
    for sampling, most in ((0, 2), (2, 0)):
        counts = []
        for rois in (regions()[:1], regions(60)):
            with HostReads() as reads:
                mmcv.ops.roi_align(image, rois, (3, 2), 0.25, sampling, "max", True)
                mmcv.ops.deform_roi_pool(image, rois, None, (3, 2), 0.25, sampling)
            counts.append(len(reads.found))
        assert counts == [2 * most, 2 * most]


# Convolutions


CONVOLUTIONS = {
    "plain": dict(stride=1, padding=1, dilation=1, groups=1, deform_groups=1),
    "strided, dilated": dict(stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=1, deform_groups=1),
    "groups": dict(stride=1, padding=1, dilation=1, groups=2, deform_groups=4),
}


def convolution(dtype, settings, modulated, kernel=(3, 2)):
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(2, 8, 9, 7, dtype=dtype, generator=generator)
    weight = torch.rand(6, 8 // settings["groups"], *kernel, dtype=dtype, generator=generator) - 0.5
    (sh, sw), (ph, pw), (dh, dw) = (nn.modules.utils._pair(settings[key]) for key in ("stride", "padding", "dilation"))
    out = ((9 + 2 * ph - dh * (kernel[0] - 1) - 1) // sh + 1, (7 + 2 * pw - dw * (kernel[1] - 1) - 1) // sw + 1)
    places = settings["deform_groups"] * kernel[0] * kernel[1]
    offset = (torch.rand(2, 2 * places, *out, dtype=dtype, generator=generator) - 0.5) * 6
    mask = torch.rand(2, places, *out, dtype=dtype, generator=generator)
    return (image, offset, mask, weight) if modulated else (image, offset, weight)


@compiled
@both_dtypes
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_deformable_convolution_equals_mmcv_full_s(against_compiled, dtype, settings):
    against_compiled(
        lambda *given: mmcv.ops.deform_conv2d(*given, *settings.values()),
        *convolution(dtype, settings, modulated=False),
        tolerance=DTYPES[dtype],
    )


@compiled
@both_dtypes
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deformable_convolution_equals_mmcv_full_s(against_compiled, dtype, settings, with_bias):
    bias = torch.rand(6, dtype=dtype) if with_bias else None
    against_compiled(
        lambda *given: mmcv.ops.modulated_deform_conv2d(*given, *settings.values()),
        *convolution(dtype, settings, modulated=True),
        bias,
        tolerance=DTYPES[dtype],
    )


@compiled
def test_offsets_of_another_size_are_read_as_mmcv_full_reads_them(against_compiled):
    """DyHead gives offsets of a level of twice the size."""
    image, offset, mask, weight = convolution(torch.float64, CONVOLUTIONS["plain"], modulated=True)
    settings = {**CONVOLUTIONS["plain"], "stride": 2}
    against_compiled(
        lambda *given: mmcv.ops.modulated_deform_conv2d(*given, None, *settings.values()),
        *(image, offset, mask, weight),
        tolerance=1e-9,
    )


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_deformable_convolution_has_the_derivatives_of_its_values(in_pytorch, modulated, settings):
    given = [
        each[:1, :, :5, :5] if each.dim() == 4 else each for each in convolution(torch.float64, settings, modulated)
    ]
    image, weight = given[0], convolution(torch.float64, settings, modulated)[-1]
    out = F.conv2d(image, weight, None, *list(settings.values())[:4]).shape[2:]
    rest = [each[..., : out[0], : out[1]] for each in convolution(torch.float64, settings, modulated)[1:-1]]
    rest = [each[:1] for each in rest]
    function = mmcv.ops.modulated_deform_conv2d if modulated else mmcv.ops.deform_conv2d
    arguments = [each.clone().requires_grad_() for each in (image, *rest, weight)]
    bias = (None,) if modulated else ()
    assert torch.autograd.gradcheck(
        lambda *moved: function(*moved, *bias, *settings.values()), arguments, fast_mode=True
    )


def test_deformable_convolution_without_offsets_is_a_convolution(in_pytorch):
    image, offset, mask, weight = convolution(torch.float64, CONVOLUTIONS["groups"], modulated=True, kernel=(3, 3))
    expected = F.conv2d(image, weight, None, 1, 1, 1, 2)
    settings = CONVOLUTIONS["groups"].values()
    torch.testing.assert_close(mmcv.ops.deform_conv2d(image, offset * 0, weight, *settings), expected)
    found = mmcv.ops.modulated_deform_conv2d(image, offset * 0, mask * 0 + 0.5, weight, None, *settings)
    torch.testing.assert_close(found, expected / 2)


def test_a_frozen_image_leaves_the_weight_its_derivative(in_pytorch):
    image, offset, weight = convolution(torch.float64, CONVOLUTIONS["plain"], modulated=False)
    weight.requires_grad_()
    mmcv.ops.deform_conv2d(image, offset, weight, *CONVOLUTIONS["plain"].values()).sum().backward()
    alone = weight.grad.clone()
    weight.grad = None
    image.requires_grad_()
    mmcv.ops.deform_conv2d(image, offset, weight, *CONVOLUTIONS["plain"].values()).sum().backward()
    torch.testing.assert_close(weight.grad, alone)


def test_masked_convolution_is_the_convolution_where_the_mask_is(in_pytorch):
    torch.manual_seed(0)
    layer = mmcv.ops.MaskedConv2d(4, 6, 3, padding=1)
    image = torch.rand(1, 4, 7, 9)
    mask = (torch.rand(1, 7, 9) > 0.6).float()
    with torch.no_grad():
        expected = F.conv2d(image, layer.weight, layer.bias, padding=1) * mask
        torch.testing.assert_close(layer(image, mask), expected, rtol=1e-5, atol=1e-5)
        assert layer(image, mask * 0).abs().sum() == 0


@both_dtypes
@pytest.mark.parametrize("op", ["carafe", "carafe_naive"])
@pytest.mark.parametrize("groups", [1, 2])
def test_carafe_adds_up_the_neighbours_by_the_mask(in_pytorch, dtype, op, groups):
    torch.manual_seed(0)
    kernel, scale = 3, 2
    image = torch.rand(2, 4, 5, 6, dtype=dtype)
    mask = torch.rand(2, groups * kernel**2, 10, 12, dtype=dtype)
    found = getattr(mmcv.ops, op)(image, mask, kernel, groups, scale)
    around = F.unfold(image, kernel, padding=1).view(2, 4 * kernel**2, 5, 6)
    around = F.interpolate(around, scale_factor=scale, mode="nearest").view(2, groups, -1, kernel**2, 10, 12)
    expected = (around * mask.view(2, groups, 1, kernel**2, 10, 12)).sum(3).view(2, 4, 10, 12)
    torch.testing.assert_close(found, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_carafe_has_the_derivatives_of_its_values(in_pytorch):
    image = torch.rand(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 18, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: mmcv.ops.carafe(*given, 3, 2, 2), (image, mask))


# Losses, attention, normalization, overlaps


def focal_inputs(dtype):
    torch.manual_seed(0)
    scores = torch.randn(40, 5, dtype=dtype)  # log(1 - p) of a large one has few digits in either
    return scores, torch.arange(40) % 6  # 5 is the background


@both_dtypes
def test_sigmoid_focal_loss_is_mmdetection_s_definition(in_pytorch, dtype):
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    scores, target = focal_inputs(dtype)
    one_hot = F.one_hot(target, 6)[:, :5]
    results = []
    for loss in (
        lambda given: py_sigmoid_focal_loss(given, one_hot, gamma=1.5, alpha=0.3, reduction="none"),
        lambda given: mmcv.ops.sigmoid_focal_loss(given, target, 1.5, 0.3, None, "none"),
    ):
        given = scores.clone().requires_grad_()
        value = loss(given)
        value.sum().backward()
        results.append((value, given.grad))
    torch.testing.assert_close(results[1], results[0], rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_sigmoid_focal_loss_of_a_sure_and_wrong_score_is_finite(in_pytorch):
    scores = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(scores, torch.tensor([0]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("loss", ["sigmoid_focal_loss", "softmax_focal_loss"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_losses_have_the_derivatives_of_their_values(in_pytorch, loss, weighted):
    scores, target = focal_inputs(torch.float64)
    target = target % 5 if loss == "softmax_focal_loss" else target
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    function = getattr(mmcv.ops, loss)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: function(given, target, 2.0, 0.25, weight, "sum"), scores)


@pytest.mark.parametrize("loss", ["sigmoid_focal_loss", "softmax_focal_loss"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_losses_read_nothing_from_the_device(in_pytorch, loss, weighted):
    scores, target = focal_inputs(torch.float32)
    target = target % 5 if loss == "softmax_focal_loss" else target
    scores.requires_grad_()
    with HostReads() as reads:
        getattr(mmcv.ops, loss)(scores, target, 2.0, 0.25, torch.rand(5) if weighted else None, "sum").backward()
    assert reads.found == []


def test_softmax_focal_loss_without_focus_is_the_cross_entropy(in_pytorch):
    scores, target = focal_inputs(torch.float64)
    found = mmcv.ops.softmax_focal_loss(scores, target % 5, 0.0, 1.0, None, "none")
    torch.testing.assert_close(found, F.cross_entropy(scores, target % 5, reduction="none"))


def test_deformable_attention_is_mmcv_s_own_for_the_cpu(in_pytorch):
    from mmcv.ops import multi_scale_deform_attn as attention

    torch.manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = torch.rand(2, 26, 2, 4, dtype=torch.float64)
    places = torch.rand(2, 3, 2, 2, 4, 2, dtype=torch.float64)
    weights = torch.rand(2, 3, 2, 2, 4, dtype=torch.float64)
    results = []
    for function in (
        lambda *given: attention.multi_scale_deformable_attn_pytorch(given[0], shapes, *given[1:]),
        lambda *given: attention.MultiScaleDeformableAttnFunction.apply(
            given[0], shapes, torch.tensor([0, 20]), *given[1:], 64
        ),
    ):
        results.append(_with_derivatives(function, (value, places, weights)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_deformable_attention_reads_sizes_once_per_model_pass(in_pytorch):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as Attention

    places, weights = torch.rand(2, 26, 2, 2, 4, 2), torch.rand(2, 26, 2, 2, 4)
    with HostReads() as reads:
        for sizes in ([[4, 5], [2, 3]], [[2, 3], [4, 5]]):  # a pass of three layers at each of two sizes
            shapes = torch.tensor(sizes)
            start = value = torch.rand(2, 26, 2, 4, requires_grad=True)
            for _ in range(3):
                output = Attention.apply(value, shapes, torch.tensor([0, shapes[0].prod()]), places, weights, 64)
                value = output.view_as(start)
            value.sum().backward()
            assert torch.isfinite(start.grad).all()
    assert reads.found.count("tolist") == 2


def test_mmcv_s_synchronised_normalisation_in_one_process_is_torch_s(in_pytorch):
    torch.manual_seed(0)
    image = torch.randn(3, 4, 5, 6)
    weighing = torch.arange(6)
    results = []
    for synchronised in (False, True):
        given = image.clone().requires_grad_()
        weight, bias = (torch.arange(4) + 0.5).requires_grad_(), (torch.arange(4) - 1.0).requires_grad_()
        mean, variance = torch.zeros(4), torch.ones(4)
        if synchronised:
            function = mmcv.ops.sync_bn.SyncBatchNormFunction.apply
            output = function(given, mean, variance, weight, bias, 0.1, 1e-5, None, 1, "default")
        else:
            output = F.batch_norm(given, mean, variance, weight, bias, training=True, momentum=0.1, eps=1e-5)
        (output**2 * weighing).sum().backward()
        results.append((output, given.grad, weight.grad, bias.grad, mean, variance))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@compiled
@both_dtypes
@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_overlaps_are_those_of_mmcv_full(against_compiled, dtype, mode, offset):
    first, second = (boxes_and_scores(count, seed, dtype=dtype)[0] for count, seed in ((9, 1), (14, 2)))
    tolerance = DTYPES[dtype]
    against_compiled(
        lambda a, b: mmcv.ops.bbox_overlaps(a.detach(), b.detach(), mode, False, offset),
        first,
        second,
        tolerance=tolerance,
    )
    against_compiled(
        lambda a, b: mmcv.ops.bbox_overlaps(a.detach(), b.detach(), mode, True, offset),
        first,
        second[:9],
        tolerance=tolerance,
    )


# Missing operations


def test_calling_a_missing_operation_is_an_error(in_pytorch):
    with pytest.raises(
        NotImplementedError, match=r"mmcv's operation box_iou_rotated .* mmcv-full 1\.7\.2, which has it"
    ):
        mmcv.ops.box_iou_rotated(torch.rand(2, 5), torch.rand(3, 5))


def test_mmcv_knows_that_it_has_operations():
    """Otherwise its optimizers take a deformable convolution's offsets for a plain convolution's weights."""
    model = nn.Sequential(mmcv.ops.DeformConv2dPack(3, 3, 3))
    settings = {"type": "SGD", "lr": 1.0, "paramwise_cfg": {"dcn_offset_lr_mult": 0.1}}
    groups = mmcv.runner.build_optimizer(model, settings).param_groups
    rates = {name: group["lr"] for (name, _), group in zip(model.named_parameters(), groups, strict=True)}
    assert rates == {"0.weight": 1.0, "0.conv_offset.weight": 0.1, "0.conv_offset.bias": 0.1}


BROKEN = """
import importlib.abc, importlib.machinery, sys

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mmcv._ext" else None
    def exec_module(self, module):
        raise ImportError("undefined symbol: _ZN2at")

sys.meta_path.insert(0, Broken())
import mmdetection_files
import mmcv.ops, torch
print(mmdetection_files.operations.are_compiled(), mmcv.ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)[1].dtype)
"""


def test_a_compiled_module_for_another_torch_is_named_and_replaced():
    ended = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, cwd=MMDETECTION, timeout=600)
    assert ended.stdout.strip().endswith("False torch.int64"), ended.stderr
    assert "undefined symbol: _ZN2at" in ended.stderr
