"""A checkpoint's config is data: it imports no modules, and names no pickle and no Python file."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from mmcv.runner import CheckpointLoader
from stores import http_store
from tiny_experiment import load_model_def
from tiny_mmdetection import MMDETECTION, mmdet_config

from mmdetection_files.config import load_mmdet_config
from mmdetection_files.model import build_model, without_pretrained_backbone, without_teacher_weights
from mmdetection_files.saved_config import read_resolved, write_resolved
from mmdetection_hyperparameters import MMDetectionHyperparameters
from shared.commands.evaluate import evaluate
from shared.commands.train import train_locally
from shared.errors import UserError

RETINANET = "retinanet/retinanet_r50_fpn_1x_coco.py"
TEACHER = "configs/gfl/gfl_r101_fpn_mstrain_2x_coco.py"
EXECUTES = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.fixture(scope="module")
def experiment(shapes) -> dict:
    config = mmdet_config(shapes, RETINANET)
    config["data"]["workers"] = 0
    config["searcher"]["max_length"] = config["min_validation_period"] = {"batches": 1}
    return config


def run_in_process(do, tmp_path, config, **arguments):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    run_command(do, load_model_def("mmdetection").MMDetectionTrial, path, **arguments)


def evaluated(tmp_path, config, checkpoint) -> dict:
    """`evaluate CONFIG --checkpoint CHECKPOINT`, in this process."""
    output = tmp_path / "evaluated"
    arguments = {"checkpoint": str(checkpoint), "results": None, "output": output, "report": None, "min_score": "best"}
    run_in_process(evaluate, tmp_path, config, **arguments)
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def honest(experiment, tmp_path_factory) -> Path:
    """A checkpoint of a run of one batch."""
    tmp_path = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_in_process(train_locally, tmp_path, experiment, output_dir=tmp_path / "run", resume=None)
    return tmp_path / "run/checkpoints/last"


@pytest.fixture
def checkpoint(honest, tmp_path, monkeypatch) -> Path:
    """A copy of it, to change. Modules in the test's folder can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    copy = tmp_path / "checkpoint"
    shutil.copytree(honest, copy)
    (copy / "manifest.json").unlink()  # whoever changes the one changes the other
    return copy


class Harmful:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def harmful_files(folder: Path, trace: Path) -> None:
    """Harmful files in every format that mmcv would execute."""
    (folder / "evil").mkdir()
    for name in ("evil_module.py", "evil/mc.py", "evil/config.py"):
        (folder / name).write_text(EXECUTES.format(str(trace)))
    for name in ("evil/a.pkl", "evil/a.pickle", "evil/tree.np"):
        (folder / name).write_bytes(pickle.dumps(Harmful(trace)))
    call = f"!!python/object/apply:os.mkdir ['{trace}']"
    for name in ("evil/a.yaml", "evil/a.yml"):
        (folder / name).write_text(call)
    (folder / "evil/teacher.json").write_text(json.dumps({"custom_imports": {"imports": ["evil_module"]}}))


def distilling(config, file):
    config.model.update(type="KnowledgeDistillationSingleStageDetector", teacher_config=file)


def own_data(config, **keys):
    leaf = {**config.data.val, "type": "CustomDataset", "classes": ["circle", "square", "triangle"], **keys}
    config.data.val = {"type": "ConcatDataset", "datasets": [leaf]}


def receptive_fields(config, file):
    search = {"config": {"search": {"num_branches": 2}}, "mode": "fixed_single_branch"}
    config.custom_hooks = [{"type": "RFSearchHook", "rfstructure_file": file, **search}]


def file_client(config, path):
    client = {"backend": "memcached", "server_list_cfg": "", "client_cfg": "", "sys_path": path}
    config.data.val.pipeline[0]["file_client_args"] = client


