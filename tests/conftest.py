"""Paths to the code, data for tests, and how the tests start a run."""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# tiny tensors: several threads only wait for each other, and for the other processes' threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from tiny_models import CONFIGS, EFFICIENTDET, MAIN_DETECTORS, TINY_DETECTORS, efficientdet_config

ROOT = Path(__file__).parent.parent
# as in a submitted folder: `model_def` and `<name>_files` beside `shared`; of the model_defs this finds EfficientDet's
sys.path[:0] = [str(ROOT / folder) for folder in ("", *CONFIGS)]
SHARED_DATA = ROOT.parent / "shared" / "data"
EXPERIMENT_SCHEMA = ROOT.parent / "shared" / "expconf"


# why a detector's tests are not collected, by its folder
WITHOUT_LIBRARY: dict[str, str] = {}
for _name, _tiny in TINY_DETECTORS.items():
    try:
        _tiny.import_library()
    except Exception as error:  # what does not fit shows in many ways
        WITHOUT_LIBRARY[_name] = f"its library cannot be imported: {error}"
collect_ignore = list(WITHOUT_LIBRARY)


@pytest.fixture(params=[*CONFIGS])
def detector(request) -> str:
    """Each detector whose library is installed."""
    if request.param in WITHOUT_LIBRARY:
        pytest.skip(WITHOUT_LIBRARY[request.param])
    return request.param


# for a promise that one code keeps for every detector: the default tests hold it with the quickest of them
other_detectors_are_slow = pytest.mark.parametrize(
    "detector",
    [MAIN_DETECTORS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MAIN_DETECTORS[1:])],
    indirect=True,
)


def without_gpus(count: int = 1) -> str | None:
    """The reason why a test that needs `count` GPUs cannot run here; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"needs a GPU, and torch, which cannot be imported: {error}"
    if torch.version.cuda is None:
        return f"needs a GPU: torch {torch.__version__} is built without CUDA"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"needs a GPU: torch {torch.__version__} finds none{hidden}; `nvidia-smi` says whether the driver does"
    return f"needs {count} GPUs: torch finds {found}" if found < count else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is not None and (reason := without_gpus(*marker.args)):
        pytest.skip(reason)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the libraries' objects: a collection in a test no longer walks through two million of them


def pytest_report_header() -> list[str]:
    return [f"tests/{folder} is skipped: {reason}" for folder, reason in WITHOUT_LIBRARY.items()]


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """Real COCO images and annotations; not part of the project."""
    folder = SHARED_DATA / "coco_tiny"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: the real COCO images for tests are no part of the project")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A synthetic data set: 24 training and 10 validation images."""
    from shared.data import synthetic

    folder = tmp_path_factory.mktemp("shapes")
    synthetic.write(folder, train=24, val=10)
    return folder


