"""What `det experiment create -f const.yaml .` uploads, and the experiment files."""

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from conftest import EXPERIMENT_SCHEMA, ROOT, reports, run_model_def
from determined.common.context import read_v1_context
from tiny_models import CONFIGS, trial_classes

from shared.experiment import Length, parse_data, parse_schedule, parse_section


@pytest.fixture(scope="module")
def experiment_schema():
    """A validator of Determined's experiment configs."""
    if not EXPERIMENT_SCHEMA.is_dir():
        pytest.skip(f"{EXPERIMENT_SCHEMA} is not here: the schema is no part of the project")
    import jsonschema
    from referencing import Registry, Resource

    schemas = [json.loads(path.read_text()) for path in EXPERIMENT_SCHEMA.glob("*.json")]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    (root,) = (schema for schema in schemas if schema["$id"].endswith("/v0/experiment.json"))
    return jsonschema.Draft7Validator(root, registry=registry)


FILES = ["const.yaml", "distributed.yaml", "adaptive.yaml", "const_fake.yaml"]
OTHERS = {
    "efficientdet": ["bccd.yaml", "demo.yaml"],
    "mmdetection": ["bccd.yaml", "maskrcnn.yaml", "fasterrcnn.yaml", "retinanet.yaml", "gfl.yaml"],
    "detectron2": ["bccd.yaml", *(f"tutorial_{gpus}gpu.yaml" for gpus in (1, 2, 4, 8))],
}
DETECTORS = list(OTHERS)
# what makes any point of a search small
SMALL = {
    "efficientdet": {
        "backbone": "mobilenetv3_small_050",
        "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1},
        "input_size": 128,
        "pretrained": "none",
        "amp": "bf16",
        "global_batch_size": 4,
    },
    "mmdetection": {"use_pretrained": False, "global_batch_size": 4},
    "detectron2": {"use_pretrained": False, "weights": "", "global_batch_size": 4},
}


def load_yaml(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_folder_holds_a_link_to_each_file_of_shared(detector):
    folder = ROOT / detector / "shared"
    links = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    files = {str(path.relative_to(ROOT / "shared")) for path in (ROOT / "shared").rglob("*.py")}
    assert links.keys() == files, "run `make links`"
    assert all(path.is_symlink() and path.resolve() == ROOT / "shared" / name for name, path in links.items())


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_context_holds_all_of_shared(detector):
    uploaded = {item.path for item in read_v1_context(ROOT / detector)}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "shared").rglob("*.py")}
    assert files <= uploaded


