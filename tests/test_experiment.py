"""The experiment config: its values, and errors that name the key."""

import dataclasses
from dataclasses import dataclass

import pytest

from detectron2_hyperparameters import Detectron2Hyperparameters
from efficientdet_hyperparameters import EfficientDetHyperparameters
from mmdetection_hyperparameters import MMDetectionData, MMDetectionHyperparameters
from shared.config.experiment import (
    Sections,
    experiment_of,
    parse_data,
    parse_schedule,
    per_slot_batch_size,
    read_experiment,
)
from shared.config.file import fixed_hyperparameters, interpolated, load_config
from shared.config.schema import DataConfig, EarlyStopping, Length, SearcherMetric, Split, parse_section
from shared.errors import UserError


@dataclass
class Hparams:
    lr: float = 0.1
    opt: str = "sgd"
    size: int | None = None


def config(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides, {})


def searcher_metric(**searcher):
    """The metric of a config with this `searcher` section."""
    return experiment_of({"searcher": searcher}, {}, Sections(), with_hyperparameters=False).searcher_metric(None)


def test_overrides_win(tmp_path):
    loaded = config(tmp_path, "hyperparameters: {lr: 1, opt: sgd}", "hyperparameters.lr=0.5", "data.workers=0")
    assert loaded == {"hyperparameters": {"lr": 0.5, "opt": "sgd"}, "data": {"workers": 0}}


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"hyperparameters: unknown key 'optt'; did you mean 'opt'\?"):
        parse_section({"optt": "sgd"}, Hparams, "hyperparameters")


def test_an_unknown_key_at_the_top_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown key 'hyperparameter'; did you mean 'hyperparameters'"):
        config(tmp_path, "hyperparameter: {}")


def test_a_wrong_type_names_the_key():
    with pytest.raises(UserError, match=r"hyperparameters\.lr: Expected `float`, got `str`"):
        parse_section({"lr": "fast"}, Hparams, "hyperparameters")


def test_a_searched_key_off_the_cluster_is_named():
    searched = {"hyperparameters": {"lr": {"type": "log", "minval": -4, "maxval": -1}, "opt": "sgd"}}
    with pytest.raises(UserError, match=r"--set hyperparameters\.lr="):
        fixed_hyperparameters(searched)


def test_a_const_is_its_value():
    assert fixed_hyperparameters({"hyperparameters": {"lr": {"type": "const", "val": 2}}}) == {"lr": 2}


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml", (), {})
    with pytest.raises(UserError, match=r"c\.yaml is not YAML"):
        config(tmp_path, "a: [")


def test_aliases_that_multiply_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match=r"c\.yaml: its aliases make more than 100,000 values"):
        config(tmp_path, "\n".join(lines))


def test_data_keys_are_checked():
    with pytest.raises(UserError, match=r"data\.train: unknown key 'annotation'; did you mean 'annotations'"):
        parse_data({"data": {"train": {"annotation": "x", "images": "y"}}})
    with pytest.raises(UserError, match=r"data\.train\.images is missing"):
        parse_data({"data": {"train": {"annotations": "x"}}})
    with pytest.raises(UserError, match=r"data\.backend: 'dsk' .* did you mean 'disk'"):
        parse_data({"data": {"backend": "dsk"}})


def test_lengths():
    schedule = parse_schedule(
        {"searcher": {"max_length": {"epochs": 3}}, "min_validation_period": {"records": 100}, "scheduling_unit": 7}
    )
    assert schedule.max_length == Length("epochs", 3)
    assert schedule.max_length.batches(batches_per_epoch=5, global_batch_size=8) == 15
    assert schedule.validation_period.batches(5, 8) == 12
    assert schedule.reporting_batches == 7


def test_a_period_of_0_is_one_that_is_not_given():
    # as the master fills it in
    config = {"searcher": {"max_length": {"epochs": 3}}, "min_validation_period": {"batches": 0}}
    assert parse_schedule(config).validation_period is None
    own = {"min_validation_period": Length("epochs", 1)}
    assert parse_schedule(config).with_defaults(own).validation_period == Length("epochs", 1)
    with pytest.raises(UserError, match=r"min_checkpoint_period\.batches: -1 is not a positive whole number"):
        parse_schedule({**config, "min_checkpoint_period": {"batches": -1}})


def test_a_search_s_length_is_its_max_time():
    assert parse_schedule({"searcher": {"time_metric": "batches", "max_time": 50}}).max_length == Length("batches", 50)


@pytest.mark.parametrize("length", [{"batch": 3}, {"batches": 0}, {"batches": "many"}, "long"])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(UserError, match=r"searcher\.max_length"):
        parse_schedule({"searcher": {"max_length": length}})


