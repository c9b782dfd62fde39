"""Each config that MMDetection ships gives the same here as in the library."""

import contextlib
import copy
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from every_config import check_every_config, groups_of, parameters_of
from mmcv import Config
from mmcv.parallel import DataContainer
from mmcv.runner import Fp16OptimizerHook, build_optimizer, build_runner
from mmcv.runner.hooks import LrUpdaterHook
from mmcv.runner.hooks.momentum_updater import MomentumUpdaterHook
from mmdet.datasets import DATASETS, build_dataset
from mmdet.models import build_detector
from mmdet.utils import compat_cfg, rfnext_init_model
from tiny_experiment import load_model_def
from tiny_formats import (
    write_coco,
    write_open_images,
    write_panoptic,
    write_pictures,
    write_proposals,
    write_semantic,
    write_xml,
)

from mmdetection_files.config import load_mmdet_config
from mmdetection_files.config_keys import shipped_configs
from mmdetection_files.model import without_pretrained_backbone, without_teacher_weights
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.experiment import parse_data
from shared.config.schema import parse_section
from shared.data.dataset import BadImages, SampleKey, seed_all
from shared.errors import UserError

BATCHES = 5  # an epoch
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
OTHER_TASKS: dict[str, str] = {}
FOLDER: Path
MMDetectionTrial = load_model_def("mmdetection").MMDetectionTrial


def prepare(folder: Path) -> None:
    global FOLDER
    FOLDER = folder
    (folder / "repository").mkdir()
    (folder / "repository/configs").symlink_to(shipped_configs())


def config_files() -> list[str]:
    """The whole configs, which have a model and data, and those that cannot be read."""
    folder = shipped_configs()
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*.py")))
    return [name for name in names if not name.startswith(("_base_/", "common/"))]


# --- data -------------------------------------------------------------------------------------------


@functools.cache
def _paths_for(kind: str, classes: tuple[str, ...] | None) -> dict[str, str]:
    """A tiny data set of that kind. Returns the arguments that name its files."""
    folder = FOLDER / f"{kind}-{len(list(FOLDER.iterdir()))}"
    if kind in ("VOCDataset", "WIDERFaceDataset"):
        names = DATASETS.get(kind).CLASSES
        folder = folder / "VOC2007"
        listing = write_xml(folder, names, "JPEGImages" if kind == "VOCDataset" else "pictures")
        return {"ann_file": str(listing), "img_prefix": str(folder)}
    if kind.startswith("OpenImages"):
        return write_open_images(folder, 500 if "Challenge" in kind else 601, "Challenge" in kind)
    annotations = write_pictures(folder / "images")
    write_coco(folder / "instances.json", classes or DATASETS.get(kind).CLASSES, annotations)
    write_semantic(folder / "semantic")
    write_proposals(folder / "proposals.pkl")
    paths = {
        "ann_file": str(folder / "instances.json"),
        "img_prefix": str(folder / "images"),
        "seg_prefix": str(folder / "semantic"),
        "proposal_file": str(folder / "proposals.pkl"),
    }
    if kind == "CocoPanopticDataset":
        data_set = DATASETS.get(kind)
        write_panoptic(folder / "panoptic.json", folder / "panoptic", data_set.THING_CLASSES, data_set.STUFF_CLASSES)
        ours = {"ann_file": str(folder / "panoptic.json"), "seg_prefix": str(folder / "panoptic")}
        return {**paths, **ours, "ins_ann_file": str(folder / "instances.json")}
    return paths


