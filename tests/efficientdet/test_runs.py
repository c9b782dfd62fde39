"""Runs outside a cluster, started as a user starts them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, reports, run_model_def
from determined.constants import INTER_TRAIN_PROCESS_COMM_PORT_1
from PIL import Image
from tiny_models import efficientdet_config

from model_def import EfficientDetTrial
from shared.training.checkpoints import read_checkpoint

SUMMARY = ("bbox_mAP", "bbox_mAP_50", "bbox_AR_100")


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """A run of 12 batches; its folder and config."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(efficientdet_config(shapes)))
    done = run_model_def("train", config, "--output-dir", folder / "run")
    return folder / "run", config, done


def test_a_run_leaves_its_reports_checkpoints_config_and_picture(trained):
    run, _, done = trained
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "last"]
    assert [r["batches"] for r in reports(run, "train")] == [2, 4, 6, 8, 10, 12]
    assert [r["batches"] for r in reports(run, "val")] == [4, 8, 12]
    metrics = reports(run, "val")[-1]["metrics"]
    assert "bbox_AP/circle" in metrics
    assert metrics["bbox_mAP_l"] is None  # no large shapes: nan is null in JSON
    assert {"loss", "lr", "images_per_second", "data_wait"} <= reports(run, "train")[0]["metrics"].keys()
    assert Image.open(run / "predictions.png").size[0] == 1400
    assert list((run / "tensorboard").iterdir())
    assert "AP/circle" in done.stdout
    assert "predictions.png" in done.stdout
    assert "batch 12: bbox_mAP" in done.stderr
    assert (run / "config.yaml").is_file()


def test_a_run_ends_with_a_report_of_its_best_validation(trained):
    run, _, done = trained
    best = max(reports(run, "val"), key=lambda report: report["metrics"]["bbox_mAP"])
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["bbox"]["metrics"] == {
        name.removeprefix("bbox_"): value for name, value in best["metrics"].items() if "_AP/" not in name
    }
    page = (run / "report.html").read_text()
    for said in (
        f"batch {best['batches']} of 12",
        "Learning curves",
        "images/s in training",
        "waiting for data",
        "torch ",
    ):
        assert said in page
    assert "hyperparameters.backbone" in page  # one of the keys in which its config differs from const.yaml
    assert f"the report: {run / 'report.html'}" in done.stdout


@pytest.mark.slow
def test_the_working_directory_does_not_enlarge_checkpoints(shapes, run_config, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "photo.bin").write_bytes(os.urandom(3 * 2**20))
    program = [sys.executable, ROOT / "efficientdet/model_def.py", "train", run_config(searcher__max_length=2)]
    subprocess.run([*program, "--output-dir", "run"], cwd=full, check=True, capture_output=True)
    code = full / "run/checkpoints/last/code"
    assert (code / "model_def.py").is_file()
    assert (code / "shared/training/trial.py").is_file()
    assert sum(file.stat().st_size for file in code.rglob("*")) < 2**20


def test_a_folder_that_holds_a_run_is_not_overwritten(refused, trained):
    run, config, _ = trained
    assert "holds a run already. Fix: add `--resume last`" in refused("train", config, "--output-dir", run)


