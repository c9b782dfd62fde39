"""Detectron2's weights from URLs."""

import torch
from stores import http_store
from tiny_detectron2 import DETECTRON2, SMALL_YAML

from detectron2_files.config import load_detectron2_config
from detectron2_files.weights import load_weights_into
from detectron2_hyperparameters import Detectron2Hyperparameters


def test_weights_of_one_path_on_two_servers_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hparams = Detectron2Hyperparameters("COCO-Detection/retinanet_R_50_FPN_1x.yaml", config_overrides=SMALL_YAML)
    model = load_detectron2_config(hparams, DETECTRON2).build_model()
    weights = model.state_dict()
    for value in (1.0, 2.0):
        folder = tmp_path / f"web {value}/models"
        folder.mkdir(parents=True)
        filled = {**weights, "head.bbox_pred.bias": torch.full_like(weights["head.bbox_pred.bias"], value)}
        torch.save({"model": filled}, folder / "final.pth")
    with http_store(tmp_path / "web 1.0") as one, http_store(tmp_path / "web 2.0") as other:
        for server, value in ((one, 1.0), (other, 2.0), (one, 1.0)):
            load_weights_into(model, f"{server}/models/final.pth", "hyperparameters.weights")
            assert model.state_dict()["head.bbox_pred.bias"][0] == value
