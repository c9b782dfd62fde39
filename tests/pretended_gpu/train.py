"""A program: trains cases on the CPU, and then on the pretended GPU, and writes what happened as JSON.

    cd tests; python -m pretended_gpu.train SHAPES FOLDER CASE [CASE …]

Each case trains 4 batches, validates, saves, resumes, trains 2 more, validates and saves. FOLDER/results.json then has
for each case: `cpu` and `gpu`, the lines of metrics.jsonl; `waits`, how often each place made the host wait between two
batches, at most; `races`, `unpinned` and `mixed`, texts; `operations`, their number on the device.
"""

import argparse
import collections
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from tiny_models import CONFIGS, TINY_DETECTORS, efficientdet_config

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / detector) for detector in CONFIGS)]

import torch
import yaml

from pretended_gpu.cuda import Unsupported, install
from pretended_gpu.streams import RECORD, place_of
from pretended_gpu.tensors import Generator
from shared.commands import train as train_command
from shared.config.experiment import read_experiment
from shared.training.run import TensorBoard

LIBRARY = re.compile(r"-packages/(effdet|timm|torchvision|mm|detectron2|fvcore)")
# the detector, its config for the shapes, its hyperparameters, and the case whose training on the CPU is its reference
CASES = {
    "efficientdet": ("efficientdet", efficientdet_config, {"validation_loss": True}, "efficientdet"),
    "efficientdet fp16": (
        "efficientdet",
        efficientdet_config,
        {"amp": "fp16", "channels_last": True, "model_ema_decay": 0.9, "clip_grad": 10.0},
        "efficientdet",  # no CPU trains in fp16
    ),
    "efficientdet bf16": ("efficientdet", efficientdet_config, {"amp": "bf16"}, "efficientdet bf16"),
}
CASES |= {
    f"{detector} {model}": (detector, make, {"validation_loss": model == "retinanet"}, f"{detector} {model}")
    for detector, tiny in TINY_DETECTORS.items()
    for model, make in {**getattr(tiny, "GPU_CASES", {}), "mask r-cnn": tiny.config}.items()
    if model in getattr(tiny, "GPU_CASES", {}) and detector != "efficientdet"
}


def config_of(name, shapes, batches):
    _, make, hyperparameters, _ = CASES[name]
    config = make(shapes)
    config["data"]["workers"] = 2 if name == "efficientdet fp16" else 0
    config["hyperparameters"].update(hyperparameters)
    config["searcher"]["max_length"] = {"batches": batches}
    config["min_validation_period"] = {"batches": 4}
    if name == "efficientdet bf16":
        config["optimizations"] = {"aggregation_frequency": 2}
    return config


def trial_class_of(name):
    return TINY_DETECTORS[CASES[name][0]].trial_class()


# Nothing is given back before the process ends: the batch after the last step may still be prepared, and workers of
# loaders that Python's garbage collection finds take 5 s each to stop.
_KEPT: list = []


class Waits:
    """How often each place in our code or Determined's makes the host wait between two batches, at most."""

    def __init__(self):
        self.most = collections.Counter()

    def next_batch(self):
        frames = [place_of(wait.stack) for wait in RECORD.waits]
        RECORD.waits.clear()
        self.most |= collections.Counter(
            f"{_relative(frame.filename)}: {frame.name}" for frame in frames if not LIBRARY.search(frame.filename)
        )


def _relative(filename):
    path = os.path.realpath(filename)
    return path.split("-packages/")[-1] if "-packages/" in path else os.path.relpath(path, ROOT)


def watched(trial_class, waits):
    class Watched(trial_class):
        has_started = False  # a start copies each weight, and no run waits for it again

        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            _KEPT.append(self)

        def train_batch(self, batch, epoch_idx, batch_idx):
            if not self.has_started:
                RECORD.waits.clear()
                RECORD.unpinned.clear()
                self.has_started = True
            waits.next_batch()
            return super().train_batch(batch, epoch_idx, batch_idx)

        def evaluate_batch(self, batch, batch_idx):
            waits.next_batch()
            return super().evaluate_batch(batch, batch_idx)

    Watched.__module__ = trial_class.__module__  # whose folder is the run's code
    return Watched


def without_figures():
    """Skips figures and reports, which take most of the time of such small runs."""
    TensorBoard.draw_figures = lambda *_: None
    train_command.Results.write_report = lambda *_: None
    for name in ("save_page", "picture_of"):
        setattr(train_command, name, lambda *_, **__: None)


def train(trial_class, name, shapes, run, waits=None, config_file=None):
    """Trains 4 batches, and 2 more after a resume. Returns the lines of metrics.jsonl."""
    path = config_file or run.with_suffix(".yaml")
    for batches, resume in ((4, None), (6, "last")):
        path.write_text(yaml.safe_dump(config_of(name, shapes, batches)))
        arguments = argparse.Namespace(output_dir=run, resume=resume, store=None, config=str(path))
        vars(arguments).update(stop_signals=(), stop_status=None)
        train_command.train_locally(trial_class, read_experiment(path, [], trial_class.sections()), arguments)
        if waits is not None:
            waits.next_batch()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main():
    shapes, folder, *names = sys.argv[1:]
    shapes, folder = Path(shapes).absolute(), Path(folder).absolute()
    os.chdir(folder)
    without_figures()
    references = {CASES[name][-1] for name in names}
    on_cpu = {name: train(trial_class_of(name), name, shapes, folder / f"cpu {name}") for name in references}
    try:
        install()
    except Unsupported as error:
        sys.exit(f"unsupported: {error}")
    torch.cuda.manual_seed = lambda seed: Generator.seed(torch.initial_seed())  # the device draws the host's numbers
    results = {}
    for name in names:
        waits = Waits()
        for counter in (RECORD.races, RECORD.unpinned, RECORD.mixed):
            counter.clear()
        RECORD.operations = 0
        reports = train(watched(trial_class_of(name), waits), name, shapes, folder / f"gpu {name}", waits)
        results[name] = {
            "cpu": on_cpu[CASES[name][-1]],
            "gpu": reports,
            "waits": waits.most,
            "races": list(RECORD.races),
            "unpinned": list(RECORD.unpinned),
            "mixed": list(RECORD.mixed),
            "operations": RECORD.operations,
        }
    (folder / "results.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