def _leaves(section: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The innermost data sets of a config, each with its dotted key."""
    if isinstance(section, (list, tuple)):
        for i, part in enumerate(section):
            yield from _leaves(part, f"{path}.{i}")
    elif "datasets" in section:
        yield from _leaves(section["datasets"], f"{path}.datasets")
    elif "dataset" in section:
        yield from _leaves(section["dataset"], f"{path}.dataset")
    else:
        yield path, section


def _options(config: Config, classes: tuple[str, ...] | None = None) -> dict[str, dict[str, Any]]:
    """Dotted keys and paths of a tiny data set, for train and val."""
    options: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for split, of_split in options.items():
        for path, leaf in _leaves(config.data[split], f"data.{split}"):
            names = leaf.get("classes")
            for key, value in _paths_for(leaf["type"], classes or (tuple(names) if names else None)).items():
                if leaf.get(key):
                    of_split[f"{path}.{key}"] = [value] * len(leaf[key]) if isinstance(leaf[key], list) else value
    return options


# --- upstream ---------------------------------------------------------------------------------------


def load_upstream(state: SimpleNamespace) -> Any:
    state.cfg = Config.fromfile(str(shipped_configs() / state.config))
    # as tools/train.py, and train_detector and build_dataloader after it
    state.cfg = compat_cfg(state.cfg)
    loaded = state.cfg._cfg_dict.to_dict()
    loaded["data"].pop("imgs_per_gpu", None)  # samples_per_gpu is the same
    return loaded


def data_upstream(state: SimpleNamespace) -> None:
    options = _options(state.cfg)
    state.cfg.merge_from_dict({**options["train"], **options["val"]})


def _without_weights(section: Any) -> None:
    if isinstance(section, dict):
        init = section.get("init_cfg")
        if isinstance(init, dict) and (init.get("type") == "Pretrained" or "checkpoint" in init):
            section["init_cfg"] = None
        for key in ("pretrained", "teacher_ckpt"):
            if section.get(key):
                section[key] = None
    for value in section.values() if isinstance(section, dict) else section:
        if isinstance(value, (dict, list, tuple)):
            _without_weights(value)


@contextlib.contextmanager
def _in_its_repository() -> Iterator[None]:
    """Changes into the folder where MMDetection's tools run, with the `configs` that some configs name."""
    before = os.getcwd()
    os.chdir(FOLDER / "repository")
    try:
        yield
    finally:
        os.chdir(before)


def model_upstream(state: SimpleNamespace) -> Any:
    _without_weights(state.cfg.model)
    cfg = state.cfg
    with _in_its_repository():
        model = build_detector(cfg.model, train_cfg=cfg.get("train_cfg"), test_cfg=cfg.get("test_cfg"))
    model.init_weights()
    rfnext_init_model(model, cfg=cfg)
    state.model = model
    return parameters_of(model)


def optimizer_upstream(state: SimpleNamespace) -> Any:
    state.optimizer = build_optimizer(state.model, state.cfg.optimizer)
    return groups_of(state.optimizer)


class _Loader:
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return BATCHES


def _sampled(cfg: Any) -> list[int]:
    """Batches at which the learning rate is compared."""
    runner, lr = cfg.get("runner") or {}, cfg.get("lr_config") or {}
    if runner.get("type") == "IterBasedRunner":
        steps = lr.get("step", [])
        at = [0, 1, 100, 499, 500, 1000, runner.max_iters - 1]
        return sorted({*at, *(s + d for s in (steps if isinstance(steps, list) else [steps]) for d in (-1, 0))})
    epochs = runner.get("max_epochs") or cfg.get("total_epochs")
    return [epoch * BATCHES + i for epoch in range(epochs) for i in (0, BATCHES - 1)]


def schedule_upstream(state: SimpleNamespace) -> Any:
    cfg, logger = copy.deepcopy(state.cfg), logging.getLogger("upstream")
    with tempfile.TemporaryDirectory() as folder:
        given = {"model": state.model, "optimizer": state.optimizer, "work_dir": folder, "logger": logger, "meta": {}}
        runner = build_runner(cfg.runner, default_args=given)
        runner.timestamp = "now"
        if cfg.get("fp16"):
            optimizer_config = Fp16OptimizerHook(**cfg.optimizer_config, **cfg.fp16, distributed=False)
        else:
            optimizer_config = cfg.optimizer_config
        runner.register_training_hooks(
            cfg.lr_config,
            optimizer_config,
            cfg.checkpoint_config,
            cfg.log_config,
            cfg.get("momentum_config", None),
            custom_hooks_config=cfg.get("custom_hooks", None),
        )
        runner.data_loader, runner.mode = _Loader(SimpleNamespace(CLASSES=None)), "train"
        if cfg.runner.type == "EpochBasedRunner":
            runner._max_iters = runner.max_epochs * BATCHES
        with torch.no_grad():
            runner.call_hook("before_run")
            runner.call_hook("before_epoch")
            by_epoch = cfg.runner.type == "EpochBasedRunner"
            of_rates = [hook for hook in runner.hooks if isinstance(hook, (LrUpdaterHook, MomentumUpdaterHook))]
            rates = []
            for number in _sampled(cfg):
                runner._iter = number
                runner._epoch, runner._inner_iter = divmod(number, BATCHES)
                for hook in of_rates:
                    if by_epoch:
                        hook.before_train_epoch(runner)
                    hook.before_train_iter(runner)
                rates.append([group["lr"] for group in state.optimizer.param_groups[:2]])
    return rates


def _plain(value: Any) -> Any:
    if isinstance(value, DataContainer):
        return _plain(value.data)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "to_ndarray"):  # masks
        return value.to_ndarray()
    return value if isinstance(value, (torch.Tensor, np.ndarray)) else None