def test_the_uploaded_context_trains_by_itself(detector, tmp_path):
    context, size = tmp_path / "context", 0
    for item in read_v1_context(ROOT / detector):
        path = context / item.path
        if item.path.endswith("/") or item.type == ord("5"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        content = base64.b64decode(item.content)
        path.write_bytes(content)
        size += len(content)
    assert size < 2**20
    assert not list(context.rglob("*.pyc"))
    run_model_def(
        *("train", "const_fake.yaml", "--output-dir", tmp_path / "run"),
        *("--set", "searcher.max_length.batches=4", "--set", "data.workers=0"),
        cwd=context,
        env={"PYTHONPATH": "", "PYTHONSAFEPATH": ""},
    )
    assert reports(tmp_path / "run", "val")


@pytest.mark.parametrize(("detector", "name"), [(d, name) for d in DETECTORS for name in FILES + OTHERS[d]])
def test_the_files_are_valid_by_determined_s_schema(detector, name, experiment_schema):
    experiment_schema.validate(load_yaml(ROOT / detector / name))


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_only_what_the_trial_knows(detector, name):
    config = load_yaml(ROOT / detector / name)
    trial_class = trial_classes()[detector]
    parse_data(config, trial_class.data_class)
    searcher = config["searcher"]
    if searcher["name"] == "single":
        parse_section(config["hyperparameters"], trial_class.hyperparameters_class, "hyperparameters")
    else:
        assert parse_schedule(config).max_length == Length(searcher["time_metric"], searcher["max_time"])


def draw(space, rng):
    if not isinstance(space, dict):
        return space
    if "type" not in space:
        return {name: draw(value, rng) for name, value in space.items()}
    if space["type"] == "categorical":
        return rng.choice(space["vals"])
    value = rng.uniform(space["minval"], space["maxval"])
    return {"log": lambda: space["base"] ** value, "double": lambda: value, "int": lambda: round(value)}[
        space["type"]
    ]()


@pytest.mark.parametrize("seed", [0, 1])
def test_points_of_the_search_train(detector, shapes, train, seed):
    config = load_yaml(ROOT / detector / "adaptive.yaml")
    drawn = {**draw(config["hyperparameters"], random.Random(seed)), **SMALL[detector]}
    if overrides := {"mmdetection": "override_mmdet_config", "detectron2": "config_overrides"}.get(detector):
        tiny = CONFIGS[detector](shapes, drawn["config_file"])["hyperparameters"][overrides]
        drawn[overrides] = {**tiny, **drawn[overrides]}
    config["hyperparameters"] = drawn
    config["data"] = {"backend": "fake", "workers": 0}
    config["searcher"]["max_time"] = 2
    run = train(trial_classes()[detector], config)
    assert reports(run, "train")[-1]["batches"] == 2


def test_hydra_s_job_is_the_experiment_of_the_yaml_file(experiment_schema):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    configs = ROOT / "mmdetection/hydra/configs"

    def job(*overrides):
        with hydra.initialize_config_dir(str(configs), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)

    assert job() == load_yaml(ROOT / "mmdetection/const.yaml")
    names = sorted(path.stem for path in (configs / "experiment").iterdir())
    assert names == sorted(path.stem for path in (ROOT / "mmdetection").glob("*.yaml") if path.stem != "bccd")
    for name in names:
        assert job(f"experiment={name}") == load_yaml(ROOT / f"mmdetection/{name}.yaml")
    search = job("searcher=adaptive", "hyperparameters.global_batch_size={type: categorical, vals: [8, 16]}")
    experiment_schema.validate(search)
    assert search["searcher"]["name"] == "adaptive_asha"
    assert search["hyperparameters"]["global_batch_size"] == {"type": "categorical", "vals": [8, 16]}


# --- startup-hook.sh --------------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path):
    """A fresh virtual environment that sees torch and determined of this one, and a pip that notes what it is
    asked for and installs those names from here."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = next((home / "lib").glob("python*")) / "site-packages"
    here = Path(sysconfig.get_path("purelib"))

    def link(*names):
        for name in names:
            for found in [*here.glob(name), *here.glob(f"{name}-*.dist-info"), *here.glob(f"{name}.py")]:
                if not (site / found.name).exists():
                    (site / found.name).symlink_to(found)

    link("torch", "determined")
    pip = site / "pip"
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(
        "import json, sys, pathlib\n"
        f"log = pathlib.Path({str(tmp_path / 'pip.log')!r})\n"
        "log.open('a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"site, here = pathlib.Path({str(site)!r}), pathlib.Path({str(here)!r})\n"
        "modules = {'pillow': 'PIL', 'pyyaml': 'yaml'}\n"
        "if sys.argv[1] == 'install':\n"
        "    for need in sys.argv[2:]:\n"
        "        name = need.split('==')[0].split('>')[0]\n"
        "        name = modules.get(name, name)\n"
        "        if (here / name).is_dir() and not (site / name).exists():\n"
        "            (site / name).symlink_to(here / name)\n"
    )
    return home, site, tmp_path / "pip.log"


def source_hook(home, detector="efficientdet", **env):
    return subprocess.run(
        ["bash", "-c", "set -ex; . ./startup-hook.sh; . ./startup-hook.sh; echo AFTER"],
        cwd=ROOT / detector,
        env={"PATH": f"{home / 'bin'}:/usr/bin:/bin", "HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def installs(log):
    return [json.loads(line) for line in log.read_text().splitlines() if '"install"' in line]


def test_the_hook_installs_what_is_missing_and_leaves_torch(container):
    home, _, log = container
    done = source_hook(home)
    assert done.returncode == 0, done.stderr
    assert "AFTER" in done.stdout
    on_torch, plain = installs(log)[:2]
    assert "--no-deps" in on_torch
    assert {"effdet==0.4.1", "timm==1.0.31"} <= set(on_torch)
    assert {"hotcoco>=1.3", "omegaconf", "pycocotools"} <= set(plain)
    assert not any(need.split("==")[0] == "torch" for need in on_torch + plain)
    assert len(installs(log)) == 2  # the second time there is nothing to do


def test_the_hook_takes_the_torchvision_of_an_image_s_own_torch(container):
    home, site, log = container
    for found in site.glob("torch-*.dist-info"):
        found.unlink()
    info = site / "torch-2.3.0a0+nv24.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.3.0a0+nv24.3\n")
    assert source_hook(home).returncode == 0
    assert "torchvision==0.18.*" in installs(log)[0]


@pytest.mark.parametrize(
    ("detector", "module", "requirement"),
    [("mmdetection", "mmcv/ops.py", "mmcv-full==1.7.2"), ("detectron2", "detectron2/_C.py", "detectron2@git+https")],
)
def test_the_hook_compiles_only_what_does_not_import(container, detector, module, requirement):
    home, site, log = container
    module = site / module
    module.parent.mkdir()
    (module.parent / "__init__.py").write_text("")
    for content in ("raise ImportError('undefined symbol')", ""):
        module.write_text(content)
        log.write_text("")
        done = source_hook(home, detector)
        assert done.returncode == 0, done.stderr
        built = [need for need in installs(log) if any(part.startswith(requirement) for part in need)]
        assert all("--no-build-isolation" in need and "--no-deps" in need for need in built)
        assert len(built) == (2 if content else 0)  # sourced twice, and the pip of this test builds nothing


@pytest.mark.slow
def test_the_hook_makes_a_fresh_environment_ready(tmp_path):
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    from importlib.metadata import version

    pip = [home / "bin/pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={version('torch')}", f"determined=={version('determined')}"], check=True)
    subprocess.run([*pip, "numpy<2.5"], check=True)
    done = source_hook(home, **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))})
    assert done.returncode == 0, done.stderr
    check = "import torch, model_def; print(torch.__version__)"
    printed = subprocess.run(
        [home / "bin/python", "-c", check], cwd=ROOT / "efficientdet", check=True, capture_output=True, text=True
    ).stdout
    assert printed.split("+")[0].strip() == version("torch").split("+")[0]


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_hook_passes_shellcheck(detector):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, ROOT / detector / "startup-hook.sh"], check=True)