# changes to a checkpoint's config, by the place that the error names
HARMFUL = {
    "model.teacher_config": lambda config, evil: distilling(config, f"{evil}/config.py"),
    "teacher_config": lambda config, evil: distilling(config, f"{evil}/teacher.json"),
    "data.val.proposal_file": lambda config, evil: config.data.val.update(proposal_file=f"{evil}/a.pkl"),
    "proposal_file": lambda config, evil: config.data.val.update(proposal_file=f"{evil}/a.yaml"),
    "data.val.datasets.0.ann_file": lambda config, evil: own_data(config, ann_file=f"{evil}/a.pickle"),
    "ann_file": lambda config, evil: own_data(config, ann_file=f"{evil}/a.yml"),
    "data.val.datasets.0.hierarchy_file": lambda config, evil: own_data(config, hierarchy_file=f"{evil}/tree.np"),
    "custom_hooks.0.rfstructure_file": lambda config, evil: receptive_fields(config, f"{evil}/a.pkl"),
    "data.val.pipeline.0.file_client_args.sys_path": lambda config, evil: file_client(config, str(evil)),
    "sys_path": lambda config, evil: file_client(config, str(evil).encode()),
    "evaluation.jsonfile_prefix": lambda config, evil: config.evaluation.update(jsonfile_prefix=f"{evil}/written"),
}


@pytest.mark.parametrize("place", HARMFUL)
def test_a_checkpoint_whose_config_names_code_is_refused(place, checkpoint, experiment, tmp_path):
    trace = tmp_path / "ran"
    harmful_files(tmp_path, trace)
    config = read_resolved(checkpoint / "mmdet_config.py")
    HARMFUL[place](config, tmp_path / "evil")
    write_resolved(config, checkpoint)
    experiment = {**experiment, "data": {"workers": 0}}  # the checkpoint's own paths
    with pytest.raises(UserError, match=rf"mmdet_config.py: \S*{place} names .*Fix: if you trust it, name it in your"):
        evaluated(tmp_path, experiment, checkpoint)
    assert not trace.exists()


