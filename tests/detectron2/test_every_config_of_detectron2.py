"""Each config that Detectron2 ships gives the same here as in the library."""

import copy
import functools
import json
import pickle
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic_separated
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_FLIP_MAP, COCO_PERSON_KEYPOINT_NAMES
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, BoxMode, Instances
from every_config import check_every_config, groups_of, parameters_of
from omegaconf import DictConfig, OmegaConf
from tiny_experiment import load_model_def
from tiny_formats import PICTURES, coco, write_panoptic, write_pictures, write_semantic

from detectron2_files.config import load_detectron2_config, shipped_configs
from detectron2_hyperparameters import Detectron2Hyperparameters
from shared.config.experiment import parse_data
from shared.config.schema import DataConfig, parse_section
from shared.data.dataset import BadImages, SampleKey, seed_all

STUFF = 54  # classes of the zoo's semantic heads, the first for all things
NEEDS = {
    "data paths": "load",
    "model": "data paths",
    "optimizer": "model",
    "schedule": "optimizer",
    "train sample": "data paths",
    "test sample": "data paths",
    "written and read": "data paths",
    "model of 3 classes": "data paths",
}
OTHER_TASKS = {"Misc/torchvision_imagenet_R_50.py": "classifies images"}
FOLDER: Path
Detectron2Trial = load_model_def("detectron2").Detectron2Trial


def prepare(folder: Path) -> None:
    global FOLDER
    FOLDER = folder


def config_files() -> list[str]:
    """All configs of the zoo except the parts of Python configs."""
    folder = shipped_configs()
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.suffix in (".yaml", ".py"))
    return [name for name in names if not name.startswith("common/") and name not in OTHER_TASKS]


# --- data -------------------------------------------------------------------------------------------


@dataclass
class TinyData:
    """A registered data set. `annotations` are COCO's, or None for semantic and panoptic data."""

    name: str
    images: Path
    annotations: Path | None
    proposals: Path


@functools.cache
def _tiny_data(classes: int, keypoints: bool, segments: str) -> TinyData:
    folder = FOLDER / f"{classes}-{keypoints}-{segments}"
    names = [f"class {i}" for i in range(classes)]
    annotations = write_pictures(folder / "images")
    content = coco(names, annotations)
    if keypoints:
        for annotation in content["annotations"]:
            x, y, *_ = annotation["bbox"]
            annotation.update(keypoints=[v for i in range(17) for v in (x + i, y + i, 2)], num_keypoints=17)
        for category in content["categories"]:
            category.update(keypoints=list(COCO_PERSON_KEYPOINT_NAMES), skeleton=[])
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    proposals = folder / "proposals.pkl"
    boxes = [np.array([[10, 10, 90, 90], [20, 30, 60, 70]], dtype=np.float32)] * PICTURES
    logits = [np.array([0.9, 0.8], dtype=np.float32)] * PICTURES
    ids = list(range(1, PICTURES + 1))
    proposals.write_bytes(
        pickle.dumps({"boxes": boxes, "objectness_logits": logits, "ids": ids, "bbox_mode": BoxMode.XYXY_ABS})
    )
    name = f"tiny_{folder.name}"
    if segments:
        write_semantic(folder / "semantic", STUFF)
        stuff = ["things", *(f"stuff {i}" for i in range(STUFF - 1))]
        write_panoptic(folder / "panoptic.json", folder / "panoptic", names, stuff[1:])
        metadata = {
            "thing_classes": names,
            "stuff_classes": stuff,
            "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(classes)},
            "stuff_dataset_id_to_contiguous_id": {i: i for i in range(STUFF)},
        }
        places = [folder / part for part in ("images", "panoptic", "panoptic.json", "semantic", "instances.json")]
        register_coco_panoptic_separated(name, metadata, *map(str, places))
        return TinyData(f"{name}_{segments}", folder / "images", None, proposals)
    register_coco_instances(name, {}, str(path), str(folder / "images"))
    if keypoints:
        flips = [(a, b) for a, b in COCO_PERSON_KEYPOINT_FLIP_MAP]
        MetadataCatalog.get(name).set(keypoint_names=COCO_PERSON_KEYPOINT_NAMES, keypoint_flip_map=flips)
    return TinyData(name, folder / "images", path, proposals)


def _class_counts(node: Any) -> Iterator[int]:
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        value = node[key]
        if key == "num_classes" and isinstance(value, int) and value != STUFF:
            yield value
        elif OmegaConf.is_config(value):
            yield from _class_counts(value)


def _data_of(cfg: Any, classes: int | None = None) -> TinyData:
    """Tiny data for a config, with the config's number of classes or the given ones."""
    if isinstance(cfg, CfgNode):
        is_retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        count = cfg.MODEL.RETINANET.NUM_CLASSES if is_retinanet else cfg.MODEL.ROI_HEADS.NUM_CLASSES
        names, keypoints = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.MODEL.KEYPOINT_ON
    else:
        names = cfg.dataloader.train.dataset.names
        names = [names] if isinstance(names, str) else names
        keypoints = "keypoint" in str(names)
        count = next(_class_counts(cfg.model), 80)
    segments = next((kind for kind in ("separated", "stuffonly") if any(kind in name for name in names)), "")
    return _tiny_data(classes or count, bool(keypoints), segments)