def training_sample_upstream(state: SimpleNamespace) -> Any:
    dataset = build_dataset(copy.deepcopy(state.cfg.data.train))
    seed_all(0, 0, 0)
    return _plain(dataset[0])


def evaluation_sample_upstream(state: SimpleNamespace) -> Any:
    section = copy.deepcopy(state.cfg.data.val)
    section.pop("samples_per_gpu", None)  # as train_detector
    return _images(build_dataset(section, {"test_mode": True})[0])


def _images(sample: Any) -> list[Any]:
    """The images of a sample, in the container of ImageToTensor (one per batch) or DefaultFormatBundle (several)."""
    images = _plain(sample["img"])
    return images if isinstance(images, list) else [images]


def written_upstream(state: SimpleNamespace) -> None:
    path = Path(tempfile.mkdtemp(dir=FOLDER)) / "config.py"
    state.cfg.dump(str(path))
    if Config.fromfile(str(path))._cfg_dict.to_dict() != state.cfg._cfg_dict.to_dict():
        raise ValueError("what is read back is another config")


# --- ours -------------------------------------------------------------------------------------------


def _trial(config: str, classes: tuple[str, ...] | None = None) -> MMDetectionTrial:
    """The trial of a user's experiment config, up to the config's resolution."""
    read = Config.fromfile(str(shipped_configs() / config))
    sections, overrides = {}, {}
    for split, options in _options(read, classes).items():
        places = {key.rsplit(".", 1)[0] for key in options}
        (place, *others) = places
        if not others and isinstance(options[f"{place}.ann_file"], str):
            annotations, images = options.pop(f"{place}.ann_file"), options.pop(f"{place}.img_prefix")
            sections[split] = {"annotations": annotations, "images": images}
        overrides.update(options)
    hyperparameters = {"config_file": config, "config_overrides": overrides, "global_batch_size": 2}
    trial = MMDetectionTrial.__new__(MMDetectionTrial)
    trial.hparams = parse_section(hyperparameters, MMDetectionHyperparameters, "hyperparameters")
    trial.data = parse_data({"data": {**sections, "workers": 0}}, MMDetectionData)
    trial.context = SimpleNamespace(device=torch.device("cpu"))
    trial.bad_images, trial.seed, trial.for_training, trial.first_batch = BadImages(), 0, True, 0
    trial.aggregation_frequency, trial.mode_switch, trial.plain_model = 1, None, torch.nn.Module()
    trial.slots, trial.train_samples = 1, None
    trial.read_own_config()
    trial.hparams.weights = None  # the config's load_from, which is not downloaded here
    return trial


