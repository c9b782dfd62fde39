"""Masks that MMDetection's models encode on the device: the same RLE bytes as from the library's arrays."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv import Config
from mmdet.core import InstanceData, encode_mask_results
from mmdet.models.dense_heads.yolact_head import YOLACTProtonet
from mmdet.models.detectors import MaskFormer
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import FCNMaskHead, _do_paste_mask

from mmdetection_files.evaluation import to_detections, to_own_result
from mmdetection_files.masks import encode_two_stage
from shared.evaluation import detections as masks_module

CLASSES, HEIGHT, WIDTH = 3, 37, 53
LABELS = torch.tensor([2, 0, 2, 1, 0, 2])


def blobs(count=6, height=HEIGHT, width=WIDTH):
    """(count, height, width) with areas above and below 0."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randn(count, 1, 5, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[:, 0]


def boxes_and_scores():
    """Boxes inside, partly outside, and as large as the image."""
    boxes = [[3, 4, 20, 30], [-5, -6, 10, 12], [40, 20, 70, 50], [0, 0, 53, 37], [8, 5, 9, 20], [2.3, 1.7, 9.1, 6]]
    return torch.cat([torch.tensor(boxes), torch.linspace(0.9, 0.4, len(boxes))[:, None]], 1)


def assert_same_detections(ours, library):
    ours, library = to_detections(ours, 7), to_detections(library, 7)
    assert len(ours.masks) > 0
    assert ours.masks == library.masks
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(library, name))


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("at_once", [2, 100])
def test_masks_of_two_stages_have_the_library_s_bytes(class_agnostic, at_once, monkeypatch):
    monkeypatch.setattr(masks_module, "PIXELS_AT_ONCE", at_once * HEIGHT * WIDTH)
    head = FCNMaskHead(num_convs=0, in_channels=4, num_classes=CLASSES, class_agnostic=class_agnostic)
    scores = blobs(len(LABELS) * CLASSES, 14, 14).view(len(LABELS), CLASSES, 14, 14) * 4
    scores = scores[:, :1] if class_agnostic else scores
    boxes, scale = boxes_and_scores(), np.array([1.5, 1.25, 1.5, 1.25], np.float32)
    resized = boxes[:, :4] * torch.from_numpy(scale)
    of_library = head.get_seg_masks(
        scores, resized, LABELS, Config({"mask_thr_binary": 0.5}), (HEIGHT, WIDTH, 3), scale, True
    )
    ours = encode_two_stage(head, scores, resized, LABELS, 0.5, (HEIGHT, WIDTH), scale)
    by_class = [boxes[label == LABELS].numpy() for label in range(CLASSES)]
    assert_same_detections((by_class, ours), (by_class, of_library))


def test_the_mask_of_a_box_without_width_is_the_library_s_on_a_gpu():
    head = FCNMaskHead(num_convs=0, in_channels=4, num_classes=1, class_agnostic=True)
    box, scores = torch.tensor([[8.5, 5, 8.5, 20], [4, 5, 4, 5]]), blobs(2, 14, 14)[:, None] * 4
    pasted, _ = _do_paste_mask(scores.sigmoid(), box, HEIGHT, WIDTH, skip_empty=False)
    (ours,) = encode_two_stage(head, scores, box, LABELS[1:2].repeat(2), 0.5, (HEIGHT, WIDTH), 1.0)
    assert ours == masks_module.encode_masks((pasted >= 0.5).numpy())


def test_masks_of_solo_have_the_library_s_bytes():
    model = SimpleNamespace(mask_head=SimpleNamespace(num_classes=CLASSES))

    def results(count):
        found = InstanceData(dict(img_shape=(HEIGHT, WIDTH, 3)))
        found.masks, found.labels, found.scores = blobs()[:count] > 0, LABELS[:count], torch.rand(6)[:count] * 0 + 0.5
        return found

    library = SingleStageInstanceSegmentor.format_results.__wrapped__
    ours = SingleStageInstanceSegmentor.format_results(model, results(6))
    assert_same_detections(ours, library(model, results(6)))
    assert len(to_detections(SingleStageInstanceSegmentor.format_results(model, results(0)), 7).masks) == 0


def test_masks_of_yolact_have_the_library_s_bytes():
    head, meta = SimpleNamespace(num_classes=CLASSES), {"ori_shape": (HEIGHT, WIDTH, 3), "scale_factor": None}
    by_class = [boxes_and_scores()[label == LABELS].numpy() for label in range(CLASSES)]
    results = [
        (by_class, function(head, blobs(height=9, width=13).sigmoid(), LABELS, meta, True))
        for function in (YOLACTProtonet.get_seg_masks, YOLACTProtonet.get_seg_masks.__wrapped__)
    ]
    assert_same_detections(*results)


@pytest.mark.parametrize("stuff", [0, 2])
def test_masks_of_maskformer_have_the_library_s_bytes(stuff):
    def model():
        result = {"ins_results": (LABELS, boxes_and_scores(), blobs() > 0)}
        if stuff:
            result["pan_results"] = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
        return SimpleNamespace(
            extract_feat=lambda images: images,
            panoptic_head=SimpleNamespace(simple_test=lambda features, metas, rescale: (None, None)),
            panoptic_fusion_head=SimpleNamespace(simple_test=lambda scores, masks, metas, rescale: [dict(result)]),
            num_things_classes=CLASSES,
            num_stuff_classes=stuff,
        )

    (ours,) = MaskFormer.simple_test(model(), None, [{}], rescale=True)
    (library,) = MaskFormer.simple_test.__wrapped__(model(), None, [{}], rescale=True)
    assert_same_detections(ours, library)


def test_a_data_set_of_mmdetection_s_own_is_given_the_same_masks():
    arrays = [list((blobs()[label == LABELS] > 0).numpy()) for label in range(CLASSES)]
    boxes = [np.zeros((len(of_class), 5)) for of_class in arrays]
    scored = to_own_result((boxes, (arrays, [[0.5]] * CLASSES)), 0).result[1]  # Mask Scoring R-CNN
    encoded = to_own_result((boxes, arrays), 0).result[1]
    again = to_own_result((boxes, encoded), 0).result[1]
    assert again == encoded == scored[0]
    assert encoded == encode_mask_results(arrays)