@pytest.mark.slow
def test_a_finished_run_continues_with_a_greater_length(refused, trained, run_config, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    longer = run_config(searcher__max_length={"batches": 16})
    run_model_def("train", longer, "--output-dir", run, "--resume", "last")
    assert [r["batches"] for r in reports(run, "val")] == [4, 8, 12, 16]
    line = refused("train", longer, "--output-dir", run, "--resume", "last")
    assert "has been trained for 16 batches" in line


@pytest.mark.slow
def test_the_learning_rate_and_epochs_continue_after_a_resume(shapes, train):
    from model_def import EfficientDetTrial

    class Stopped(EfficientDetTrial):
        def after_batch(self, number):
            super().after_batch(number)
            if number == 8:  # in the second of three epochs of 6 batches
                os.kill(os.getpid(), signal.SIGTERM)

    Stopped.__module__ = "model_def"
    config = efficientdet_config(shapes)
    config["data"]["workers"] = 0
    config["hyperparameters"].update(sched_on_updates=False, lr_noise=[0.1, 0.9])
    config["searcher"]["max_length"] = {"epochs": 3}
    config["min_validation_period"] = {"epochs": 1}

    def rates(run):
        return [(report["batches"], report["metrics"]["lr"]) for report in reports(run, "train")]

    whole = rates(train(EfficientDetTrial, config, name="whole"))
    assert len({rate for _, rate in whole}) > 1
    with pytest.raises(SystemExit):
        train(Stopped, config)
    assert rates(train(EfficientDetTrial, config, resume="last")) == whole


@pytest.mark.slow
def test_two_processes_keep_the_same_weights_and_draw_different_numbers(run_config, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "import multiprocessing, os, random, torch, model_def\n"
        "from shared.launch import main\n"
        "def workers():\n"
        "    return ' '.join(sorted(str(child.pid) for child in multiprocessing.active_children()))\n"
        "class Probe(model_def.EfficientDetTrial):\n"
        "    def losses(self, model, batch):\n"
        "        self.workers = workers()\n"
        "        os.write(1, f'DRAW {self.rank} {random.random()} {torch.rand(1).item()}\\n'.encode())\n"
        "        return super().losses(model, batch)\n"
        "    def detect(self, model, batch):\n"
        "        total = sum(v.double().sum().item() for m in (self.plain_model, self.ema.module)\n"
        "                    for v in m.state_dict().values())\n"
        "        os.write(1, f'WEIGHTS {self.batches_trained} {total!r}\\n'.encode())\n"
        "        assert workers() == self.workers, 'a fork beside Gloo, which can hang'\n"
        "        return super().detect(model, batch)\n"
        "main(Probe)\n"
    )
    run = tmp_path / "run"
    lines = []
    for length, resume in ((4, []), (8, ["--resume", "last"])):
        config = run_config(searcher__max_length={"batches": length})
        done = run_model_def("train", config, "--output-dir", run, *resume, processes=2, script=probe)
        lines += done.stdout.splitlines()
    draws = [line.split()[2:] for line in lines if line.startswith("DRAW")]
    assert len(draws) == 16
    assert len({d[0] for d in draws}) == len({d[1] for d in draws}) == 16
    weights = [line.split()[1:] for line in lines if line.startswith("WEIGHTS")]
    assert len(weights) >= 4
    assert len({tuple(w) for w in weights}) == 2  # one sum a validation, whichever process


@pytest.mark.parametrize("processes", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3))])
def test_evaluate_gives_the_run_s_numbers_with_any_number_of_processes(trained, command, capfd, tmp_path, processes):
    run, config, _ = trained
    checkpoint = run / "checkpoints/last"
    arguments = ("evaluate", config, "--checkpoint", checkpoint, "--output", tmp_path, "--report", tmp_path)
    if processes == 1:
        command(EfficientDetTrial, *arguments)
        printed = capfd.readouterr().out
    else:
        printed = run_model_def(*arguments, processes=processes).stdout
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["bbox"]["metrics"]["mAP"] == reports(run, "val")[-1]["metrics"]["bbox_mAP"]
    assert "F1 is greatest" in printed or "No detection is right" in printed
    assert "AP/circle" in printed
    assert json.loads((tmp_path / "metrics.json").read_text()) == reports(run, "val")[-1]["metrics"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["image_id"] for r in results} == set(range(1, 11))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it detects in half precision")