@pytest.fixture
def run_config(shapes, tmp_path):
    """Writes the config of a tiny EfficientDet on the shapes, with changes, and returns its path."""

    def write(name: str = "config.yaml", **changes: object) -> Path:
        config = efficientdet_config(shapes)
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            if value is None:
                section.pop(key, None)
            else:
                section[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def run_model_def(
    *arguments: object,
    processes: int = 1,
    cwd: Path = EFFICIENTDET,
    env: dict | None = None,
    check: bool = True,
    script: str | Path = "model_def.py",
    figures: bool = True,
    torchrun: bool = False,
) -> subprocess.CompletedProcess:
    """`model_def.py ARGUMENTS`, or another script, in a new process.

    Args:
        figures: False for a run whose report is not read. Several processes never draw figures.
        torchrun: starts several processes by torchrun, as a user does, instead of the quicker tests/launcher.py.
    """
    program = [sys.executable]
    if torchrun:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    elif processes > 1 or not figures:
        program += [str(ROOT / "tests/launcher.py"), str(processes)]
    done = subprocess.run(
        [*program, script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def code_blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a Markdown page in a language. The default, without a language, is for commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def run_command(function: Callable, trial_class: type, config: Path, overrides: Sequence = (), **arguments) -> None:
    """Calls a command's function in this process with command-line arguments."""
    from shared.environment import STOP_SIGNALS
    from shared.launch import experiment_for

    defaults = {"command": None, "config": str(config), "overrides": [*overrides], "split": "val", "store": None}
    defaults |= {"stop_signals": STOP_SIGNALS, "stop_status": None, "tiles": None, "overlap": 0.2, "model": None}
    given = argparse.Namespace(**{**defaults, "track": False, **arguments})
    function(trial_class, experiment_for(given, trial_class.sections()), given)


def start_run(config: Path, run: Path, processes: int = 1, resume: tuple = (), script: str | Path = "model_def.py"):
    """Starts a run as `run_model_def` does, in a process group of its own, and does not wait for it."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*program, str(script), "train", str(config), "--output-dir", str(run), *resume],
        cwd=EFFICIENTDET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_batch(run: Path, process: subprocess.Popen, batch: int, limit: float = 600) -> None:
    """Returns once a run has reported that batch or a later one."""
    started = time.monotonic()
    while not any(report["batches"] >= batch for report in (reports(run) if (run / "metrics.jsonl").exists() else ())):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - started < limit
        time.sleep(0.01)


def kill_run(process: subprocess.Popen) -> None:
    """Kills all of a run's processes: torchrun's are in sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def trial_class() -> type:
    """EfficientDet's trial."""
    from model_def import EfficientDetTrial

    return EfficientDetTrial


@pytest.fixture
def voc(tmp_path) -> Path:
    """A folder in VOC2007's layout with real images. Twelve are in the split `some`."""
    bccd = SHARED_DATA / "bccd"
    if not bccd.is_dir():
        pytest.skip(f"{bccd} is not here: real data is no part of the project")
    folder = tmp_path / "VOC2007"
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(bccd / "images")
    (folder / "Annotations").symlink_to(bccd / "annotations_voc")
    names = sorted(path.stem for path in (bccd / "annotations_voc").glob("*.xml"))
    (folder / "ImageSets/Main/some.txt").write_text("\n".join(names[:12]))
    return folder


@pytest.fixture
def unbuilt():
    """Makes a trial that has read its config but has not opened anything."""
    import torch
    from determined.core import DistributedContext

    from shared.training.processes import trial_context

    class Slots(DistributedContext):
        """The first of `size` slots. It hears nothing from the others."""

        def __init__(self, size: int):
            super().__init__(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
            self.size = self.local_size = size

        def close(self) -> None:
            pass

    with contextlib.ExitStack() as stack:

        def make(trial_class: type, config: dict, slots: int = 1, **named: object):
            context = stack.enter_context(trial_context(config, Slots(slots), torch.device("cpu")))
            return trial_class(context, begin=False, **named)

        yield make


@pytest.fixture
def differences_of_export(command, tmp_path):
    """Trains one batch of a trial class and exports its checkpoint by `detector`, a class of a model_def.py. Returns
    the differences between the detections of file and checkpoint on four images.

    The images get grain: in flat areas, many scores are equal, and equal scores have no order."""
    from shared.commands.train import train_locally

    def call(detector: type, trained: type, config: dict, *options: str) -> dict:
        config["searcher"]["max_length"] = {"batches": 1}
        config["scheduling_unit"] = 1
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        run_command(train_locally, trained, path, output_dir=tmp_path / "run", resume=None)
        checkpoint = ["--checkpoint", tmp_path / "run/checkpoints/last"]
        draws = np.random.default_rng(0)
        (tmp_path / "grain").mkdir()
        for source in Path(config["data"]["val"]["images"]).iterdir():
            pixels = np.asarray(Image.open(source)) + draws.integers(-20, 21, (128, 128, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "grain" / source.name)
        config["data"]["val"]["images"] = str(tmp_path / "grain")
        path.write_text(yaml.safe_dump(config))
        command(detector, "export", path, *checkpoint, *options, "--images", 4, "--output", tmp_path / "out")
        return json.loads((tmp_path / "out/export.json").read_text())["differences"]

    return call


@pytest.fixture
def program(tmp_path):
    """Writes a program that replaces `model_def.py`, and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "code" / "program.py"
        path.parent.mkdir()
        path.write_text(
            f"import sys; sys.path.insert(0, '.')\nimport model_def\nfrom shared.launch import main\n{text}"
        )
        return path

    return write


COMPARES_FIRST_STEP = """
    def after_batch(self, number):
        super().after_batch(number)
        if number == 0:
            ours, theirs = self.plain_model.state_dict(), self.reference.module.state_dict()
            worst = max((ours[k].double() - theirs[k].double()).abs().max().item() for k in ours)
            os.write(1, f"WORST {worst}\\n".encode())

main(Probe)
"""


@pytest.fixture
def distance_from_reference(program, tmp_path):
    """Trains in two processes with the class `Probe` in a text, which makes `self.reference` in its first batch.
    Returns the largest difference of the weights after this batch."""

    def call(folder: Path, config: dict, probe: str) -> float:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        script = program(f"import copy, os\n{probe}{COMPARES_FIRST_STEP}")
        done = run_model_def("train", path, "--output-dir", tmp_path / "run", processes=2, cwd=folder, script=script)
        worst = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("WORST")]
        assert len(worst) == 2
        return max(worst)

    return call


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in this process and returns the run's folder, `name` in the test's own.

    It draws nothing and writes no report, which take most of the time of so small a run; `report=True` does both.
    `arguments` are those of the command line.
    """

    def call(
        trial_class: type,
        config: dict,
        name: str = "run",
        resume: str | None = None,
        report: bool = False,
        **arguments: object,
    ) -> Path:
        from without_figures import leave_out_figures

        from shared.commands.train import train_locally

        path, folder = tmp_path / f"{name}.yaml", tmp_path / name
        path.write_text(yaml.safe_dump(config))
        with monkeypatch.context() as patch:
            if not report:
                leave_out_figures(patch.setattr)
            patch.chdir(tmp_path)
            try:
                run_command(train_locally, trial_class, path, output_dir=folder, resume=resume, **arguments)
            finally:
                stop_workers()
        return folder

    return call


def stop_workers() -> None:
    """Stops the workers of unused loaders. Python's garbage collection takes 5 s for each."""
    if not multiprocessing.active_children():
        return
    for loader in gc.get_objects():
        if type(loader).__name__ == "_MultiProcessingDataLoaderIter":
            loader._shutdown_workers()


@pytest.fixture
def command(monkeypatch):
    """Runs `model_def.py ARGUMENTS` of a trial's folder in this process. `run_model_def` starts a new process, which
    first loads torch and the detector's library for five seconds."""
    from shared.launch import main

    def call(trial_class: type, *arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.chdir(Path(sys.modules[trial_class.__module__].__file__).parent)
            patch.setattr(sys, "argv", ["model_def.py", *map(str, arguments)])
            try:
                main(trial_class)
            finally:
                stop_workers()

    return call


@pytest.fixture
def refused(command):
    """Runs a command of EfficientDet in this process, and returns its error line."""
    from model_def import EfficientDetTrial

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            command(EfficientDetTrial, *arguments)
        return ended.value.code

    return call


@pytest.fixture
def without_figures(monkeypatch):
    """For a run that this process starts without `train`."""
    from without_figures import leave_out_figures

    leave_out_figures(monkeypatch.setattr)


@pytest.fixture
def crash_and_resume(train):
    """Trains in this process until an error after batch `number`, then from `last` to the end. Returns the folder."""

    def call(trial_class: type, config: dict, number: int) -> Path:
        class Crashing(trial_class):
            def after_batch(self, batch):
                super().after_batch(batch)
                if batch == number:
                    raise RuntimeError("crash")

        Crashing.__module__ = trial_class.__module__
        with pytest.raises(RuntimeError, match="crash"):
            train(Crashing, config, "parts")
        return train(trial_class, config, "parts", resume="last")

    return call


def reports(run: Path, split: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]