def load_ours(state: SimpleNamespace) -> Any:
    hparams = MMDetectionHyperparameters(config_file=state.config)
    return load_mmdet_config(hparams, FOLDER)._cfg_dict.to_dict()


def data_ours(state: SimpleNamespace) -> None:
    state.trial = _trial(state.config)
    without_pretrained_backbone(state.trial.mmdet_config)
    without_teacher_weights(state.trial.mmdet_config)


def _known_categories(trial: MMDetectionTrial) -> list[dict]:
    """The data's categories, or as many as the data set has if its package is missing."""
    try:
        return trial.open_val().categories
    except UserError:
        names = DATASETS.get(next(_leaves(trial.mmdet_config.data.val, ""))[1]["type"]).CLASSES or []
        return [{"id": i + 1, "name": name} for i, name in enumerate(names)]


def model_ours(state: SimpleNamespace) -> Any:
    trial = state.trial
    trial.categories = _known_categories(trial)
    trial.plain_model = trial.build_model()
    return parameters_of(trial.plain_model)


def optimizer_ours(state: SimpleNamespace) -> Any:
    state.trial.optimizer = state.trial.build_optimizer(state.trial.plain_model)
    return groups_of(state.trial.optimizer)


def schedule_ours(state: SimpleNamespace) -> Any:
    trial = state.trial
    length = trial.default_lengths()["searcher.max_length"]
    trial.batches_per_epoch = BATCHES
    trial.total_batches = length.count * (BATCHES if length.unit == "epochs" else 1)
    trial.build_ema(trial.plain_model)
    trial.prepare_schedule()
    rates = []
    for number in _sampled(trial.mmdet_config):
        trial.before_batch(number)
        rates.append([group["lr"] for group in trial.optimizer.param_groups[:2]])
    return rates


def training_sample_ours(state: SimpleNamespace) -> Any:
    state.trial.open_train_and_val()
    sample, _ = state.trial.training_dataset()[SampleKey(0, 0)]
    return _plain(sample)


def evaluation_sample_ours(state: SimpleNamespace) -> Any:
    sample, _ = state.trial.evaluation_dataset(state.trial.open_val())[0]
    return _images(sample)


def written_ours(state: SimpleNamespace) -> None:
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    state.trial.save_own_config(folder)
    saved = MMDetectionTrial.hyperparameters_of_checkpoint(folder, vars(state.trial.hparams))
    read = load_mmdet_config(MMDetectionHyperparameters(**saved), folder)
    if read._cfg_dict.to_dict() != state.trial.mmdet_config._cfg_dict.to_dict():
        raise ValueError("what is read back is another config")


def model_of_3_classes(state: SimpleNamespace) -> None:
    """The user's data has 3 categories, and the number of classes follows."""
    trial = _trial(state.config)
    without_pretrained_backbone(trial.mmdet_config)
    without_teacher_weights(trial.mmdet_config)
    trial.categories = [{"id": i + 1, "name": f"class {i}"} for i in range(3)]
    trial.build_model()


UPSTREAM = {
    "load": load_upstream,
    "data paths": data_upstream,
    "train sample": training_sample_upstream,
    "test sample": evaluation_sample_upstream,
    "model": model_upstream,
    "optimizer": optimizer_upstream,
    "schedule": schedule_upstream,
    "written and read": written_upstream,
}
OURS = {
    "load": load_ours,
    "data paths": data_ours,
    "train sample": training_sample_ours,
    "test sample": evaluation_sample_ours,
    "model": model_ours,
    "optimizer": optimizer_ours,
    "schedule": schedule_ours,
    "written and read": written_ours,
    "model of 3 classes": model_of_3_classes,
}


@pytest.mark.slow
def test_each_shipped_config_is_used_as_mmdetection_uses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path)
    check_every_config(sys.modules[__name__], monkeypatch)
