"""EfficientDet's model and weights, and training equal to upstream's."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, reports, run_model_def
from determined import pytorch
from effdet.config.model_config import efficientdet_model_param_dict
from PIL import Image
from recording import BOUNDS, both_precisions
from timm.scheduler import create_scheduler_v2
from tiny_models import efficientdet_config

from efficientdet_files.data import EfficientDetTransform
from efficientdet_files.model import build_model, model_config
from efficientdet_hyperparameters import EfficientDetHyperparameters
from model_def import EfficientDetTrial
from shared.data.annotations import CocoAnnotations
from shared.errors import UserError
from shared.library import COCO_CATEGORIES

TINY = {
    "model": "efficientdet_d0",
    "backbone": "mobilenetv3_small_050",
    "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1, "box_class_repeats": 1},
    "pretrained": "none",
    "input_size": 128,
}
COCO_90 = [{"id": i + 1, "name": f"row {i}"} for i in range(90)]


def tiny(**changes):
    return EfficientDetHyperparameters(**{**TINY, **changes})


@pytest.fixture
def trial(shapes):
    def build(**hparams):
        config = efficientdet_config(shapes)
        config["hyperparameters"] = {**config["hyperparameters"], **hparams}
        config["data"]["workers"] = 0
        with pytorch.init(hparams=config["hyperparameters"], exp_conf=config, enable_tensorboard_logging=False) as c:
            return EfficientDetTrial(c)

    return build


def class_scores(bench, labels):
    torch.manual_seed(0)
    features = [torch.rand(1, 16, 128 >> level, 128 >> level) for level in range(3, 8)]
    bench.eval()
    with torch.no_grad():
        outputs = bench.model.class_net(features)
    return [output.unflatten(1, (9, -1))[:, :, labels] for output in outputs]


def test_coco_has_80_categories_with_ids_up_to_90():
    assert len(COCO_CATEGORIES) == 80
    assert COCO_CATEGORIES[0] == {"id": 1, "name": "person"}
    assert COCO_CATEGORIES[-1] == {"id": 90, "name": "toothbrush"}


def test_coco_s_head_of_90_rows_gives_its_rows_by_name_or_id(tmp_path, caplog):
    caplog.set_level("INFO")
    source = build_model(tiny(), COCO_90)
    torch.save(source.model.state_dict(), tmp_path / "coco.pth")
    categories = [{"id": 4, "name": "Dog"}, {"id": 44, "name": "44"}, {"id": 1, "name": "cell"}]
    hparams = tiny(pretrained=str(tmp_path / "coco.pth"))
    model = build_model(hparams, categories)
    # dog is COCO's 18, bottle 44; a cell is no person though it has person's id
    ours, theirs = class_scores(model, [0, 1]), class_scores(source, [17, 43])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert "of 3 categories, 2 take their row of the head" in caplog.text
    assert "1 start anew (cell)" in caplog.text


def test_all_80_coco_categories_keep_their_rows(tmp_path):
    source = build_model(tiny(), COCO_90)
    torch.save({"state_dict": source.model.state_dict()}, tmp_path / "coco.pth")
    model = build_model(tiny(pretrained=str(tmp_path / "coco.pth")), COCO_CATEGORIES)
    rows = [category["id"] - 1 for category in COCO_CATEGORIES]
    for a, b in zip(class_scores(model, list(range(80))), class_scores(source, rows), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_of_ours_is_a_start_by_its_category_names(shapes, train, trial_class, tmp_path, caplog):
    config = efficientdet_config(shapes)
    config["searcher"]["max_length"] = {"batches": 2}
    checkpoint = train(trial_class, config) / "checkpoints/last"
    categories = [{"id": 1, "name": "triangle"}, {"id": 2, "name": "star"}]
    caplog.set_level("INFO")
    model = build_model(tiny(pretrained=str(checkpoint)), categories)
    from shared.training.checkpoints import read_checkpoint

    averaged = read_checkpoint(checkpoint).weights
    bias = "model.class_net.predict.conv_pw.bias"
    assert torch.equal(model.state_dict()[bias].view(9, 2)[:, 0], averaged[bias].view(9, 3)[:, 2])
    assert "1 start anew (star)" in caplog.text


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_in_weights_is_refused_and_not_run(tmp_path):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "bad2.pth")
    for name in ("bad.pth", "bad2.pth"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            build_model(tiny(pretrained=str(tmp_path / name)), COCO_90)
    assert not (tmp_path / "ran").exists()


BACKBONES = {
    "'hf-hub:somebody/model' is not a model of timm": {"backbone_name": "hf-hub:somebody/model"},
    "backbone_args.checkpoint_path is a file that timm may execute": {"backbone_args": {"checkpoint_path": "bad.pth"}},
}


@pytest.mark.parametrize("message", BACKBONES)
def test_a_checkpoint_s_backbone_is_one_of_timm_s_and_reads_no_file(message):
    with pytest.raises(UserError, match=message):
        build_model(tiny(model_config=BACKBONES[message]), COCO_90)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(build_model(tiny(), COCO_90).model.state_dict(), tmp_path / "w.pth")
    other = tiny(pretrained=str(tmp_path / "w.pth"), model_config={"fpn_channels": 24, "fpn_cell_repeats": 1})
    with pytest.raises(UserError, match="holds the weights of another model"):
        build_model(other, COCO_90)


def test_small_inputs_offer_fewer_than_5000_scores():
    assert model_config(tiny(), 1).max_detection_points == (16**2 + 8**2 + 4**2 + 2**2 + 1) * 9


@pytest.mark.parametrize("on_updates", [True, False])
def test_the_learning_rate_is_timm_s(trial, on_updates):
    options = {"warmup_epochs": 1, "warmup_lr": 1e-5, "cooldown_epochs": 0, "min_lr": 1e-4}
    built = trial(sched_on_updates=on_updates, lr_noise=[0.3, 0.9], lr=0.01, **options)
    built.before_batch(0)
    reference, _ = create_scheduler_v2(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01),
        sched="cosine",
        num_epochs=built.total_batches / built.batches_per_epoch,
        noise=[0.3, 0.9],
        noise_pct=0.67,
        noise_std=1.0,
        noise_seed=3,
        step_on_epochs=not on_updates,
        updates_per_epoch=built.batches_per_epoch,
        **options,
    )
    for number in range(12):
        built.before_batch(number)
        if on_updates:
            reference.step_update(number)
        else:
            reference.step(number // built.batches_per_epoch)
        assert built.optimizer.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"]


def test_the_learning_rate_scales_with_the_global_batch(trial):
    assert tiny(lr=0.1, lr_base_batch_size=16, global_batch_size=8).scaled_lr == pytest.approx(0.05)
    assert trial(lr=0.1, lr_base_batch_size=16).scheduler.base_values[0] == pytest.approx(0.025)


def test_the_labeler_in_the_loader_and_on_the_device_give_the_same_loss(trial):
    losses = []
    for labeler in ("loader", "device"):
        built = trial(labeler=labeler)
        batch = next(iter(built.build_training_data_loader()))
        losses.append(built.losses(built.model, batch))
    for name in ("loss", "class_loss", "box_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name])


def test_every_option_trains_together(command, without_figures, trial_class, run_config, tmp_path):
    config = run_config(
        searcher__max_length=4,
        hyperparameters__amp="bf16",
        hyperparameters__labeler="device",
        hyperparameters__random_erasing=0.9,
        hyperparameters__random_erasing_count=2,
        hyperparameters__soft_nms=True,
        hyperparameters__val_skip=3,
        hyperparameters__channels_last=True,
        hyperparameters__label_smoothing=0.1,
        hyperparameters__legacy_focal=False,
        hyperparameters__clip_mode="agc",
        hyperparameters__clip_grad=0.02,
        hyperparameters__fill_color=12,
        hyperparameters__interpolation="bicubic",
        hyperparameters__train_interpolation="bilinear",
        hyperparameters__sched="plateau",
        hyperparameters__sched_on_updates=False,
        hyperparameters__input_size=[128, 256],
        optimizations={"aggregation_frequency": 2},
    )
    command(trial_class, "train", config, "--output-dir", tmp_path / "run")
    assert reports(tmp_path / "run", "train")[-1]["metrics"]["loss"] > 0


@pytest.mark.slow
def test_a_banner_trains_and_validates_at_the_smallest_scale(shapes, run_config, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "banners")
    for split, width, height in (("train", 1200, 20), ("val", 9, 1300)):
        path = folder / f"annotations/{split}.json"
        coco = json.loads(path.read_text())
        coco["images"][0] |= {"width": width, "height": height}
        for annotation in coco["annotations"]:
            if annotation["image_id"] == coco["images"][0]["id"]:
                annotation["bbox"] = [1, 1, width - 4, height - 4]
        path.write_text(json.dumps(coco))
        Image.new("RGB", (width, height), (200, 30, 30)).save(folder / split / coco["images"][0]["file_name"])
    config = run_config(
        data__train={"annotations": str(folder / "annotations/train.json"), "images": str(folder / "train")},
        data__val={"annotations": str(folder / "annotations/val.json"), "images": str(folder / "val")},
        hyperparameters__scale_jitter=[0.1, 0.12],
        searcher__max_length={"epochs": 1},
    )
    run_model_def("train", config, "--output-dir", tmp_path / "run")
    assert {report["split"] for report in reports(tmp_path / "run")} == {"train", "val"}


def test_a_banner_keeps_its_pixels_and_boxes():
    hparams, inputs = tiny(scale_jitter=[0.1, 0.1]), {"input_size": (3, 128, 128), "fill_color": (0, 0, 0)}
    record = CocoAnnotations.from_dict(
        {
            "images": [{"id": 1, "file_name": "a.png", "width": 2560, "height": 10}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2560, 10]}],
            "categories": [{"id": 1, "name": "banner"}],
        }
    )[0]
    inputs["interpolation"] = "bilinear"
    image, target, _ = EfficientDetTransform(hparams, inputs, training=True)(
        Image.new("RGB", (2560, 10), "red"), record
    )
    assert image[0, 0, :12].min() > 0
    assert image[0, 1:].max() == image[0, :, 13:].max() == 0
    np.testing.assert_allclose(target["bbox"], [[0, 0, 0.05, 12.8]], atol=0.9)
    image, target, _ = EfficientDetTransform(hparams, inputs, training=False)(
        Image.new("RGB", (2560, 10), "red"), record
    )
    assert image[0, 0].min() > 0
    assert image[0, 1:].max() == 0
    assert target["img_scale"] == 20


def test_val_skip_evaluates_every_nth_image_only(trial):
    built = trial(val_skip=3)
    assert built.evaluator.image_ids.tolist() == [1, 4, 7, 10]
    loader = built.build_validation_data_loader()
    assert [i for batch in loader for i in batch.image_ids] == [1, 4, 7, 10]


STEP_BESIDE_DDP = """
import copy, json, os, sys
sys.path[:0] = [".", "TESTS"]
import torch
from recording import computing_in, in_dtype
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel
import model_def
from shared.launch import main