# --- upstream ---------------------------------------------------------------------------------------


def load_upstream(state: SimpleNamespace) -> None:
    path = shipped_configs() / state.config
    if path.suffix == ".py":
        state.cfg = LazyConfig.load(str(path))
    else:
        state.cfg = get_cfg()
        state.cfg.merge_from_file(str(path))


def data_upstream(state: SimpleNamespace) -> None:
    cfg = state.cfg
    state.data = _data_of(cfg)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (state.data.name,)
        if cfg.MODEL.LOAD_PROPOSALS:
            cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(state.data.proposals),)
    else:
        cfg.train.init_checkpoint = ""
        for loader in (cfg.dataloader.train, cfg.dataloader.test):
            loader.dataset.names = state.data.name
        if "detector" in cfg.model:  # MMDetection's
            cfg.model.detector.pretrained = None


def model_upstream(state: SimpleNamespace) -> Any:
    state.model = build_model(state.cfg) if isinstance(state.cfg, CfgNode) else instantiate(state.cfg.model)
    return parameters_of(state.model)


def optimizer_upstream(state: SimpleNamespace) -> Any:
    if isinstance(state.cfg, CfgNode):
        state.optimizer = build_optimizer(state.cfg, state.model)
    else:
        state.cfg.optimizer.params.model = state.model
        state.optimizer = instantiate(state.cfg.optimizer)
    return _plain_groups(state.optimizer)


def _plain_groups(optimizer: torch.optim.Optimizer) -> Any:
    name, groups = groups_of(optimizer)
    return name, [{k: list(v) if k == "betas" else v for k, v in group.items()} for group in groups]


def _rates(scheduler: Any, length: int) -> list[list[float]]:
    rates = []
    for number in range(0, length, max(length // 200, 1)):
        scheduler.last_epoch = number
        rates.append(list(scheduler.get_lr())[:2])
    return rates


def schedule_upstream(state: SimpleNamespace) -> Any:
    if isinstance(state.cfg, CfgNode):
        return _rates(build_lr_scheduler(state.cfg, state.optimizer), state.cfg.SOLVER.MAX_ITER)
    length = state.cfg.train.max_iter
    return _rates(LRMultiplier(state.optimizer, instantiate(state.cfg.lr_multiplier), length), length)


def training_sample_upstream(state: SimpleNamespace) -> Any:
    cfg = state.cfg
    if isinstance(cfg, CfgNode):
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        mapper = DatasetMapper(cfg, is_train=True)
    else:
        dicts, mapper = instantiate(cfg.dataloader.train.dataset), instantiate(cfg.dataloader.train.mapper)
    seed_all(0, 0, 0)
    return _plain(mapper(dicts[0]))


def evaluation_sample_upstream(state: SimpleNamespace) -> Any:
    cfg = state.cfg
    if isinstance(cfg, CfgNode):
        proposals = cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else None
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False, proposal_files=proposals)
        mapper = DatasetMapper(cfg, is_train=False)
    else:
        dicts, mapper = instantiate(cfg.dataloader.test.dataset), instantiate(cfg.dataloader.test.mapper)
    return _plain(mapper(dicts[0]))


def _plain(value: Any) -> Any:
    if isinstance(value, Instances):
        return {"size": list(value.image_size), **{k: _plain(v) for k, v in value.get_fields().items()}}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Boxes) or (hasattr(value, "tensor") and isinstance(value.tensor, torch.Tensor)):
        return value.tensor
    if hasattr(value, "polygons"):
        return [list(of_one) for of_one in value.polygons]
    return value if isinstance(value, (torch.Tensor, np.ndarray)) else None


def written_upstream(state: SimpleNamespace) -> None:
    cfg = state.cfg
    path = Path(tempfile.mkdtemp(dir=FOLDER)) / "config.yaml"
    if isinstance(cfg, CfgNode):
        path.write_text(cfg.dump())
        read = get_cfg()
        read.merge_from_file(str(path))
        if yaml.safe_load(read.dump()) != yaml.safe_load(cfg.dump()):
            raise ValueError("what is read back is another config")
        return
    LazyConfig.save(cfg, str(path))
    read = LazyConfig.load(str(path))
    _check_parameters(cfg, read)
    again = path.with_name("again.yaml")
    LazyConfig.save(read, str(again))
    if path.read_text() != again.read_text():
        raise ValueError("what is read back is another config")


def _check_parameters(cfg: DictConfig, read: DictConfig) -> None:
    """A function in a LazyConfig may be its name in the file, so the two models must be equal."""
    one, other = (parameters_of(instantiate(copy.deepcopy(c.model))) for c in (cfg, read))
    if one != other:
        raise ValueError("what is read back makes another model")


# --- ours -------------------------------------------------------------------------------------------


