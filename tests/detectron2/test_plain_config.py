"""The Python config that lies in a checkpoint: whole, plain, and nothing that executes."""

import functools
import pickle

import pytest
import torch
import yaml
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from tiny_models import DETECTRON2

from detectron2_files.config import config_of_checkpoint, load_config
from detectron2_files.data import read_proposals
from detectron2_files.plain_config import read_plain, write_plain
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.errors import UserError

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"


def load(config_file, submitted=DETECTRON2, **hyperparameters):
    return load_config(Detectron2Hyperparameters(str(config_file), **hyperparameters), submitted)


@pytest.fixture
def checkpoint(tmp_path):
    load(RETINANET).write(tmp_path)
    return tmp_path


def rewrite(checkpoint, key, value):
    path = config_of_checkpoint(checkpoint)
    cfg = OmegaConf.create(yaml.safe_load(path.read_text()))
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    path.write_text(yaml.safe_dump(OmegaConf.to_container(cfg, resolve=False)))
    return path


def test_a_checkpoint_whose_yaml_executes_code_is_refused_and_does_not_run(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    path = config_of_checkpoint(checkpoint)
    path.write_text(path.read_text() + "\nextra: !!python/object/apply:os.system ['touch was_executed']\n")
    with pytest.raises(UserError, match=r"detectron2_lazy.yaml is not the plain YAML.*os.system"):
        load(path)
    (checkpoint / "detectron2.yaml").write_text("X: !!python/object/apply:os.system ['touch was_executed']\n")
    with pytest.raises(UserError, match=r"detectron2.yaml: .*os.system"):
        load(checkpoint / "detectron2.yaml")
    assert not (checkpoint / "was_executed").exists()


HARMFUL = {
    "os.system": {"_target_": "os.system", "command": "touch was_executed"},
    "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": ".", "source": "local", "model": "x"},
    "torch.os.system": {"_target_": "torch.os.system", "command": "touch was_executed"},
    "detectron2.data.build.pickle.loads": {"_target_": "detectron2.data.build.pickle.loads"},
    "detectron2.config.LazyConfig.load": {"_target_": "detectron2.config.LazyConfig.load", "filename": "evil.py"},
    "${evil}": {"_target_": "${evil}"},
    "oc.create": "${oc.create:{_target_: os.system}}",
    "builtins.eval": {"_partial_": [{"_named_": "builtins.eval"}], "keywords": {}},
    "'_target_'": {"_target_": {"_target_": "detectron2.utils.registry.locate", "name": "os.system"}},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_checkpoint_calls_only_what_detectors_are_made_of(checkpoint, name):
    path = rewrite(checkpoint, "model.backbone.norm", HARMFUL[name])
    where = r"detectron2_lazy.yaml: model.backbone.norm.*because a checkpoint says"
    with pytest.raises(UserError, match=where) as error:
        load(path)
    assert name in str(error.value)


def test_a_checkpoint_may_name_what_the_user_s_own_imports_define(checkpoint, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "my_layers_of_test.py").write_text("def my_norm(channels):\n    return None\n")
    monkeypatch.syspath_prepend(folder)
    path = rewrite(checkpoint, "model.backbone.norm", {"_named_": "my_layers_of_test.my_norm"})
    with pytest.raises(UserError, match=r"my_layers_of_test.my_norm.*custom_imports"):
        load(path, folder)
    config = load(path, folder, custom_imports=["my_layers_of_test.py"])
    assert config.cfg.model.backbone.norm.__name__ == "my_norm"


def test_a_checkpoint_s_own_python_files_are_not_executed(tmp_path):
    checkpoint = tmp_path / "runs/best"
    (checkpoint / "code").mkdir(parents=True)
    load(RETINANET).write(checkpoint)
    (checkpoint / "code/evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match=r"runs.best.code.evil is of the checkpoint, and is not executed"):
        load(config_of_checkpoint(checkpoint), tmp_path, custom_imports=["runs.best.code.evil"])
    for name in ("runs/best/code/evil.py", str(checkpoint / "code/evil.py")):
        path = rewrite(checkpoint, "model.backbone.norm", {"_value_of_config_": name})
        with pytest.raises(UserError, match="that config is in none of"):
            load(path, tmp_path)


def test_what_yaml_cannot_hold_is_there_again(tmp_path):
    values = {
        "dtype": torch.bfloat16,
        "mode": BoxMode.XYWH_ABS,
        "layer": torch.nn.LayerNorm,
        "norm": functools.partial(torch.nn.LayerNorm, eps=1e-6, bias=(True, False)),
        "large": float("inf"),
    }
    cfg = OmegaConf.create({"values": values, "function": lambda: None}, flags={"allow_objects": True})
    write_plain(cfg, tmp_path / "a.yaml", lambda key: f"file of {key}")
    read = read_plain(tmp_path / "a.yaml", ())
    for name in ("dtype", "mode", "layer", "large"):
        assert read["values"][name] == values[name]
    assert isinstance(read["values"].mode, BoxMode)
    partial = read["values"].norm
    assert (partial.func, partial.keywords) == (torch.nn.LayerNorm, values["norm"].keywords)
    assert read.function == {"_value_of_config_": "file of function"}


def test_proposals_that_execute_code_are_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "was_executed"), "w")

    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"ids": [1], "boxes": Harmful()}))
    with pytest.raises(UserError, match=r"p.pkl holds more than arrays"):
        read_proposals([str(tmp_path / "p.pkl")], [1])
    assert not (tmp_path / "was_executed").exists()
