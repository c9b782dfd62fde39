"""Initial weights in every format of Detectron. None executes code."""

import codecs
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from tiny_detectron2 import DETECTRON2, SMALL_YAML
from tiny_experiment import load_model_def

from detectron2_files.config import load_detectron2_config, shipped_configs
from detectron2_files.plain_pickle import unpickle_arrays
from detectron2_files.weights import find_weights, load_weights_into, zoo_weights
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.errors import UserError

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
KEY = "hyperparameters.weights"


def build(**overrides):
    overrides = {**SMALL_YAML, **overrides}
    return load_detectron2_config(
        Detectron2Hyperparameters(RETINANET, config_overrides=overrides), DETECTRON2
    ).build_model()


@pytest.fixture(scope="module")
def model():
    return build()


def arrays(model):
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def assert_same_weights(a, b):
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name]), name


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_zoo_pkl_is_read_without_executing_pickled_code(model, tmp_path, protocol):
    content = {"model": arrays(model), "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    other = build()
    load_weights_into(other, str(tmp_path / "zoo.pkl"), KEY)
    assert_same_weights(other, model)


def test_a_backbone_of_imagenet_is_found_by_its_names_as_detectron2_does(model, tmp_path, caplog):
    prefix = "backbone.bottom_up."
    backbone = {n.removeprefix(prefix): w for n, w in arrays(model).items() if n.startswith(prefix)}
    backbone["stem.fc.weight"] = np.zeros((1000, 4), np.float32)
    content = {"model": backbone, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    other = build()
    with caplog.at_level(logging.INFO):
        load_weights_into(other, str(tmp_path / "R-50.pkl"), KEY)
    for name, weight in other.backbone.bottom_up.state_dict().items():
        assert torch.equal(weight, model.backbone.bottom_up.state_dict()[name])
    assert any("are not in it and start anew" in message for message in caplog.messages)


class Harmful:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("was_executed"),)


def test_a_pkl_with_code_is_refused_and_does_not_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {**arrays(model), "extra": Harmful()}, "__author__": "somebody"}
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"bad.pkl holds more than arrays"):
        load_weights_into(build(), str(tmp_path / "bad.pkl"), KEY)
    torch.save({"model": {"extra": Harmful()}}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad.pth"):
        load_weights_into(build(), str(tmp_path / "bad.pth"), KEY)
    assert not (tmp_path / "was_executed").exists()


class Reduced:
    """Is pickled as a function call, with the state of its result."""

    def __init__(self, function, arguments, *state):
        self.reduced = (function, arguments, *state)

    def __reduce__(self):
        return self.reduced


ADDRESS = b"A" * 8
RECONSTRUCT, NEW_ARRAY = np.zeros(1).__reduce__()[:2]
SCALAR = np.float64(0).__reduce__()[0]
# NumPy believes the 0: that objects need no care
OBJECTS_IN_DISGUISE = Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
FLOATS = np.dtype(np.float32)
HOSTILE_ARRAYS = {
    "objects in disguise": Reduced(RECONSTRUCT, NEW_ARRAY, (1, (1,), OBJECTS_IN_DISGUISE, False, ADDRESS)),
    "an object in disguise": Reduced(SCALAR, (OBJECTS_IN_DISGUISE, ADDRESS)),
    "objects in a field": Reduced(RECONSTRUCT, NEW_ARRAY, (1, (1,), np.dtype([("a", "O")]), False, [(1,)])),
    "flags of objects": Reduced(
        RECONSTRUCT,
        NEW_ARRAY,
        (1, (1,), Reduced(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)), False, ADDRESS),
    ),
    "objects": np.array([{}], dtype=object),
    "text": np.array(["a"]),
    "records": np.zeros(1, dtype=[("a", "f4"), ("b", "f4")]),
    "a subclass": np.ma.array([1.0]),
    "too few bytes": Reduced(RECONSTRUCT, NEW_ARRAY, (1, (1000,), FLOATS, False, ADDRESS)),
    "a negative size": Reduced(RECONSTRUCT, NEW_ARRAY, (1, (-1, -2), FLOATS, False, ADDRESS)),
    "a call of ndarray": Reduced(np.ndarray, ((10**6,), "f4")),
    "a codec": Reduced(codecs.encode, ("a", "rot13")),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_a_pkl_with_anything_but_numbers_in_arrays_is_refused(tmp_path, name):
    content = {"model": {"weight": HOSTILE_ARRAYS[name]}, "__author__": "somebody"}
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"bad.pkl holds more than arrays of numbers and plain values: .*Fix: "):
        load_weights_into(torch.nn.Module(), str(tmp_path / "bad.pkl"), KEY)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_of_numbers_of_every_kind_are_read_from_a_pkl(tmp_path, protocol):
    numbers = np.arange(6).reshape(2, 3)
    arrays = {kind: numbers.astype(kind) for kind in ("f2", "f4", ">f8", "i8", "u1", "?", "c8")}
    arrays |= {"by columns": np.asfortranarray(numbers), "scalar": np.float32(3), "empty": np.zeros((0, 4))}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    read = unpickle_arrays(tmp_path / "arrays.pkl")
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read[name], array)


