"""A detector is a true `PyTorchTrial`: Determined's own loop trains it, and its own loader reads our checkpoints."""

import pytest
import torch
from conftest import ROOT, stop_workers
from determined import pytorch
from test_switches import small
from tiny_models import trial_classes

from shared.training.checkpoints import load_state


@pytest.fixture
def config(detector, shapes):
    config = small(detector, shapes)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = {"batches": 2}
    return config


def test_determined_s_trainer_trains_validates_and_saves(detector, config, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")  # which Determined copies into its checkpoint
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytorch.init(hparams=config["hyperparameters"], exp_conf=config) as context:
        trial = trial_classes()[detector](context)
        before = {name: value.clone() for name, value in trial.plain_model.named_parameters()}
        pytorch.Trainer(trial, context).fit(max_length=pytorch.Batch(2), validation_period=pytorch.Batch(2))
    stop_workers()
    assert trial.batches_trained == 2
    assert any(not torch.equal(value, before[name]) for name, value in trial.plain_model.named_parameters())
    (saved,) = (tmp_path / "data").rglob("state_dict.pth")
    assert saved.stat().st_size > 0


def test_determined_s_loader_reads_a_checkpoint(detector, config, train, monkeypatch):
    trial_class = trial_classes()[detector]
    run = train(trial_class, config)
    monkeypatch.chdir(ROOT / detector)
    saved = run / "checkpoints/last"
    trial = pytorch.load_trial_from_checkpoint_path(str(saved), trial_class=trial_class)
    expected = load_state(saved / "state_dict.pth")["models_state_dict"][0]
    own = trial.plain_model.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name].cpu(), value) for name, value in expected.items())
