"""The optimizer's step in one kernel: the same weights except for rounding."""

import copy

import pytest
import torch
from torch import nn

from shared.training.switches import fuse

KINDS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
}
fused_here = pytest.mark.skipif(
    not fuse(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)).param_groups[0]["fused"],
    reason="this PyTorch has no fused step on the CPU",
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_but_for_rounding(a: nn.Module, b: nn.Module) -> None:
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def assert_goes_on_as_unfused(model, optimizer, saved, plain, kind):
    """Trains three more steps from the state after three. `plain` has the initial weights."""
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(plain, KINDS[kind](plain.parameters()), range(6))
    assert_same_but_for_rounding(model, plain)


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_fused_steps_are_the_library_s_but_for_rounding(kind):
    model = small_model()
    plain = copy.deepcopy(model)
    optimizer = fuse(KINDS[kind](model.parameters()))
    assert all(group["fused"] for group in optimizer.param_groups)
    train(model, optimizer, range(20))
    train(plain, KINDS[kind](plain.parameters()), range(20))
    assert_same_but_for_rounding(model, plain)


@pytest.mark.parametrize("said", [{"foreach": True}, {"foreach": False}, {"fused": False}])
def test_the_config_s_own_optimizer_settings_win(said):
    (group,) = fuse(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, **said)).param_groups
    assert {name: group[name] for name in said} == said
    assert not group["fused"]


def test_an_optimizer_that_is_not_pytorch_s_steps_as_it_does():
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    assert "fused" not in fuse(Own([nn.Parameter(torch.zeros(1))])).param_groups[0]


@fused_here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)], ids=["unfused", "fused"])
def test_a_checkpoint_continues_with_this_run_s_kind_of_step(kind, before, after):
    model = small_model()
    plain = copy.deepcopy(model)
    first = KINDS[kind](model.parameters())
    first = fuse(first) if before else first
    train(model, first, range(3))
    saved = copy.deepcopy(first.state_dict())

    fused_before = first.param_groups[0]["fused"]
    second = KINDS[kind](model.parameters())
    for group in second.param_groups:
        group["fused"] = None if after else False
    second = fuse(second)
    assert_goes_on_as_unfused(model, second, saved, plain, kind)
    assert bool(fused_before) == before
    assert bool(second.param_groups[0]["fused"]) == after


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_of_a_fused_run_is_exact(kind):
    model, whole = small_model(), small_model()
    train(whole, fuse(KINDS[kind](whole.parameters())), range(6))
    first = fuse(KINDS[kind](model.parameters()))
    train(model, first, range(3))
    second = fuse(KINDS[kind](model.parameters()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, second, range(3, 6))
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_another_memory_format_continues(kind):
    """The CPU's fused kernels read a momentum by address. Another layout would assign it to other weights."""
    model = small_model()
    plain = copy.deepcopy(model)
    first = fuse(KINDS[kind](model.parameters()))
    train(model, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    model.to(memory_format=torch.channels_last)
    assert_goes_on_as_unfused(model, fuse(KINDS[kind](model.parameters())), saved, plain, kind)


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_a_scaler_skips_leaves_weights_and_state(kind):
    """Includes the first step, with a scale that starts too large."""
    model = small_model()
    plain = copy.deepcopy(model)
    for each, optimizer in ((model, fuse(KINDS[kind](model.parameters()))), (plain, KINDS[kind](plain.parameters()))):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for overflows in (True, False, False, True, False):
            images = torch.ones(2, 3, 12, 12)
            scaler.scale(each(images).square().sum()).backward()
            if overflows:
                each[0].bias.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_but_for_rounding(model, plain)


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_asks_the_fused_step_to_skip_without_waiting(kind):
    """A scaler that decides itself reads the overflow from the device, and then does not call the step."""
    model, steps = small_model(), []
    before = copy.deepcopy(model)
    optimizer = fuse(KINDS[kind](model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: steps.append("asked"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 3, 12, 12)).square().sum()).backward()
    model[0].bias.grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert steps == ["asked"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@fused_here
def test_a_custom_step_sees_gradients_without_the_scale():
    """Detectron2's optimizers clip in their step."""
    seen = []

    class Clipping(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(closure)

    weight = nn.Parameter(torch.ones(3))
    optimizer = fuse(Clipping([weight], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * 2).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(seen[0], torch.full((3,), 2.0))


@fused_here
def test_groups_keep_their_own_settings_and_the_defaults_of_the_config():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    groups = [{"params": parameters[:1], "lr": 0.5, "lr_scale": 2.0}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = fuse(torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.05))
    first, second = optimizer.param_groups
    assert (first["lr"], first["lr_scale"], first["weight_decay"], first["betas"]) == (0.5, 2.0, 0.05, (0.8, 0.9))
    assert (second["lr"], second["weight_decay"], optimizer.defaults["lr"]) == (0.1, 0.0, 0.1)


@fused_here
@pytest.mark.parametrize("kind", KINDS)
def test_groups_decide_where_the_defaults_say_foreach(kind):
    """Detectron2's YAML configs set `foreach` only in the defaults."""
    model = small_model()
    optimizer = KINDS[kind](model.parameters())
    optimizer.defaults["foreach"] = True
    optimizer = fuse(optimizer)
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (True, None)
    train(model, optimizer, range(1))


@fused_here
def test_parameters_whose_first_gradient_comes_late_are_trained():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    plain = copy.deepcopy(parameters)
    for each, optimizer in ((parameters, fuse(KINDS["SGD"](parameters))), (plain, KINDS["SGD"](plain))):
        for step in range(3):
            each[0].grad = torch.full((3,), 0.5)
            each[1].grad = torch.full((3,), 0.25) if step else None
            optimizer.step()
    for ours, theirs in zip(parameters, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@fused_here
def test_non_contiguous_parameters_are_stepped_as_by_pytorch():
    optimizer = fuse(KINDS["SGD"]([nn.Parameter(torch.zeros(4, 4)[:, :2])]))
    assert not optimizer.param_groups[0]["fused"]