def test_a_checkpoint_whose_config_imports_modules_is_refused(checkpoint, experiment, tmp_path):
    harmful_files(tmp_path, tmp_path / "ran")
    config = read_resolved(checkpoint / "mmdet_config.py")
    config.custom_imports = {"imports": ["evil_module"], "allow_failed_imports": False}
    write_resolved(config, checkpoint)
    with pytest.raises(UserError, match=r"custom_imports names evil_module, and a checkpoint imports nothing"):
        evaluated(tmp_path, experiment, checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_hyperparameters_import_modules_is_refused(checkpoint, experiment, tmp_path):
    harmful_files(tmp_path, tmp_path / "ran")
    load_data = json.loads((checkpoint / "load_data.json").read_text())
    load_data["hparams"]["custom_imports"] = ["evil_module.py"]
    (checkpoint / "load_data.json").write_text(json.dumps(load_data))
    with pytest.raises(UserError, match=r"names evil_module.py, and a checkpoint imports nothing"):
        evaluated(tmp_path, experiment, checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def own_neck(tmp_path, monkeypatch) -> Path:
    """A user's config that imports a user's module, which registers a neck."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_necks_of_a_user.py").write_text(
        "from mmdet.models import NECKS\nfrom mmdet.models.necks import FPN\n"
        "@NECKS.register_module(force=True)\nclass OwnNeck(FPN):\n    pass\n"
    )
    config = tmp_path / "own_config.py"
    config.write_text(
        f"_base_ = ['{RETINANET}']\ncustom_imports = dict(imports=['own_necks_of_a_user'])\n"
        "model = dict(neck=dict(type='OwnNeck'))\n"
    )
    return config


def test_a_run_whose_config_imports_modules_is_evaluated_by_that_config(own_neck, experiment, train, tmp_path):
    overrides = experiment["hyperparameters"]["config_overrides"]
    own = {**experiment, "hyperparameters": {"config_file": str(own_neck), "config_overrides": overrides}}
    run = train(load_model_def("mmdetection").MMDetectionTrial, own)
    last = run / "checkpoints/last"
    assert "bbox_mAP" in evaluated(tmp_path, own, last)
    with pytest.raises(UserError, match=r"custom_imports: \[own_necks_of_a_user\]") as refused:
        evaluated(tmp_path, experiment, last)
    experiment["hyperparameters"]["custom_imports"] = ["own_necks_of_a_user"]  # as the error says
    assert "own_necks_of_a_user" in str(refused.value)
    assert "bbox_mAP" in evaluated(tmp_path, experiment, last)


def detecting(checkpoint: Path, **own):
    """The config that evaluates a checkpoint, with the user's own hyperparameters."""
    hparams = load_model_def("mmdetection").MMDetectionTrial.hyperparameters_of_checkpoint(checkpoint, own)
    return load_mmdet_config(MMDetectionHyperparameters(**hparams), MMDETECTION)


def test_pickled_proposals_come_from_the_user_s_own_config_alone(tmp_path):
    own = {"config_file": "fast_rcnn/fast_rcnn_r50_fpn_1x_coco.py"}
    write_resolved(load_mmdet_config(MMDetectionHyperparameters(**own), MMDETECTION), tmp_path)
    assert detecting(tmp_path, **own).data.val.proposal_file.endswith("rpn_r50_fpn_1x_val2017.pkl")
    with pytest.raises(UserError, match=r"data.train.proposal_file names .*pkl"):
        detecting(tmp_path, config_file=RETINANET)
    given = {f"data.{split}.proposal_file": "mine.pkl" for split in ("train", "val", "test")}
    config = detecting(tmp_path, config_file=RETINANET, config_overrides={**given, "optimizer.lr": 0.1})
    assert config.data.val.proposal_file == "mine.pkl"
    assert config.optimizer.lr == 0.02  # what names no code is the checkpoint's


def test_a_teacher_is_in_the_saved_config_without_its_python_file(tmp_path):
    teacher = tmp_path / "teacher.py"
    teacher.write_text("_base_ = ['gfl/gfl_r50_fpn_1x_coco.py']\n")
    overrides = {"model.teacher_config": str(teacher)}
    hparams = MMDetectionHyperparameters("ld/ld_r18_gflv1_r101_fpn_coco_1x.py", config_overrides=overrides)
    write_resolved(load_mmdet_config(hparams, MMDETECTION), tmp_path)
    assert "teacher.py" not in (tmp_path / "mmdet_config.py").read_text()
    teacher.unlink()
    config = detecting(tmp_path)
    without_pretrained_backbone(config)
    without_teacher_weights(config)
    with torch.device("meta"):
        assert build_model(config, initialize=False).teacher_model.backbone.depth == 50


def test_an_older_checkpoint_may_name_a_teacher_that_mmdet_ships(tmp_path, monkeypatch):
    config = load_mmdet_config(MMDetectionHyperparameters("ld/ld_r18_gflv1_r101_fpn_coco_1x.py"), MMDETECTION)
    config.model.teacher_config = TEACHER
    write_resolved(config, tmp_path)
    # a file of that name where the command is started is not it
    monkeypatch.chdir(tmp_path)
    (tmp_path / TEACHER).parent.mkdir(parents=True)
    (tmp_path / TEACHER).write_text(EXECUTES.format(str(tmp_path / "ran")))
    assert detecting(tmp_path).model.teacher_config.model.backbone.depth == 101
    assert not (tmp_path / "ran").exists()


def test_weights_that_a_checkpoint_s_config_names_are_not_read(checkpoint):
    config = read_resolved(checkpoint / "mmdet_config.py")
    pretrained = {"type": "Pretrained", "checkpoint": "nowhere.pth"}
    config.model.backbone.init_cfg = pretrained
    config.model.neck.init_cfg = {"type": "Xavier", "layer": "Conv2d", "override": {"name": "fpn_convs", **pretrained}}
    without_pretrained_backbone(config)
    build_model(config, initialize=True)


def test_a_backbone_s_weights_by_two_urls_of_one_name_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    urls = {}
    for name in ("a", "b"):
        (tmp_path / "web" / name).mkdir(parents=True)
        torch.save({"name": name}, tmp_path / "web" / name / "backbone.pth")
    with http_store(tmp_path / "web") as server:
        urls = {name: f"{server}/{name}/backbone.pth" for name in ("a", "b")}
        found = {name: CheckpointLoader.load_checkpoint(url, "cpu")["name"] for name, url in urls.items()}
        assert found == {"a": "a", "b": "b"}
        # by name, as torchvision://, open-mmlab:// and mmcls:// are
        monkeypatch.setattr("mmcv.runner.checkpoint.get_torchvision_models", lambda: {"resnet18": urls["b"]})
        assert CheckpointLoader.load_checkpoint("torchvision://resnet18", "cpu")["name"] == "b"


@pytest.mark.parametrize("version", ["2.3.1", torch.__version__])
def test_a_backbone_s_weights_with_code_are_refused_on_any_torch(tmp_path, monkeypatch, version):
    torch.save({"a": Harmful(tmp_path / "ran")}, tmp_path / "backbone.pth")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(UserError, match=r"backbone.pth cannot be read as weights"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "backbone.pth"), "cpu")
    assert not (tmp_path / "ran").exists()
