"""The hyperparameters that every detector has: precision, memory format, averages, clipping, freezing."""

import copy
import sys

import pytest
import torch
from conftest import WITHOUT_LIBRARY, other_detectors_are_slow, reports
from test_resume import assert_same_bits, final_state
from tiny_models import CONFIGS, EFFICIENTDET, TINY_DETECTORS, trial_classes
from torch import nn

from shared.errors import UserError
from shared.training.checkpoints import read_checkpoint
from shared.training.switches import AveragedWeights, freeze, train_depthwise_in_float32


@pytest.fixture
def trial_class(detector):
    return trial_classes()[detector]


@pytest.fixture
def config(detector, shapes):
    return small(detector, shapes)


def small(detector: str, shapes, **hyperparameters) -> dict:
    """A run of 12 batches without workers, at a small learning rate."""
    config = CONFIGS[detector](shapes)
    own = config["hyperparameters"]
    own.get("config_overrides", own).update(TINY_DETECTORS[detector].SMALL_RATE)
    own.update(hyperparameters)
    config["data"]["workers"] = 0
    return config


def draw_no_regions(detector: str, config: dict) -> None:
    """Removes Detectron2's random choice of regions, which depends on rounding."""
    if detector == "detectron2":
        config["hyperparameters"]["config_file"] = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def losses(run) -> list[float]:
    return [report["metrics"]["loss"] for report in reports(run, "train")]


@other_detectors_are_slow
def test_bf16_has_the_losses_of_float32(detector, config, trial_class, train):
    draw_no_regions(detector, config)
    if detector == EFFICIENTDET.name:
        config["hyperparameters"]["global_batch_size"] = 8  # the loss of four images moves by more with one of them
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 10}
    config["min_checkpoint_period"], config["scheduling_unit"] = {"batches": 10}, 1
    expected = losses(train(trial_class, config, "float32"))
    for name, switches in (("bf16", {}), ("bf16_channels_last", {"channels_last": True})):
        config["hyperparameters"].update(amp="bf16", **switches)
        found = losses(train(trial_class, config, name))
        assert len(found) == 10
        assert found != expected
        assert found == pytest.approx(expected, rel=0.02)


