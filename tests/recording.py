"""A trial that notes what it computes, to be laid beside the library's own loop."""

import copy

import pytest
import torch


def gradients(loss, model):
    """The gradient of each parameter that trains; None where it has none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [None if g is None else g.clone() for g in found]


def recording(trial_class):
    """The trial class, the records of its steps ("losses", "gradients", "lr"), and what it started from ("trial",
    "weights"), which training fills."""
    records, start = [], {}

    class Recording(trial_class):
        def losses(self, model, batch):
            if not start:
                start.update(trial=self, weights=copy.deepcopy(self.plain_model.state_dict()))
            losses = super().losses(model, batch)
            records.append(
                {
                    "losses": {name: value.item() for name, value in losses.items()},
                    "gradients": gradients(losses["loss"], self.plain_model),
                    "lr": self.optimizer.param_groups[0]["lr"],
                }
            )
            return losses

    return Recording, records, start


def assert_same_records(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own["lr"] == pytest.approx(other["lr"], rel=1e-12)
        assert own["losses"] == pytest.approx(other["losses"], abs=1e-6)
        for a, b in zip(own["gradients"], other["gradients"], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