def _trial(config: str, classes: int | None = None) -> Detectron2Trial:
    """The trial of a user's experiment config, up to the config's resolution."""
    read = load_detectron2_config(Detectron2Hyperparameters(config_file=config), FOLDER)
    data, cfg = _data_of(read.cfg, classes), read.cfg
    overrides: dict[str, Any] = {}
    sections = {}
    if data.annotations is None:
        keys = ("DATASETS.TRAIN", "DATASETS.TEST")
        if not isinstance(cfg, CfgNode):
            keys = ("dataloader.train.dataset.names", "dataloader.test.dataset.names")
        overrides.update({key: [data.name] for key in keys})
    else:
        paths = {"annotations": str(data.annotations), "images": str(data.images)}
        sections = {"train": paths, "val": paths}
    if isinstance(cfg, CfgNode) and cfg.MODEL.LOAD_PROPOSALS:
        overrides.update({f"DATASETS.PROPOSAL_FILES_{split}": [str(data.proposals)] for split in ("TRAIN", "TEST")})
    if not isinstance(cfg, CfgNode) and "detector" in cfg.model:
        overrides["model.detector.pretrained"] = None
    hyperparameters = {"config_file": config, "config_overrides": overrides, "weights": ""}
    trial = Detectron2Trial.__new__(Detectron2Trial)
    trial.hparams = parse_section(hyperparameters, Detectron2Hyperparameters, "hyperparameters")
    trial.data = parse_data({"data": {**sections, "workers": 0}}, DataConfig)
    trial.context = SimpleNamespace(device=torch.device("cpu"))
    trial.bad_images, trial.seed, trial.for_training, trial.first_batch = BadImages(), 0, True, 0
    trial.read_own_config()
    return trial


def load_ours(state: SimpleNamespace) -> None:
    load_detectron2_config(Detectron2Hyperparameters(config_file=state.config), FOLDER)


def data_ours(state: SimpleNamespace) -> None:
    state.trial = _trial(state.config)
    state.trial.train_data, state.trial.val_data = state.trial.open_train_and_val()
    state.trial.categories = state.trial.train_data.categories


def model_ours(state: SimpleNamespace) -> Any:
    trial = state.trial
    trial.plain_model = trial.build_model()
    return parameters_of(trial.plain_model)


def optimizer_ours(state: SimpleNamespace) -> Any:
    state.trial.optimizer = state.trial.build_optimizer(state.trial.plain_model)
    return _plain_groups(state.trial.optimizer)


def schedule_ours(state: SimpleNamespace) -> Any:
    trial = state.trial
    trial.total_batches = trial.default_lengths()["searcher.max_length"].count
    trial.prepare_schedule()
    rates = []
    for number in range(0, trial.total_batches, max(trial.total_batches // 200, 1)):
        trial.before_batch(number)
        rates.append([group["lr"] for group in trial.optimizer.param_groups[:2]])
    return rates


def training_sample_ours(state: SimpleNamespace) -> Any:
    return _plain(state.trial.training_dataset()[SampleKey(0, 0)])


def evaluation_sample_ours(state: SimpleNamespace) -> Any:
    return _plain(state.trial.evaluation_dataset(state.trial.val_data)[0])


def written_ours(state: SimpleNamespace) -> None:
    folder, again = (Path(tempfile.mkdtemp(dir=FOLDER)) for _ in range(2))
    state.trial.save_own_config(folder)
    saved = Detectron2Trial.hyperparameters_of_checkpoint(folder, vars(state.trial.hparams))
    read, written = load_detectron2_config(Detectron2Hyperparameters(**saved), FOLDER), state.trial.detectron2_config
    if not isinstance(written.cfg, CfgNode):
        _check_parameters(written.cfg, read.cfg)
    read.write(again)
    one, other = ((place / written.resolved_name).read_text() for place in (folder, again))
    if yaml.safe_load(one) != yaml.safe_load(other):
        raise ValueError("what is read back is another config")


def model_of_3_classes(state: SimpleNamespace) -> None:
    """The user's data has 3 categories. The number of classes follows if the config has COCO's."""
    trial = _trial(state.config, 3)
    trial.train_data, trial.val_data = trial.open_train_and_val()
    trial.categories = trial.train_data.categories
    trial.build_model()


UPSTREAM = {
    "load": load_upstream,
    "data paths": data_upstream,
    "written and read": written_upstream,
    "train sample": training_sample_upstream,
    "test sample": evaluation_sample_upstream,
    "model": model_upstream,
    "optimizer": optimizer_upstream,
    "schedule": schedule_upstream,
}
OURS = {
    "load": load_ours,
    "data paths": data_ours,
    "written and read": written_ours,
    "train sample": training_sample_ours,
    "test sample": evaluation_sample_ours,
    "model": model_ours,
    "optimizer": optimizer_ours,
    "schedule": schedule_ours,
    "model of 3 classes": model_of_3_classes,
}


@pytest.mark.slow
def test_each_shipped_config_is_used_as_detectron2_uses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path)
    check_every_config(sys.modules[__name__], monkeypatch)
