"""The recipes in deploy/: they parse, agree with each other and the docs, and start existing commands."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from tiny_models import CONFIGS

from shared.launch import read_arguments

DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind, name):
    return next(found for found in documents(DEPLOY / "kubernetes" / name) if found["kind"] == kind)


def containers(path):
    """The containers of a Kubernetes file, including a TrainJob's trainer."""
    for document in documents(path):
        spec = document["spec"]
        if document["kind"] == "Job":
            yield from spec["template"]["spec"]["containers"]
        elif document["kind"] == "TrainJob":
            yield spec["trainer"]


def train_commands():
    """The recipe and the words after `model_def.py`, of each command that a recipe starts."""
    for path in KUBERNETES:
        for container in containers(path):
            words = [*container["command"], *container["args"]]
            yield path.name, words[words.index("model_def.py") + 1 :]
    sky = documents(DEPLOY / "skypilot/train.yaml")[0]
    for name, text in (("train.sbatch", (DEPLOY / "slurm/train.sbatch").read_text()), ("skypilot", sky["run"])):
        (line,) = re.findall(r"^ +model_def\.py (.*?)(?: &)?$", text, re.MULTILINE)
        for variable, value in {**sky["envs"], "@": "const.yaml --store s3://bucket/runs/a"}.items():
            line = line.replace(f'"${variable}"', value).replace(f"${variable}", value)
        yield name, shlex.split(line)


@pytest.mark.parametrize(("recipe", "words"), train_commands())
def test_a_recipe_starts_a_command_that_exists(recipe, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model_def.py", *words])
    arguments = read_arguments()
    assert (ROOT / "efficientdet" / arguments.config).exists()
    if arguments.command == "train":
        assert arguments.resume == "auto"
        assert arguments.store is not None


@pytest.mark.parametrize("path", [path for path in DEPLOY.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_each_recipe_is_in_the_docs(path):
    pages = "".join(page.read_text() for page in (ROOT / "docs/deploy").glob("*.md"))
    assert path.relative_to(ROOT).as_posix().removesuffix(".dockerignore") in pages


def test_the_kubernetes_files_use_the_image_that_the_dockerfile_builds():
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    (image,) = set(re.findall(r"REGISTRY/\S+", dockerfile))
    version = re.search(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    assert image.endswith(f":{version}")
    for path in KUBERNETES:
        assert {container["image"] for container in containers(path)} == {image}
        assert set(re.findall(r"REGISTRY/\S+", path.read_text())) == {image}


def test_the_pods_of_a_job_find_the_first_one():
    service, job = of_kind("Service", "job.yaml"), of_kind("Job", "job.yaml")
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert str(spec["completions"]) == str(spec["parallelism"]) == variables["PET_NNODES"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["PET_RDZV_ENDPOINT"] == f"{name}-0.{pod['subdomain']}:29500"


def test_a_trainjob_uses_the_runtime_of_its_file():
    job, runtime = of_kind("TrainJob", "trainjob.yaml"), of_kind("TrainingRuntime", "trainjob.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]


@pytest.mark.parametrize("detector", CONFIGS)
def test_the_dockerfile_copies_what_exists_and_is_not_ignored(detector):
    text = (DEPLOY / "docker/Dockerfile").read_text().replace("${DETECTOR}", detector)
    lines = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert any(fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in kept), source
    targets = [path.resolve() for path in (ROOT / detector).rglob("*") if path.is_symlink()]
    assert targets
    for target in targets:
        assert target.is_relative_to(ROOT / "shared") or target.is_relative_to(ROOT / detector)


# --- SLURM --------------------------------------------------------------------------------------------


@pytest.fixture
def submit(tmp_path):
    """Starts train.sbatch with fake SLURM commands. srun takes `seconds` or until scancel. The file `calls` records
    each command."""
    commands = {
        "srun": 'for i in $(seq $((SECONDS_OF_RUN * 20))); do [ ! -e term ] || exit 15; sleep 0.05; done; exit "$RC"',
        "scancel": "touch term",
        "scontrol": "[ $1 != show ] || printf 'node1\\nnode2\\n'",
    }
    for name, script in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{script}\n')
        (tmp_path / "bin" / name).chmod(0o755)

    def call(*words, seconds, status=0):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", DEPLOY / "slurm/train.sbatch", *words],
            cwd=tmp_path,
            env={**os.environ, **job, "PATH": path, "SECONDS_OF_RUN": str(seconds), "RC": str(status)},
        )

    return call


def wait_for(path: Path):
    while not path.exists() or "srun" not in path.read_text():
        time.sleep(0.01)


def test_a_slurm_job_is_queued_again_before_its_time_is_over(submit, tmp_path):
    process = submit("const.yaml", "--output-dir", "runs/a", seconds=60)
    wait_for(tmp_path / "calls")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    show, run, cancel, requeue = (tmp_path / "calls").read_text().splitlines()
    assert show == "scontrol show hostnames node[1-2]"
    assert "--rdzv-endpoint node1:20007" in run
    assert run.endswith("model_def.py train const.yaml --output-dir runs/a --resume auto")
    assert cancel == "scancel --signal=TERM 7"
    assert requeue == "scontrol requeue 7"


@pytest.mark.parametrize("status", [0, 1])
def test_a_slurm_job_whose_training_ends_keeps_its_status(submit, tmp_path, status):
    assert submit("const.yaml", seconds=0, status=status).wait(60) == status
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_the_slurm_script_passes_shellcheck():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, DEPLOY / "slurm/train.sbatch"], check=True)


# --- Ray ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(monkeypatch):
    """deploy/ray/train.py, with Ray's names replaced."""
    torch_trainer = types.SimpleNamespace(TorchConfig=None, TorchTrainer=None)
    configs = types.SimpleNamespace(FailureConfig=None, RunConfig=None, ScalingConfig=None, torch=torch_trainer)
    ray = types.SimpleNamespace(train=configs)
    for name, module in {"ray": ray, "ray.train": configs, "ray.train.torch": torch_trainer}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, src: None)
    return types.SimpleNamespace(**runpy.run_path(DEPLOY / "ray/train.py"))


def test_a_worker_of_ray_starts_a_training_with_its_rank(adapter, tmp_path, monkeypatch):
    (tmp_path / "model_def.py").write_text(
        "import json, os, sys\nfrom pathlib import Path\n"
        "ports = [os.environ['MASTER_PORT'], os.environ['RANK']]\n"
        "Path('seen.json').write_text(json.dumps([sys.argv, *ports]))\n"
        "sys.exit('fails' in sys.argv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "model_def", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    adapter.train_on_worker({"arguments": ["const.yaml", "--store", "s3://bucket/runs/a"]})
    arguments, port, rank = json.loads((tmp_path / "seen.json").read_text())
    assert arguments == ["model_def.py", "train", "const.yaml", "--store", "s3://bucket/runs/a", "--resume", "auto"]
    assert rank == "3"
    assert port != "1"  # which Ray's own group has
    with pytest.raises(RuntimeError, match="ended with status 1"):
        adapter.train_on_worker({"arguments": ["fails"]})
