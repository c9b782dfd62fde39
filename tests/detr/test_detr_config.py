"""Config values for a model, its weights and its image processor."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT
from tiny_detr import DETR_TYPES

from detr_files.model import build_detector, image_processor, model_config
from detr_files.weights import load_start_weights, names_of
from detr_hyperparameters import DetrHyperparameters
from shared.errors import UserError

RT_DETR = {"model_type": "rt_detr_v2", **DETR_TYPES["rt_detr_v2"]}
NAMES = ["circle", "rectangle", "triangle"]


def categories(*names):
    return [{"id": i + 1, "name": name} for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the Hub's layout with a detector of the three shapes; and its weights."""
    folder = tmp_path_factory.mktemp("published")
    hparams = DetrHyperparameters(config=RT_DETR)
    torch.manual_seed(1)
    detector = build_detector(model_config(hparams), categories(*NAMES))
    detector.save_pretrained(folder)
    image_processor(hparams, "rt_detr_v2").save_pretrained(folder)
    return folder, {name: value.clone() for name, value in detector.state_dict().items()}


def started(hparams, *names):
    """The state of a model that starts from `hparams.weights`, and its state before."""
    torch.manual_seed(2)
    detector = build_detector(model_config(hparams), categories(*names))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    load_start_weights(detector, hparams, categories(*names))
    return detector.state_dict(), before


def prepare(**changes):
    hparams = DetrHyperparameters(**changes)
    image_processor(hparams, model_config(hparams).model_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "hyperparameters.model: it is missing. Fix: name a model of the Hub"),
        ({"config": {"model_type": "rt_detr_v3"}}, "config.model_type: 'rt_detr_v3' is not supported; did you mean"),
        (
            {"config": {**RT_DETR, "num_querys": 3}},
            "unknown field 'num_querys' of rt_detr_v2; did you mean 'num_queries'",
        ),
        ({"config": {**RT_DETR, "num_queries": "many"}}, "hyperparameters.config: rt_detr_v2 does not accept"),
        ({"config": {**RT_DETR, "num_labels": 3}}, "config.num_labels: the data gives the categories"),
        (
            {"config": RT_DETR, "weights": "published"},
            "'published' are those of hyperparameters.model, which is missing",
        ),
        ({"config": RT_DETR, "processor": {"sice": 3}}, "hyperparameters.processor: unknown field 'sice'"),
        ({"model": "someone/no-such-model"}, "is not a folder, and the Hub does not send it .*copy the model's folder"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_with_the_fix(changes, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as refused:
        prepare(**changes)
    assert "\n" not in str(refused.value)


def test_published_weights_of_the_same_categories_are_taken_whole(published):
    folder, weights = published
    state, _ = started(DetrHyperparameters(model=str(folder), weights="published"), *NAMES)
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_a_subset_of_the_categories_keeps_its_rows_by_name(published):
    folder, weights = published
    hparams = DetrHyperparameters(model=str(folder), weights="published")
    state, before = started(hparams, "triangle", "star", "circle")
    head = "class_embed.0.weight"
    assert torch.equal(state[head][[0, 2]], weights[head][[2, 0]])
    assert torch.equal(state[head][1], before[head][1])
    embedding = "model.denoising_class_embed.weight"  # its last row stands for no category
    assert torch.equal(state[embedding][[0, 2, 3]], weights[embedding][[2, 0, 3]])
    assert torch.equal(state["model.encoder_input_proj.0.0.weight"], weights["model.encoder_input_proj.0.0.weight"])


def test_backbone_takes_the_backbone_alone(published):
    folder, weights = published
    state, before = started(DetrHyperparameters(model=str(folder), weights="backbone"), *NAMES)
    assert all(torch.equal(state[name], value) for name, value in weights.items() if "backbone." in name)
    assert torch.equal(state["class_embed.0.weight"], before["class_embed.0.weight"])


def test_a_safetensors_file_is_taken_and_a_pickle_is_refused(published, tmp_path):
    folder, weights = published
    shutil.copy(folder / "model.safetensors", tmp_path / "mine.safetensors")
    state, _ = started(DetrHyperparameters(config=RT_DETR, weights=str(tmp_path / "mine.safetensors")), *NAMES)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    torch.save(weights, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=r"mine\.pth is not a safetensors file. Fix: save it as safetensors"):
        started(DetrHyperparameters(config=RT_DETR, weights=str(tmp_path / "mine.pth")), *NAMES)


def test_weights_of_another_model_are_refused(published):
    folder, _ = published
    other = {"model_type": "yolos", **DETR_TYPES["yolos"]}
    with pytest.raises(UserError, match="is of another model: only"):
        started(DetrHyperparameters(config=other, weights=str(folder)), *NAMES)


def test_code_beside_a_model_is_not_executed(published, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(published[0], folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "hostile.Config", "AutoModelForObjectDetection": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    started(DetrHyperparameters(model=str(folder), weights="published"), *NAMES)
    assert not (tmp_path / "executed").exists()


def test_coco_names_of_the_hub_are_those_of_coco():
    config = model_config(DetrHyperparameters(config=RT_DETR))
    config.id2label = {0: "aeroplane", 1: "sofa", 2: "person"}
    assert names_of(config) == ["airplane", "couch", "person"]


def test_a_change_of_a_nested_field_keeps_the_others(published):
    hparams = DetrHyperparameters(model=str(published[0]), config={"backbone_config": {"depths": [1, 1, 1, 2]}})
    backbone = model_config(hparams).backbone_config
    assert backbone.depths == [1, 1, 1, 2]
    assert backbone.hidden_sizes == RT_DETR["backbone_config"]["hidden_sizes"]


def test_the_model_of_bccd_yaml_computes_its_losses():
    hyperparameters = yaml.safe_load((ROOT / "detr/bccd.yaml").read_text())["hyperparameters"]
    config = model_config(DetrHyperparameters(config=hyperparameters["config"]))
    detector = build_detector(config, [{"name": name} for name in "abc"]).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    size = hyperparameters["processor"]["size"]
    outputs = detector(pixel_values=torch.rand(1, 3, size["height"], size["width"]), labels=labels)
    assert torch.isfinite(outputs.loss)