def test_a_cut_off_file_is_named(model, tmp_path):
    whole = pickle.dumps({"model": arrays(model), "__author__": "x"})
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.pkl is cut off"):
        load_weights_into(build(), str(tmp_path / "cut.pkl"), KEY)
    with pytest.raises(UserError, match=r"hyperparameters.weights: .*nowhere.pkl"):
        find_weights(str(tmp_path / "nowhere.pkl"), KEY, ())


def test_relative_weights_are_found_beside_the_config_or_the_submission(tmp_path, monkeypatch):
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    (tmp_path / "mine/run").mkdir(parents=True)
    (tmp_path / "mine/a.pkl").write_bytes(b"")
    (tmp_path / "mine/run/state_dict.pth").write_bytes(b"")
    places = (tmp_path, tmp_path / "mine")
    assert find_weights("mine/a.pkl", KEY, places) == find_weights("a.pkl", KEY, places) == str(tmp_path / "mine/a.pkl")
    assert find_weights("a.pkl?matching_heuristics=True", KEY, places).endswith("a.pkl?matching_heuristics=True")
    assert find_weights("mine/run", KEY, places) == str(tmp_path / "mine/run/state_dict.pth")
    with pytest.raises(UserError, match=rf"weights: b.pth is not .* looked in {tmp_path}, {tmp_path}/mine"):
        find_weights("b.pth", KEY, places)


def test_use_pretrained_is_another_way_to_say_published():
    assert Detectron2Hyperparameters(RETINANET, use_pretrained=True).weights == "published"
    assert Detectron2Hyperparameters(RETINANET, use_pretrained=True, weights="published").weights == "published"
    with pytest.raises(UserError, match=r"use_pretrained: true means weights: published, but weights is 'x.pkl'"):
        Detectron2Hyperparameters(RETINANET, use_pretrained=True, weights="x.pkl")


def test_a_head_for_other_classes_starts_fresh_with_one_line(model, tmp_path, caplog):
    torch.save({"model": model.state_dict()}, tmp_path / "coco.pth")
    other = build(**{"MODEL.RETINANET.NUM_CLASSES": 5})
    initial = other.head.cls_score.weight.clone()
    with caplog.at_level(logging.INFO):
        load_weights_into(other, str(tmp_path / "coco.pth"), KEY)
    assert torch.equal(other.head.cls_score.weight, initial)
    assert torch.equal(other.head.bbox_pred.weight, model.head.bbox_pred.weight)
    (line,) = [message for message in caplog.messages if message.startswith("weights:")]
    assert "2 are for other classes and start anew (head.cls_score.weight, head.cls_score.bias)" in line


@pytest.mark.parametrize(
    "overrides", [{"MODEL.RESNETS.DEPTH": 101}, {"MODEL.RESNETS.RES2_OUT_CHANNELS": 32}, {"MODEL.FPN.OUT_CHANNELS": 24}]
)
def test_weights_of_another_architecture_are_an_error_with_counts(model, tmp_path, overrides):
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"of another architecture: \d+ parameters do not fit \(.*backbone\."):
        load_weights_into(build(**overrides), str(tmp_path / "other.pth"), KEY)


def test_the_zoo_s_weights_are_known_by_config():
    assert zoo_weights(shipped_configs() / RETINANET).endswith("retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl")
    with pytest.raises(UserError, match=r"the model zoo has no weights for COCO-Detection/fcos_R_50_FPN_1x.py; did"):
        zoo_weights(shipped_configs() / "COCO-Detection/fcos_R_50_FPN_1x.py")


def test_a_head_of_other_classes_does_not_detect_at_random(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "coco.pth")
    other = build(**{"MODEL.RETINANET.NUM_CLASSES": 5})
    with pytest.raises(
        UserError,
        match=r"cls_score.weight is \(720, .*\) in it and \(45, .*\) in the model.*RETINANET.NUM_CLASSES: 80",
    ):
        load_weights_into(other, str(tmp_path / "coco.pth"), KEY, {"MODEL.RETINANET.NUM_CLASSES": 5})


