"""`hyperparameters.class_weights` changes only the classification loss of each detector."""

import numpy as np
import pytest
import torch
from conftest import WITHOUT_LIBRARY
from tiny_detr import detr_config
from tiny_mmdetection import RETINANET, mmdet_config
from tiny_models import TINY_DETECTORS, efficientdet_config, trial_classes

from shared.data.dataset import seed_all
from shared.data.loading import to_device
from shared.errors import UserError
from shared.training.switches import class_weights, weights_of

NAMES = ("rectangle", "circle", "triangle")
# the detector, its config and the terms of the loss that weights change
MODELS = {
    f"{detector} {model}".strip(): (detector, make, terms)
    for detector, tiny in TINY_DETECTORS.items()
    for model, (make, terms) in tiny.WEIGHTED_LOSSES.items()
}


@pytest.fixture
def losses(shapes, unbuilt):
    """The losses of a model's first training batch with these weights; and the trial."""

    def of(detector, make, weights):
        config = make(shapes)
        config["data"]["workers"] = 0
        config["hyperparameters"]["class_weights"] = weights
        trial = unbuilt(trial_classes()[detector], config)
        trial.open_data()
        trial.build()
        trial.plain_model.train()
        trial.begin_training(shapes / "unused")
        batch = trial.prepare(to_device(next(iter(trial.training_batch_loader())), torch.device("cpu")), 0)
        seed_all(7)
        found = trial.losses(trial.model, batch)
        return {name: float(value) for name, value in found.items() if value.numel() == 1}, trial

    return of


@pytest.mark.parametrize(
    "name", [name if name == "efficientdet" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_weight_multiplies_the_class_loss_of_its_objects(losses, name):
    detector, make, terms = MODELS[name]
    if detector in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[detector])
    plain, _ = losses(detector, make, None)
    assert losses(detector, make, dict.fromkeys(NAMES, 1.0))[0] == plain
    by_category = {}
    for category in NAMES:
        doubled, _ = losses(detector, make, {category: 2.0})
        changed = [key for key in plain if doubled[key] != pytest.approx(plain[key], rel=1e-4)]
        assert set(changed) <= {"loss", *terms}
        by_category[category] = sum(doubled[term] - plain[term] for term in terms)
    tripled, _ = losses(detector, make, dict.fromkeys(NAMES, 3.0))
    difference = sum(tripled[term] - plain[term] for term in terms)
    assert difference > 0
    assert difference == pytest.approx(2 * sum(by_category.values()), rel=1e-3)


@pytest.mark.slow
def test_the_softmax_of_detr_weighs_queries_by_category(losses):
    def make(shapes):
        return detr_config(shapes, "detr")

    if "detr" in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY["detr"])
    plain, _ = losses("detr", make, None)
    heavy, _ = losses("detr", make, dict.fromkeys(NAMES, 1000.0))
    assert heavy["loss_ce"] != pytest.approx(plain["loss_ce"], rel=1e-3)
    assert heavy["loss_bbox"] == pytest.approx(plain["loss_bbox"])


def test_balanced_weights_make_all_categories_count_the_same(losses):
    _, trial = losses("efficientdet", efficientdet_config, "balanced")
    counts = np.bincount(trial.training_labels()[1], minlength=3)
    totals = trial.class_weights.numpy() * counts
    assert totals == pytest.approx([counts.sum() / 3] * 3)


def test_a_category_without_objects_has_the_weight_one():
    categories = [{"name": name} for name in NAMES]
    assert class_weights("balanced", categories, np.array([0, 0, 0, 2])).tolist() == pytest.approx([2 / 3, 1, 2])
    assert class_weights("balanced", categories, np.array([0, 1, 2])) is None
    weights = torch.tensor([2.0, 3.0])
    assert weights_of(torch.tensor([[0, 1], [-1, 2]]), weights).tolist() == [[2, 3], [1, 1]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"circel": 2.0}, r"hyperparameters\.class_weights: 'circel' is not a category of data\.train.*circle"),
        ({"circle": 0.0}, r"hyperparameters\.class_weights\.circle: it is 0\. Fix: give a number above 0"),
        ({"circle": "many"}, r"hyperparameters\.class_weights"),
        ("balancd", r"hyperparameters\.class_weights"),
    ],
)
def test_wrong_weights_are_one_line_that_names_the_key(losses, weights, message):
    with pytest.raises(UserError, match=message):
        losses("efficientdet", efficientdet_config, weights)


@pytest.mark.slow
def test_a_loss_that_takes_no_weights_is_refused_by_name(losses):
    def make(shapes):
        changes = {"model.bbox_head.loss_cls": {"_delete_": True, "type": "GHMC", "bins": 10, "use_sigmoid": True}}
        return mmdet_config(shapes, RETINANET, **changes)

    if "mmdetection" in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY["mmdetection"])
    with pytest.raises(UserError, match=r"class_weights: GHMC of the config .* Fix: remove it, or repeat images"):
        losses("mmdetection", make, {"circle": 2.0})


def test_a_detector_without_weights_is_refused(losses, monkeypatch):
    monkeypatch.setattr(trial_classes()["efficientdet"], "weighs_categories", False)
    with pytest.raises(UserError, match=r"hyperparameters\.class_weights: this detector takes no weights"):
        losses("efficientdet", efficientdet_config, {"circle": 2.0})