DTYPE = torch.DTYPE

def largest_difference(ours, theirs):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))

class Probe(model_def.EfficientDetTrial):
    def build_model(self):
        return super().build_model().to(DTYPE)

    def prepare(self, batch, number):
        return in_dtype(super().prepare(batch, number), DTYPE)

    def losses(self, model, batch):
        with computing_in(DTYPE):
            if self.batches_trained == 0:
                self.step_of_upstream(batch)
            losses = super().losses(model, batch)
        assert {value.dtype for value in losses.values()} == {DTYPE}
        return losses

    def step_of_upstream(self, batch):
        # effdet's own bench, wrapped by nothing but DDP, on this process's half
        self.reference = DistributedDataParallel(copy.deepcopy(self.plain_model))
        optimizer = create_optimizer_v2(
            self.reference.module, opt="adamw", lr=self.optimizer.param_groups[0]["lr"],
            weight_decay=self.hparams.weight_decay)
        self.reference(batch.images, batch.targets)["loss"].backward()
        self.gradients = [p.grad.clone() for p in self.reference.parameters()]
        dispatch_clip_grad(self.reference.parameters(), value=10.0)
        optimizer.step()

    def clip_gradients(self):
        clip = super().clip_gradients()

        def compare_and_clip(parameters):
            if self.batches_trained == 0:
                own = [p.grad for p in self.plain_model.parameters()]
                self.difference = largest_difference(own, self.gradients)
            clip(parameters)

        return compare_and_clip

    def train_batch(self, batch, epoch_idx, batch_idx):
        result = super().train_batch(batch, epoch_idx, batch_idx)
        if self.batches_trained == 1:
            ours, theirs = self.plain_model.state_dict(), self.reference.module.state_dict()
            found = {
                "gradients": self.difference,
                "largest gradient": max(gradient.abs().max().item() for gradient in self.gradients),
                "weights": largest_difference(ours.values(), theirs.values()),
            }
            os.write(1, f"FOUND {json.dumps(found)}\\n".encode())
        return result

    def detect(self, model, batch):
        return super().detect(copy.deepcopy(model).to(torch.float32), in_dtype(batch, torch.float32))