def test_a_half_precision_checkpoint_evaluates_without_a_gpu(trained, command, tmp_path):
    run, config, _ = trained
    checkpoint = ("--checkpoint", run / "checkpoints/last", "--set", "hyperparameters.amp=fp16")
    command(EfficientDetTrial, "evaluate", config, *checkpoint, "--output", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == reports(run, "val")[-1]["metrics"]


@pytest.mark.parametrize("picture_format", ["png", pytest.param("pdf", marks=pytest.mark.slow)])
def test_predict_draws_each_image_and_writes_coco_results(trained, command, caplog, shapes, tmp_path, picture_format):
    run, config, _ = trained
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.open(shapes / "val/000000.png").save(images / "b.jpg")
    Image.open(shapes / "val/000001.png").resize((60, 90)).save(images / "sub/a.PNG")
    (images / "notes.txt").write_text("no image")
    (images / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command(
        EfficientDetTrial,
        *("predict", config, "--checkpoint", run / "checkpoints/best", "--images", images, "--output", out),
        *("--format", picture_format, "--min-score", "0.0", "--set", "data.val=null", "--set", "data.train=null"),
    )
    assert "broken.png is skipped" in caplog.text
    assert (out / f"b.jpg.{picture_format}").is_file()
    assert (out / f"sub/a.PNG.{picture_format}").is_file()
    results = json.loads((out / "results.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in results} == {(0, "b.jpg"), (1, "sub/a.PNG")}
    assert {r["category_id"] for r in results} <= {1, 2, 3}
    small = [r for r in results if r["image_id"] == 1]
    boxes = np.array([r["bbox"] for r in small])
    assert (boxes[:, 0] + boxes[:, 2] <= 60.1).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 90.1).all()


def test_predict_takes_image_ids_from_the_data_set(trained, command, shapes, tmp_path):
    run, config, _ = trained
    out = tmp_path / "out"
    arguments = ("--checkpoint", run / "checkpoints/best", "--images", shapes / "val", "--output", out)
    command(EfficientDetTrial, "predict", config, *arguments)
    results = json.loads((out / "results.json").read_text())
    assert {r["image_id"] for r in results} == set(range(1, 11))


WRONG = {
    "hyperparameters: unknown key 'learning_rate'; did you mean": ["hyperparameters.learning_rate=1"],
    "data.val.annotations: /x/val.json does not exist": ["data.val.annotations=/x/val.json"],
    "data.train.images: /x does not exist": ["data.train.images=/x"],
    "hyperparameters.model: 'efficientdet_d77' is not a model of effdet; did you mean": [
        "hyperparameters.model=efficientdet_d77"
    ],
    "hyperparameters.backbone: 'resnet81' is not a model of timm; did you mean": ["hyperparameters.backbone=resnet81"],
    "hyperparameters.opt: 'adamm' is not an optimizer": ["hyperparameters.opt=adamm"],
    "hyperparameters.sched: 'cosin' is not a scheduler": ["hyperparameters.sched=cosin"],
    "hyperparameters.input_size: 100 is less than 128": ["hyperparameters.input_size=100"],
    "hyperparameters.model_config: unknown key 'fpn_chanels'; did you mean 'fpn_channels'": [
        "hyperparameters.model_config.fpn_chanels=8"
    ],
    "hyperparameters.pretrained: nowhere.pth is not a checkpoint": ["hyperparameters.pretrained=nowhere.pth"],
    "hyperparameters.amp: fp16 needs a GPU": ["hyperparameters.amp=fp16"],
    "--set x: it has no value. Fix: write key=value": ["x"],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_key_or_path_is_one_line_before_training(refused, run_config, tmp_path, message):
    if torch.cuda.is_available() and "fp16" in message:
        pytest.skip("there is a GPU")
    overrides = [part for override in WRONG[message] for part in ("--set", override)]
    line = refused("train", run_config(), "--output-dir", tmp_path / "run", *overrides)
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_searcher_metric_that_is_not_reported_is_refused(refused, run_config, tmp_path):
    line = refused("train", run_config(), "--output-dir", tmp_path / "run", "--set", "searcher.metric=bbox_map")
    assert "searcher.metric: 'bbox_map' is not reported; did you mean 'bbox_mAP'?" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_categories_that_differ_and_nothing_to_train_on_are_refused(refused, run_config, shapes, tmp_path):
    coco = json.loads((shapes / "annotations/train.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**coco, "categories": [*coco["categories"][:2], {"id": 3, "name": "star"}]}))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**coco, "annotations": []}))
    for path, message in ((other, "different categories: id 3 is 'star'"), (empty, "has no box to train on")):
        config = run_config(data__train__annotations=str(path))
        assert message in refused("train", config, "--output-dir", tmp_path / "run")


@pytest.mark.slow
def test_two_processes_need_a_divisible_batch_and_a_free_port(run_config, tmp_path):
    config = run_config(hyperparameters__global_batch_size=3)
    with socket.socket() as another_run:
        with contextlib.suppress(OSError):  # it is another run's indeed
            another_run.bind(("", INTER_TRAIN_PROCESS_COMM_PORT_1))
            another_run.listen()
        arguments = ("train", config, "--output-dir", tmp_path / "run")
        done = run_model_def(*arguments, processes=2, torchrun=True, check=False)
    assert "3 images cannot be divided evenly among 2 slots. Fix: use 2 or 4" in done.stderr


def test_a_checkpoint_of_another_model_is_refused_and_stays(refused, trained, run_config, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    before = (run / "checkpoints/last/state_dict.pth").read_bytes()
    other = run_config(
        hyperparameters__model_config={"fpn_channels": 24, "fpn_cell_repeats": 1}, searcher__max_length=20
    )
    line = refused("train", other, "--output-dir", run, "--resume", "last")
    assert "holds the weights of another model" in line
    assert (run / "checkpoints/last/state_dict.pth").read_bytes() == before


def test_a_cut_off_checkpoint_is_refused(refused, trained, tmp_path):
    run, config, _ = trained
    cut = shutil.copytree(run / "checkpoints/last", tmp_path / "cut")
    data = (cut / "state_dict.pth").read_bytes()
    (cut / "state_dict.pth").write_bytes(data[: len(data) // 2])
    assert "is incomplete: state_dict.pth has" in refused("evaluate", config, "--checkpoint", cut)
    (cut / "manifest.json").unlink()  # as in checkpoints of before
    assert "cannot be read as weights" in refused("evaluate", config, "--checkpoint", cut)


@pytest.mark.slow
def test_a_changed_last_checkpoint_is_reported_and_best_continues(trained, run_config, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    best = json.loads((run / "checkpoints/best/metadata.json").read_text())["steps_completed"]
    shutil.rmtree(run / "checkpoints/last")
    shutil.copytree(run / "checkpoints/best", run / "checkpoints/last")
    data = bytearray((run / "checkpoints/last/state_dict.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "checkpoints/last/state_dict.pth").write_bytes(data)
    longer = run_config(searcher__max_length={"batches": 16})
    done = run_model_def("train", longer, "--output-dir", run, "--resume", "last")
    assert "checkpoints/last has changed since it was saved: state_dict.pth differs; resuming from" in done.stderr
    assert f"resuming after batch {best}" in done.stderr
    assert [r["batches"] for r in reports(run, "val")] == [4, 8, 12, 16]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(command, run_config, tmp_path):
    bad = []

    class Probe(EfficientDetTrial):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            if self.batches_trained == 6:
                bad.extend(batch.image_ids)
                losses = {name: value * float("nan") for name, value in losses.items()}
            return losses

    Probe.__module__ = "model_def"
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        command(Probe, "train", run_config(scheduling_unit=4), "--output-dir", run)
    ids = ", ".join(str(number) for number in bad)
    assert f"the loss is not finite since batch 7 (image ids {ids})" in ended.value.code
    checkpoint = read_checkpoint(run / "checkpoints/last")
    assert checkpoint.batches == 4
    assert all(weights.isfinite().all() for weights in checkpoint.weights.values())


@pytest.fixture
def small_gpu(monkeypatch):
    """Returns a function that makes a method run out of memory, from a batch on."""

    def out_of_memory(method, batches=0):
        original = getattr(EfficientDetTrial, method)

        def full(self, *arguments):
            if self.batches_trained >= batches:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. If reserved but")
            return original(self, *arguments)

        monkeypatch.setattr(EfficientDetTrial, method, full)

    return out_of_memory


SMALLER = (
    "error: CUDA out of memory. Tried to allocate 20.00 MiB. Fix: hyperparameters.global_batch_size: 2 with "
    "optimizations.aggregation_frequency: 2 has the same images in a step"
)


@pytest.mark.parametrize(("method", "batches"), [("losses", 6), ("prepare", 4), ("detect", 4)])
def test_out_of_memory_names_a_smaller_batch(refused, run_config, tmp_path, small_gpu, method, batches):
    small_gpu(method, batches)
    line = refused("train", run_config(), "--output-dir", tmp_path / "run")
    assert line.startswith(SMALLER)


def test_out_of_memory_for_a_validation_loss_says_to_omit_it(refused, run_config, tmp_path, small_gpu):
    small_gpu("image_losses")
    config = run_config(hyperparameters__validation_loss=True)
    line = refused("train", config, "--output-dir", tmp_path / "run")
    assert line.endswith("20.00 MiB. Fix: omit hyperparameters.validation_loss, or give smaller images")


def test_out_of_memory_of_an_evaluation_says_how_to_detect_on_less(refused, trained, small_gpu):
    small_gpu("detect")
    run, config, _ = trained
    line = refused("evaluate", config, "--checkpoint", run / "checkpoints/best")
    assert "Fix: --set hyperparameters.global_batch_size=2" in line


def test_out_of_memory_before_any_batch_is_one_line_with_advice(refused, run_config, tmp_path, small_gpu):
    small_gpu("build_model")
    line = refused("train", run_config(), "--output-dir", tmp_path / "run")
    assert line.startswith("error: CUDA out of memory. Tried to allocate 20.00 MiB. Fix: stop other programs")
    assert "global_batch_size" in line


def test_a_search_off_the_cluster_names_the_keys_to_set(refused):
    assert "--set hyperparameters.lr=" in refused("train", "adaptive.yaml")


def test_without_a_checkpoint_untrained_weights_are_not_evaluated(refused, run_config):
    line = refused("evaluate", run_config())
    assert "hyperparameters.pretrained is 'none', which detects nothing" in line


def test_a_uuid_needs_a_master(refused, run_config, monkeypatch):
    monkeypatch.setenv("DET_MASTER", "")
    uuid = "12345678-1234-1234-1234-123456789abc"
    assert "set DET_MASTER" in refused("evaluate", run_config(), "--checkpoint", uuid)


def test_check_says_what_reading_the_annotations_changed(command, run_config, shapes, tmp_path, capsys):
    data = {"workers": 0}
    for split in ("train", "val"):
        data[split] = {"annotations": str(tmp_path / f"{split}.json"), "images": str(shapes / split)}
        coco = json.loads((shapes / f"annotations/{split}.json").read_text())
        coco["annotations"][0] |= {"id": 0, "ignore": 1}
        coco["annotations"][1]["area"] = 0
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
    data = {
        split: {"annotations": str(tmp_path / f"{split}.json"), "images": str(shapes / split)}
        for split in ("train", "val")
    }
    config = run_config(data={**data, "workers": 0})
    with pytest.raises(SystemExit):
        command(EfficientDetTrial, "check", config, "--images", "2")
    said = capsys.readouterr().out
    assert "look at: data.train: training omits 1 annotation with `ignore: 1`" in said
    assert "look at: data.train: 1 box with `area: 0`" in said
    assert "look at: data.val: an annotation has the id 0, which pycocotools counts as not found" in said
