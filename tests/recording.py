"""A trial that records its computations, to compare them with the library's own loop."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shared.data.loading import map_tensors

# The largest difference between two equal computations, relative to their size where that exceeds 1.
# In float64 no rounding hides a difference: the fused step and the loop over the parameters differ by 1e-16.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# In float32 one bit of one weight after a step can change the next gradients by percents: compare one batch.
BATCHES = {torch.float64: 3, torch.float32: 1}
# float64 shows more; that float32 is computed alike is for the slow tests
both_precisions = pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)


class _NamedFloat32(TorchFunctionMode):
    """Calls PyTorch with another data type if the caller asks for float32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.Tensor.float:
            return arguments[0].to(self.dtype)
        named = {name: self._replaced(value) for name, value in (named or {}).items()}
        return function(*map(self._replaced, arguments), **named)

    def _replaced(self, value):
        return self.dtype if value is torch.float32 else value


@contextlib.contextmanager
def computing_in(dtype):
    """`dtype` replaces float32, to which the libraries round boxes, anchors, targets and losses. Both sides run in this
    context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _NamedFloat32(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same inputs with floating-point tensors of `dtype`."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def gradients(loss, model):
    """The gradient of each parameter that trains; None for a parameter without one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [None if g is None else g.clone() for g in found]


def recording(trial_class, dtype):
    """The trial class with a model and inputs of `dtype`. Training fills the records of its steps ("losses",
    "gradients", "lr") and of its start ("trial", "weights")."""
    records, start = [], {}

    class Recording(trial_class):
        def build_model(self):
            return super().build_model().to(dtype)

        def prepare(self, batch, number):
            return in_dtype(super().prepare(batch, number), dtype)

        def losses(self, model, batch):
            if not start:
                start.update(trial=self, weights=copy.deepcopy(self.plain_model.state_dict()))
            losses = super().losses(model, batch)
            assert {value.dtype for value in losses.values()} == {dtype}
            records.append(
                {
                    "losses": {name: value.item() for name, value in losses.items()},
                    "gradients": gradients(losses["loss"], self.plain_model),
                    "lr": self.optimizer.param_groups[0]["lr"],
                }
            )
            return losses

    return Recording, records, start


def assert_same_records(ours, theirs, dtype):
    bound = BOUNDS[dtype]
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own["lr"] == pytest.approx(other["lr"], rel=1e-12)
        assert own["losses"] == pytest.approx(other["losses"], rel=bound, abs=bound)
        # a gradient that is zero but for rounding has no size of its own: the bound follows from the largest of all
        size = max(1, *(g.abs().max().item() for g in other["gradients"] if g is not None))
        for a, b in zip(own["gradients"], other["gradients"], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=bound * size)


def assert_same_weights(ours, theirs, dtype):
    """Compares two state dicts."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=BOUNDS[dtype], atol=BOUNDS[dtype], msg=name)