main(Probe)
"""


@both_precisions
def test_a_step_of_two_processes_is_plain_ddp_over_upstream_s_model(run_config, tmp_path, dtype):
    probe = tmp_path / "probe.py"
    probe.write_text(STEP_BESIDE_DDP.replace("TESTS", str(ROOT / "tests")).replace("torch.DTYPE", str(dtype)))
    config = run_config(searcher__max_length=2)
    done = run_model_def("train", config, "--output-dir", tmp_path / "run", processes=2, script=probe)
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == 2
    for of_process in found:
        assert of_process["gradients"] <= BOUNDS[dtype] * max(1, of_process["largest gradient"])
        if dtype == torch.float64:  # Adam divides a gradient by its size: float32's rounding becomes a step of its own
            assert of_process["weights"] <= BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(efficientdet_model_param_dict))
def test_every_model_of_effdet_builds(name):
    model = build_model(EfficientDetHyperparameters(model=name, pretrained="none"), COCO_90[:3])
    assert sum(p.numel() for p in model.parameters()) > 1e6


@pytest.mark.slow
def test_torch_compile_trains(run_config, tmp_path):
    config = run_config(searcher__max_length=2, hyperparameters__torch_compile=True)
    run_model_def("train", config, "--output-dir", tmp_path / "run")


def test_max_detections_is_what_the_model_keeps():
    hparams = EfficientDetHyperparameters(model="tf_efficientdet_d0", global_batch_size=2, max_detections=300)
    assert model_config(hparams, 1).max_det_per_image == 300