def test_a_batch_that_does_not_divide_by_the_slots_is_refused():
    assert per_slot_batch_size(12, 4) == 3
    with pytest.raises(UserError, match=r"10 images cannot be divided evenly among 4 slots. Fix: use 8 or 12"):
        per_slot_batch_size(10, 4)


def test_the_worst_value_of_a_metric_is_finite():
    assert SearcherMetric("bbox_mAP", smaller_is_better=False).worst == 0
    assert SearcherMetric("loss", smaller_is_better=True).worst == 1e30


def test_a_value_that_names_a_key_has_its_value_here_and_on_a_cluster():
    config = {"data": {"train": {"images": "/d"}, "val": {"images": "${data.train.images}/val"}}, "labels": ["${HOME}"]}
    config["copy"] = "${data.train}"
    expected = {"train": {"images": "/d"}, "val": {"images": "/d/val"}}
    assert interpolated(config) == {"data": expected, "labels": ["${HOME}"], "copy": {"images": "/d"}}


@pytest.mark.parametrize(
    ("metric", "smaller"),
    [
        *((name, False) for name in ("bbox_mAP", "segm_mAP_50", "bbox_AR_100", "AR@100", "PQ", "sem_seg/mIoU", "AP50")),
        *((name, True) for name in ("loss", "val_loss_bbox", "miss_rate")),
    ],
)
def test_a_metric_knows_which_values_are_better(metric, smaller):
    assert searcher_metric(metric=metric).smaller_is_better is smaller
    with pytest.raises(UserError, match=f"write {str(smaller).lower()}"):
        searcher_metric(metric=metric, smaller_is_better=not smaller)


def test_an_unknown_metric_needs_smaller_is_better():
    with pytest.raises(UserError, match="smaller_is_better: it is missing"):
        searcher_metric(metric="speed")
    assert searcher_metric(metric="speed", smaller_is_better=True).smaller_is_better


@pytest.mark.parametrize(
    "section",
    [
        *(EfficientDetHyperparameters, MMDetectionHyperparameters, Detectron2Hyperparameters, EarlyStopping),
        *(DataConfig, MMDetectionData, Split),
    ],
)
def test_every_key_has_one_line_of_text(section):
    for field in dataclasses.fields(section):
        assert 10 < len(field.metadata["help"]) < 100, field.name
        assert "\n" not in field.metadata["help"]


def test_an_experiment_is_read_once_with_its_paths_and_values(shapes, tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/start.pth").touch()
    path = tmp_path / "beside/c.yaml"
    path.write_text(
        f"data: {{val: {{annotations: {shapes}/annotations/val.json, images: $SHAPES/val}}, backend: disk}}\n"
        "hyperparameters: {lr: 0.5, hang_minutes: 3, pretrained: start.pth}\n"
        "searcher: {max_length: {epochs: 2}, metric: bbox_mAP_50}\n"
        "reproducibility: {experiment_seed: 7}\noptimizations: {aggregation_frequency: 2}\n"
    )
    monkeypatch.setenv("SHAPES", str(shapes))
    experiment = read_experiment(path, ["hyperparameters.lr=0.25"], Sections(EfficientDetHyperparameters))
    assert (experiment.hyperparameters.lr, experiment.hang_minutes) == (0.25, 3)
    assert experiment.hyperparameters.pretrained == str(tmp_path / "beside/start.pth")
    assert experiment.data.val.images == experiment.config["data"]["val"]["images"] == str(shapes / "val")
    assert (experiment.seed, experiment.aggregation_frequency) == (7, 2)
    assert experiment.schedule.with_defaults().max_length == Length("epochs", 2)
    assert experiment.searcher_metric(None) == SearcherMetric("bbox_mAP_50", smaller_is_better=False)


def test_a_master_s_config_gives_the_experiment_of_its_yaml_file(shapes, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {backend: fake}\nhyperparameters: {lr: 0.5}\nsearcher: {max_length: {batches: 2}}\n")
    sections = Sections(EfficientDetHyperparameters)
    here = read_experiment(path, (), sections)
    master = experiment_of(here.config, here.config["hyperparameters"], sections)
    assert (master.hyperparameters, master.data, master.config) == (here.hyperparameters, here.data, here.config)


@pytest.mark.parametrize("name", ["data", "hyperparameters", "searcher"])
def test_a_section_that_is_no_section_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: 5 is not a section"):
        config(tmp_path, f"{name}: 5")


def test_an_unknown_searcher_is_an_error():
    with pytest.raises(UserError, match=r"searcher\.name: 'adaptive_ash' is unknown; did you mean 'adaptive_asha'"):
        searcher_metric(name="adaptive_ash", metric="bbox_mAP")