def test_depthwise_convolutions_are_trained_in_float32_beside_bf16():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    train_depthwise_in_float32(model)
    model = copy.deepcopy(model)  # as an average is begun
    images = torch.randn(2, 4, 8, 8)
    exact = plain[0](images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(plain[0](images).float(), exact)
        assert torch.equal(model[0](images), exact)
        assert model[0](images.bfloat16()).dtype == model[1](images).dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(model[0](images), plain[0](images))
    assert model[0].weight is not plain[0].weight
    assert type(model[0]).__name__ == "Conv2d"
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.skipif("detectron2" in WITHOUT_LIBRARY, reason=WITHOUT_LIBRARY.get("detectron2", ""))
def test_detectron2_s_regions_keep_their_corners_in_bf16(shapes, train):
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    pooled = []

    class Watched(trial_classes()["detectron2"]):
        def build_model(self):
            model = super().build_model()
            pooler = next(module for module in model.modules() if isinstance(module, ROIPooler))
            sides = (256, 128, 64, 32)
            features = [torch.arange(side * side).view(1, 1, side, side).float() for side in sides]
            boxes = [Boxes(torch.tensor([[1001.0, 333.0, 1013.0, 347.0]]))]
            expected = pooler(features, boxes)
            pooled.extend([pooler([one.bfloat16() for one in features], boxes), expected])
            return model

    Watched.__module__ = "detectron2_model_def"
    config = small("detectron2", shapes, amp="bf16")
    config["searcher"]["max_length"] = {"batches": 1}
    train(Watched, config)
    assert pooled[0].dtype == torch.float32
    torch.testing.assert_close(pooled[0], pooled[1], rtol=0.01, atol=0)


@other_detectors_are_slow
def test_channels_last_changes_the_memory_alone(detector, config, trial_class, train):
    draw_no_regions(detector, config)
    formats = []

    class Watched(trial_class):
        def losses(self, model, batch):
            convolutions = (m for m in self.plain_model.modules() if isinstance(m, nn.Conv2d))
            convolution = next(m for m in convolutions if min(m.in_channels, *m.kernel_size) > 1)
            seen = [convolution.weight, *([batch.images] if isinstance(batch.images, torch.Tensor) else [])]
            formats.append(all(one.is_contiguous(memory_format=torch.channels_last) for one in seen))
            return super().losses(model, batch)

    Watched.__module__ = trial_class.__module__
    config["scheduling_unit"], config["searcher"]["max_length"] = 1, {"batches": 3}
    expected = losses(train(Watched, config, "first"))
    assert not any(formats)
    formats.clear()
    config["hyperparameters"]["channels_last"] = True
    assert losses(train(Watched, config, "last")) == pytest.approx(expected, rel=0.005)
    assert formats
    assert all(formats)


def test_frozen_parts_and_their_statistics_stay_and_the_rest_is_trained(detector, config, trial_class, train, caplog):
    caplog.set_level("INFO")
    config["hyperparameters"].update(freeze=[TINY_DETECTORS[detector].FROZEN], clip_grad=1.0)
    config["searcher"]["max_length"] = {"batches": 4}
    initial = {}

    class Watched(trial_class):
        def build_model(self):
            model = super().build_model()
            initial.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return model

    Watched.__module__ = trial_class.__module__
    trained = read_checkpoint(train(Watched, config) / "checkpoints/last").training_weights
    changed = {name for name in trained if not torch.equal(trained[name], initial[name])}
    frozen = {name for name in trained if TINY_DETECTORS[detector].FROZEN in name}
    assert len(frozen) > 10
    assert any("running_mean" in name for name in frozen)
    assert not changed & frozen
    assert any("running_mean" in name for name in changed)
    assert any("weight" in name for name in changed)
    assert f"{TINY_DETECTORS[detector].FROZEN}; " in caplog.text
    assert "parameters are trained" in caplog.text


@other_detectors_are_slow
def test_a_run_with_every_switch_resumes_to_the_same_bits(detector, shapes, trial_class, train, crash_and_resume):
    switches = {"amp": "bf16", "channels_last": True, "model_ema_decay": 0.9, "clip_grad": 1.0}
    config = small(detector, shapes, freeze=[TINY_DETECTORS[detector].FROZEN], **switches)
    config["searcher"]["max_length"], config["min_checkpoint_period"] = {"batches": 4}, {"batches": 2}
    whole = train(trial_class, config, "whole")
    resumed = crash_and_resume(trial_class, config, 2)
    assert final_state(resumed)["ema"] is not None
    assert_same_bits(final_state(resumed), final_state(whole))


@pytest.mark.slow
def test_torch_compile_has_the_losses_of_a_run_without(detector, config, trial_class, train):
    config["searcher"]["max_length"], config["scheduling_unit"] = {"batches": 2}, 1
    expected = losses(train(trial_class, config, "eager"))
    config["hyperparameters"]["torch_compile"] = True
    assert losses(train(trial_class, config, "compiled")) == pytest.approx(expected, rel=0.005)


# --- averages ---------------------------------------------------------------------------------------


def test_the_average_is_the_formula_s_with_a_decay_that_warms_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = AveragedWeights(model, decay=0.3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(4):
        model(torch.rand(2, 3, 8, 8))
        with torch.no_grad():
            model[0].weight += 1
        average.update()
        decay = min(0.3, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            is_float = tensor.is_floating_point()
            expected[name] = expected[name] * decay + tensor * (1 - decay) if is_float else tensor.clone()
    found = average.module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert not any(p.requires_grad for p in average.module.parameters())
    assert not average.module.training


def test_reassigned_buffers_and_shared_modules_are_averaged_too():
    """A buffer that a module sets in each step, and a module under two names."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.again = model[0]
    average = AveragedWeights(model, decay=0.5)
    average.update()
    model[0].running_mean = torch.ones(2)
    average.update()
    assert 0 < average.module[0].running_mean[0] <= 1


# --- freezing ---------------------------------------------------------------------------------------


def parts() -> nn.Module:
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
            self.backbone_norm = nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 1, 1)

    return Detector()


def test_freeze_names_modules_and_parameters_by_their_whole_names():
    model = parts()
    assert freeze(model, ["backbone", "head.bias"]) == "backbone, head.bias; 12 of 33 parameters are trained"
    model.train()
    assert not model.backbone[1].training
    assert model.backbone_norm.training  # the same beginning is no part of it
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "backbone_norm.weight",
        "backbone_norm.bias",
        "head.weight",
    ]


@pytest.mark.parametrize(
    ("message", "names"),
    {
        "the model has no part 'bakbone'; did you mean 'backbone'": ["bakbone"],
        "the model has no part 'zzz'. Fix: name one of its parts: backbone, backbone_norm, head": ["zzz"],
        "backbone, backbone_norm, head is the whole model": ["backbone", "backbone_norm", "head"],
    }.items(),
)
def test_an_unknown_part_to_freeze_is_an_error_that_names_the_parts(message, names):
    with pytest.raises(UserError, match=message):
        freeze(parts(), names)


# --- a library's own words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detector", "hyperparameters", "overrides", "message"),
    [
        (
            "mmdetection",
            {"amp": "bf16"},
            {"fp16": {"loss_scale": 512.0}},
            "hyperparameters.amp: bf16: .* sets fp16 as well",
        ),
        (
            "mmdetection",
            {"clip_grad": 5.0},
            {"optimizer_config.grad_clip": {"max_norm": 35, "norm_type": 2}},
            "hyperparameters.clip_grad: 5: .* sets optimizer_config.grad_clip, .*35",
        ),
        (
            "mmdetection",
            {"model_ema_decay": 0.99},
            {"custom_hooks": [{"type": "EMAHook", "momentum": 0.0002}]},
            "hyperparameters.model_ema_decay: 0.99: .* EMAHook with a momentum of 0.0002, which is a decay of 0.9998",
        ),
        (
            "detectron2",
            {"amp": "bf16"},
            {"SOLVER.AMP.ENABLED": True},
            "hyperparameters.amp: bf16: the config's mixed precision",
        ),
        (
            "detectron2",
            {"clip_grad": 5.0},
            {"SOLVER.CLIP_GRADIENTS.ENABLED": True},
            "hyperparameters.clip_grad: the config clips each parameter's gradient by itself",
        ),
    ],
    indirect=["detector"],
)
def test_a_switch_that_contradicts_the_library_s_config_is_an_error(
    detector, shapes, train, trial_class, hyperparameters, overrides, message
):
    config = CONFIGS[detector](shapes, **overrides)
    config["hyperparameters"].update(hyperparameters)
    with pytest.raises(UserError, match=message):
        train(trial_class, config)


@pytest.mark.skipif("mmdetection" in WITHOUT_LIBRARY, reason=WITHOUT_LIBRARY.get("mmdetection", ""))
@pytest.mark.parametrize("own", [None, {"max_norm": 0.5}])
def test_clip_grad_and_fp16_are_mmdetection_s_own_words(own):
    from mmcv import Config

    from mmdetection_files.switches import take_up_switches
    from mmdetection_hyperparameters import MMDetectionHyperparameters

    config = Config({"optimizer_config": {"grad_clip": own}})
    take_up_switches(config, MMDetectionHyperparameters(config_file="", clip_grad=0.5, amp="fp16"))
    assert config.optimizer_config.grad_clip == {"max_norm": 0.5, "norm_type": 2}
    assert config.fp16 == {"loss_scale": "dynamic"}


def test_fp16_without_a_gpu_says_what_to_take(config, trial_class, train):
    config["hyperparameters"]["amp"] = "fp16"
    with pytest.raises(UserError, match=r"hyperparameters.amp: fp16 needs a GPU. Fix: remove it, or give .* bf16"):
        train(trial_class, config)


def test_sync_bn_of_several_processes_without_gpus_is_refused(config, trial_class, unbuilt, monkeypatch):
    config["hyperparameters"]["sync_bn"] = True
    if models := sys.modules.get("detectron2_files.model"):  # it needs torch's processes
        monkeypatch.setattr(models, "group_processes_of_machine", lambda count: None)
    trial = unbuilt(trial_class, config, slots=2, for_training=False, categories=[{"id": 1, "name": "circle"}])
    with pytest.raises(UserError, match="sync_bn: PyTorch synchronizes batch norm on GPUs only"):
        trial.build()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clip_grad", 0.0, "hyperparameters.clip_grad: it is 0. Fix: give a number > 0"),
        ("model_ema_decay", 1.0, r"hyperparameters.model_ema_decay: it is 1. Fix: give a number < 1"),
        ("amp", "bf8", "hyperparameters.amp: 'bf8' is unknown. Fix: use one of bf16, fp16, null"),
    ],
)
def test_a_switch_of_a_wrong_value_is_an_error_that_names_it(config, trial_class, train, key, value, message):
    config["hyperparameters"][key] = value
    with pytest.raises(UserError, match=message):
        train(trial_class, config)
