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

from efficientdet_files.hyperparameters import EfficientDetHyperparameters
from shared.experiment import Length, parse_data, parse_schedule, parse_section

FOLDER = ROOT / "efficientdet"
FILES = ["const.yaml", "distributed.yaml", "adaptive.yaml", "const_fake.yaml"]


def test_the_folder_holds_a_link_to_each_file_of_shared():
    links = {path.name: path for path in (FOLDER / "shared").iterdir() if path.suffix == ".py"}
    files = {path.name for path in (ROOT / "shared").glob("*.py")}
    assert links.keys() == files, "run `make links`"
    assert all(path.resolve() == ROOT / "shared" / name for name, path in links.items())


def test_the_uploaded_context_trains_by_itself(tmp_path):
    context, size = tmp_path / "context", 0
    for item in read_v1_context(FOLDER):
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


@pytest.mark.parametrize("name", [*FILES, "bccd.yaml", "demo.yaml"])
def test_the_files_are_valid_by_determined_s_schema(name):
    if not EXPERIMENT_SCHEMA.is_dir():
        pytest.skip(f"{EXPERIMENT_SCHEMA} is not here: the schema is no part of the project")
    import jsonschema
    from referencing import Registry, Resource

    schemas = [json.loads(path.read_text()) for path in EXPERIMENT_SCHEMA.glob("*.json")]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    (root,) = (schema for schema in schemas if schema["$id"].endswith("/v0/experiment.json"))
    jsonschema.Draft7Validator(root, registry=registry).validate(yaml.safe_load((FOLDER / name).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_only_what_the_trial_knows(name):
    config = yaml.safe_load((FOLDER / name).read_text())
    schedule = parse_schedule(config)
    parse_data(config)
    if config["searcher"]["name"] == "single":
        parse_section(config["hyperparameters"], EfficientDetHyperparameters, "hyperparameters")
    else:
        searcher = config["searcher"]
        assert schedule.max_length == Length(searcher["time_metric"], searcher["max_time"])


def draw(space, rng):
    if not isinstance(space, dict) or "type" not in space:
        return space
    if space["type"] == "categorical":
        return rng.choice(space["vals"])
    value = rng.uniform(space["minval"], space["maxval"])
    return {"log": lambda: space["base"] ** value, "double": lambda: value, "int": lambda: round(value)}[
        space["type"]
    ]()


@pytest.mark.parametrize("seed", [0, 1])
def test_points_of_the_search_train(tmp_path, seed):
    config = yaml.safe_load((FOLDER / "adaptive.yaml").read_text())
    rng = random.Random(seed)
    drawn = {name: draw(space, rng) for name, space in config["hyperparameters"].items()}
    small = {
        "backbone": "mobilenetv3_small_050",
        "input_size": 128,
        "pretrained": "none",
        "amp": "bf16",
        "global_batch_size": 4,
    }
    config["hyperparameters"] = {**drawn, **small, "model_config": {"fpn_channels": 16, "fpn_cell_repeats": 1}}
    config["data"] = {"backend": "fake", "workers": 0}
    config["searcher"]["max_time"] = 2
    path = tmp_path / "point.yaml"
    path.write_text(yaml.safe_dump(config))
    run_model_def("train", path, "--output-dir", tmp_path / "run")
    assert reports(tmp_path / "run", "train")[-1]["batches"] == 2


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


def source_hook(home, **env):
    script = f"set -ex; . {FOLDER / 'startup-hook.sh'}; . {FOLDER / 'startup-hook.sh'}; echo AFTER"
    return subprocess.run(
        ["bash", "-c", script],
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
        [home / "bin/python", "-c", check], cwd=FOLDER, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split("+")[0].strip() == version("torch").split("+")[0]


def test_the_hook_passes_shellcheck():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, FOLDER / "startup-hook.sh"], check=True)
