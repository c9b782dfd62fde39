"""The plain Python config in a checkpoint, which executes nothing."""

import functools
import pickle

import pytest
import torch
import yaml
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from tiny_detectron2 import DETECTRON2
from tiny_experiment import load_model_def

from detectron2_files.config import config_of_checkpoint, load_detectron2_config, shipped_configs
from detectron2_files.data import read_proposals
from detectron2_files.plain_config import read_plain, write_plain
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.errors import UserError

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"


def load(config_file, submitted=DETECTRON2, **hyperparameters):
    return load_detectron2_config(Detectron2Hyperparameters(str(config_file), **hyperparameters), submitted)


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
    "detectron2.data.build.load_proposals_into_dataset": {
        "_target_": "detectron2.data.build.load_proposals_into_dataset",
        "dataset_dicts": [],
        "proposal_file": "http://127.0.0.1:9/evil.pkl",
    },
    "detectron2.data.get_detection_dataset_dicts": {
        "_named_": "detectron2.data.get_detection_dataset_dicts",
    },
    # a reference brings what a data loader's section may name
    "detectron2.data.build.get_detection_dataset_dicts": "${dataloader.train.dataset}",
    "detectron2.evaluation.COCOEvaluator": {"_target_": "detectron2.evaluation.COCOEvaluator", "output_dir": "out"},
    "detectron2.modeling.mmdet_wrapper.MMDetBackbone": {
        "_target_": "detectron2.modeling.mmdet_wrapper.MMDetBackbone",
        "backbone": {"type": "ResNet", "init_cfg": {"type": "Pretrained", "checkpoint": "evil.pth"}},
    },
    "detectron2.modeling.backbone.fpn.math.sqrt": {"_target_": "detectron2.modeling.backbone.fpn.math.sqrt"},
    "torch.nn.Module.load_state_dict": {"_target_": "torch.nn.Module.load_state_dict"},
    "torchvision.models.get_model": {"_target_": "torchvision.models.get_model", "name": "resnet18"},
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


def test_python_files_in_or_beside_a_checkpoint_are_not_executed(tmp_path):
    checkpoint = tmp_path / "runs/best"
    (checkpoint / "code").mkdir(parents=True)
    load(RETINANET).write(checkpoint)
    for file in (checkpoint / "code/evil.py", tmp_path / "runs/evil.py", tmp_path / "evil.py"):
        file.write_text("raise SystemExit('executed')")
        names = {str(file), str(file.relative_to(tmp_path)), f"runs/../{file.relative_to(tmp_path)}"}
        for name in names:
            path = rewrite(checkpoint, "model.backbone.norm", {"_value_of_config_": name})
            for trusted in (None, RETINANET):
                with pytest.raises(UserError, match="a checkpoint executes no file"):
                    load(path, tmp_path, functions_of=trusted)
    with pytest.raises(UserError, match=r"runs.best.code.evil comes from the checkpoint, and is not executed"):
        load(config_of_checkpoint(checkpoint), tmp_path, custom_imports=["runs.best.code.evil"])


def test_evaluate_takes_a_checkpoint_s_functions_from_its_own_config(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "own.py").write_text(
        "from detectron2 import model_zoo\n"
        f"_zoo = model_zoo.get_config({RETINANET!r})\n"
        "model, optimizer, lr_multiplier = _zoo.model, _zoo.optimizer, _zoo.lr_multiplier\n"
        "dataloader, train = _zoo.dataloader, _zoo.train\n"
        "model.backbone.norm = lambda channels: 7\n"
    )
    load("own.py", folder).write(checkpoint)
    trial_class = load_model_def("detectron2").Detectron2Trial
    hyperparameters = trial_class.hyperparameters_of_checkpoint(checkpoint, {"config_file": "own.py"})
    assert load(hyperparameters.pop("config_file"), folder, **hyperparameters).cfg.model.backbone.norm(8) == 7
    hyperparameters = trial_class.hyperparameters_of_checkpoint(checkpoint, {"config_file": RETINANET})
    with pytest.raises(UserError, match=r"norm is a function of own.py, .*hyperparameters.functions_of: own.py"):
        load(hyperparameters.pop("config_file"), folder, **hyperparameters)


def test_a_yaml_checkpoint_reads_no_other_file(tmp_path):
    (tmp_path / "beside.yaml").write_text("SOLVER: {MAX_ITER: 7}\n")
    (tmp_path / "best").mkdir()
    path = tmp_path / "best/detectron2.yaml"
    for base in ("../beside.yaml", str(tmp_path / "beside.yaml"), "http://127.0.0.1:9/evil.yaml"):
        path.write_text(f"_BASE_: {base}\n")
        with pytest.raises(UserError, match=r"detectron2.yaml: _BASE_ names .*a checkpoint's config names no other"):
            load(path)


WHOLE_CONFIGS = [
    str(path.relative_to(shipped_configs()))
    for path in sorted(shipped_configs().rglob("*.py"))
    if "common" not in path.parts and "imagenet" not in path.name
]


@pytest.mark.parametrize("config_file", WHOLE_CONFIGS)
def test_a_zoo_config_is_read_back_from_a_checkpoint(tmp_path, config_file):
    config = load(config_file)
    config.write(tmp_path)
    path = config_of_checkpoint(tmp_path)
    if "mmdet" in config_file:  # MMDetection's models load what their configs name
        with pytest.raises(UserError, match=r"custom_imports: \[detectron2.modeling.mmdet_wrapper\]"):
            load(path)
        again = load(path, custom_imports=["detectron2.modeling.mmdet_wrapper"])
    else:
        again = load(path)
    (tmp_path / "again").mkdir()
    again.write(tmp_path / "again")
    assert config_of_checkpoint(tmp_path / "again").read_text() == path.read_text()


def test_values_that_yaml_cannot_hold_are_restored(tmp_path):
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