def test_a_backbone_alone_does_not_detect(model, tmp_path):
    backbone = {name: weight for name, weight in model.state_dict().items() if name.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(
        UserError, match=r"lacks, or has in another shape, \d+ of the model's \d+ parameters, the first is head"
    ):
        load_weights_into(build(), str(tmp_path / "backbone.pth"), KEY, {"MODEL.RETINANET.NUM_CLASSES": 80})


@pytest.mark.parametrize(
    ("config_file", "classes", "with_data", "names"),
    [
        (RETINANET, None, False, ["person", "bicycle"]),
        (RETINANET, None, True, ["rectangle", "circle", "triangle"]),
        (RETINANET, 80, True, ["person", "bicycle"]),  # published weights, said so, beside data of one's own
        (RETINANET, 3, True, ["rectangle", "circle", "triangle"]),
        (RETINANET, 4, True, ["class 1", "class 2", "class 3", "class 4"]),
        ("PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml", None, True, ["aeroplane", "bicycle"]),
    ],
)
def test_categories_are_those_of_the_weights_not_of_other_data(shapes, config_file, classes, with_data, names, unbuilt):
    overrides = {} if classes is None else {"MODEL.RETINANET.NUM_CLASSES": classes}
    section = {"annotations": str(shapes / "annotations/val.json"), "images": str(shapes / "val")}
    config = {
        "hyperparameters": {"config_file": config_file, "config_overrides": overrides, "weights": ""},
        "data": {"val": section} if with_data else {},
    }
    trial = unbuilt(load_model_def("detectron2").Detectron2Trial, config, for_training=False)
    assert [category["name"] for category in trial.known_categories()][: len(names)] == names


DETECTRON_1 = "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x.yaml"
# from Detectron2's names to Detectron's
NAMES_OF_DETECTRON = [
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "res_conv1_bn_"),
    (r"^backbone\.bottom_up\.stem\.conv1\.", "conv1_"),
    (r"^backbone\.bottom_up\.(res\d)\.(\d+)\.", r"\1_\2_"),
    (r"shortcut\.", "branch1."),
    (r"conv1\.(?=norm|weight)", "branch2a."),
    (r"conv2\.(?=norm|weight)", "branch2b."),
    (r"conv3\.(?=norm|weight)", "branch2c."),
    (r"\.norm\.", "_bn_"),
    (r"^backbone\.fpn_lateral5\.", "fpn_inner_res5_2_sum_"),
    (r"^backbone\.fpn_lateral(\d)\.", r"fpn_inner_res\1_0_sum_lateral_"),
    (r"^backbone\.fpn_output(\d)\.", r"fpn_res\1_0_sum_"),
    (r"^proposal_generator\.rpn_head\.conv\.", "conv_rpn_fpn2_"),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn_cls_logits_fpn2_"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_bbox_pred_fpn2_"),
    (r"^roi_heads\.box_head\.fc1\.", "fc6_"),
    (r"^roi_heads\.box_head\.fc2\.", "fc7_"),
    (r"^roi_heads\.box_predictor\.", ""),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", r"_[mask]_fcn\1_"),
    (r"^roi_heads\.mask_head\.deconv\.", "conv5_mask_"),
    (r"^roi_heads\.mask_head\.predictor\.", "mask_fcn_logits_"),
    (r"\.", "_"),
]


def as_of_detectron(model):
    """The weights as Detectron saves them: background comes first and has boxes, and each blob has its momentum."""
    blobs = {}
    for name, weight in arrays(model).items():
        bn = ".norm." in name
        if name.endswith(("running_mean", "running_var", "pixel_mean", "pixel_std")):
            continue
        for pattern, other in NAMES_OF_DETECTRON:
            name = re.sub(pattern, other, name)
        name = re.sub("weight$", "s" if bn else "w", re.sub("bias$", "b", name))
        if name.startswith("cls_score"):
            weight = np.concatenate([weight[-1:], weight[:-1]])
        elif name.startswith(("bbox_pred", "mask_fcn_logits")):
            weight = np.concatenate([np.zeros_like(weight[: 4 if name.startswith("bbox") else 1]), weight])
        blobs[name] = weight
        blobs[f"{name}_momentum"] = np.zeros_like(weight)
    return {"blobs": blobs, "cfg": "MODEL: {TYPE: generalized_rcnn}"}


def test_a_detectron_1_model_fits_the_zoo_s_config(tmp_path):
    overrides = {**SMALL_YAML, "MODEL.RESNETS.NORM": "FrozenBN", "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717]}
    hparams = Detectron2Hyperparameters(DETECTRON_1, config_overrides=overrides)
    config = load_detectron2_config(hparams, DETECTRON2)
    model, other = config.build_model(), config.build_model()
    # Python 2 wrote them
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(as_of_detectron(model), protocol=2))
    load_weights_into(other, str(tmp_path / "model_final.pkl"), KEY, config.class_counts())
    read = other.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(read[name], weight, rtol=0, atol=1e-4 if "running_var" in name else 0), name
