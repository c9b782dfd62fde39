"""The files that `det experiment create -f const.yaml .` uploads, and the experiment files."""

import ast
import base64
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from conftest import EXPERIMENT_SCHEMA, ROOT, WITHOUT_LIBRARY, other_detectors_are_slow, reports, run_model_def
from determined.common.context import read_v1_context
from determined_master import DEFAULTS, LOG_POLICIES, SEARCHER_DEFAULTS, handed_over
from tiny_models import CONFIGS, EFFICIENTDET, TINY_DETECTORS, trial_classes

from shared.config.experiment import experiment_of, parse_schedule, per_slot_batch_size
from shared.config.schema import Length

SHIPPED = [path for detector in CONFIGS for path in sorted((ROOT / detector).glob("*.yaml"))]
shipped = pytest.mark.parametrize("path", SHIPPED, ids=[f"{path.parent.name}/{path.name}" for path in SHIPPED])


def load_yaml(path):
    return yaml.safe_load(path.read_text())


def load_schema(name):
    if not EXPERIMENT_SCHEMA.is_dir():
        pytest.skip(f"{EXPERIMENT_SCHEMA} is not here: the schema is no part of the project")
    return json.loads((EXPERIMENT_SCHEMA / name).read_text())


@pytest.fixture(scope="module")
def experiment_schema():
    """A validator of Determined's experiment configs."""
    root = load_schema("experiment.json")
    import jsonschema
    from referencing import Registry, Resource

    schemas = [json.loads(path.read_text()) for path in EXPERIMENT_SCHEMA.glob("*.json")]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    return jsonschema.Draft7Validator(root, registry=registry)


@pytest.mark.parametrize("detector", CONFIGS)
def test_the_folder_holds_a_link_to_each_file_of_shared(detector):
    folder = ROOT / detector / "shared"
    links = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    files = {str(path.relative_to(ROOT / "shared")) for path in (ROOT / "shared").rglob("*.py")}
    files = {name for name in files if not name.endswith("/__init__.py")}  # of folders: Python needs none
    assert links.keys() == files, "run `make links`"
    assert all(path.is_symlink() and path.resolve() == ROOT / "shared" / name for name, path in links.items())


@pytest.mark.parametrize("detector", CONFIGS)
def test_the_context_holds_all_of_shared(detector):
    uploaded = {item.path for item in read_v1_context(ROOT / detector)}
    code = {path: ast.parse(path.read_text()).body for path in (ROOT / "shared").rglob("*.py")}
    with_code = {path for path, body in code.items() if not all(isinstance(node, ast.Expr) for node in body)}
    assert {str(path.relative_to(ROOT)) for path in with_code} <= uploaded


@other_detectors_are_slow
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
    assert size < 1.5 * 2**20
    assert not list(context.rglob("*.pyc"))
    run_model_def(
        *("train", "const_fake.yaml", "--output-dir", tmp_path / "run"),
        *("--set", "searcher.max_length.batches=4", "--set", "data.workers=0"),
        cwd=context,
        env={"PYTHONPATH": "", "PYTHONSAFEPATH": ""},
    )
    assert reports(tmp_path / "run", "val")


@shipped
def test_a_file_is_valid_by_determined_s_schema(path, experiment_schema):
    experiment_schema.validate(load_yaml(path))


def test_the_master_s_defaults_equal_its_schema_s():
    def defaults(name):
        found = {}
        for key, of_key in load_schema(name)["properties"].items():
            default, ref = of_key.get("default"), of_key.get("optionalRef", "").rpartition("/")[2]
            if default == {} and ref and "properties" in load_schema(ref):
                default = defaults(ref)
            if default is not None:
                found[key] = default
        return found

    def given(section):
        return {key: given(of) if isinstance(of, dict) else of for key, of in section.items() if of is not None}

    searcher = {"searcher": given(DEFAULTS["searcher"])}
    assert {**defaults("experiment.json"), **searcher} == given(DEFAULTS)
    for name, of_searcher in SEARCHER_DEFAULTS.items():
        filled = {**searcher["searcher"], **given(of_searcher)}
        assert defaults(f"searcher-{name.replace('_', '-')}.json") == filled


@shipped
def test_a_file_is_accepted_as_the_master_hands_it_over(path, unbuilt, monkeypatch):
    if path.parent.name == "detr" and "detr" not in WITHOUT_LIBRARY:
        from transformers import AutoConfig  # the Hub gives the config of the model that the files name

        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: AutoConfig.for_model("rt_detr_v2"))
    written = load_yaml(path)
    trial_class = trial_classes().get(path.parent.name)
    if trial_class is None:
        pytest.skip(WITHOUT_LIBRARY[path.parent.name])
    for seed in range(3 if written["searcher"]["name"] != "single" else 1):
        config, hyperparameters = handed_over(written), draw(written["hyperparameters"], random.Random(seed))
        experiment = experiment_of(config, hyperparameters, trial_class.sections())
        trial = unbuilt(trial_class, experiment.config, experiment=experiment)
        schedule, metric = trial.schedule, trial.searcher_metric

        trial_class.input_scale(experiment.hyperparameters)
        assert per_slot_batch_size(trial.hparams.global_batch_size, config["resources"]["slots_per_trial"])
        assert (metric.name, metric.smaller_is_better) == (written["searcher"]["metric"], False)
        assert schedule.max_length.count > 0
        for key, period in [
            ("min_validation_period", schedule.validation_period),
            ("min_checkpoint_period", schedule.checkpoint_period),
        ]:
            assert period is None or period.count > 0
            assert key not in written or {period.unit: period.count} == written[key]
        if written["searcher"]["name"] != "single":
            assert schedule.max_length == Length(written["searcher"]["time_metric"], written["searcher"]["max_time"])


@shipped
def test_a_file_s_log_policy_tells_an_error_that_no_restart_mends(path):
    # Go's RE2, in which a master searches each line of the log, and Python's `re` read this pattern alike
    (policy,) = load_yaml(path)["log_policies"]
    assert policy["action"] == "cancel_retries"
    for line in ("not retried: error: data.train is missing\n", "shared.launch: not retried: error: no loss\n"):
        assert re.search(policy["pattern"], line)
    for line in (
        "error: a worker was killed\n",
        "RuntimeError: error: CUDA\n",
        json.dumps(policy),
        yaml.safe_dump(policy),
    ):
        assert not re.search(policy["pattern"], line)
    assert not {policy["name"]} & {of_master["name"] for of_master in LOG_POLICIES}


@shipped
def test_the_batches_that_wait_fit_into_dev_shm(path):
    config = load_yaml(path)
    batch = config["hyperparameters"]["global_batch_size"]
    batch = max(batch["vals"]) if isinstance(batch, dict) else batch
    slots = config["resources"]["slots_per_trial"]
    to_train, to_validate = TINY_DETECTORS[path.parent.name].BYTES_OF_AN_IMAGE
    # MMDetection and Detectron2 detect on one image a slot
    validated = slots if path.parent.name in ("mmdetection", "detectron2") else batch
    # two a worker wait in each loader; the slots of an agent share a container
    waiting = 2 * config["data"]["workers"] * (batch * to_train + validated * to_validate)
    assert waiting < 0.75 * config["resources"].get("shm_size", 4 * 2**30)


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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_points_of_the_search_train(detector, shapes, train, seed):
    config = load_yaml(ROOT / detector / "adaptive.yaml")
    drawn = {**draw(config["hyperparameters"], random.Random(seed)), **TINY_DETECTORS[detector].SMALL_POINT}
    if overrides := {"mmdetection": "config_overrides", "detectron2": "config_overrides"}.get(detector):
        tiny = CONFIGS[detector](shapes, drawn["config_file"])["hyperparameters"][overrides]
        drawn[overrides] = {**tiny, **drawn[overrides]}
    config["hyperparameters"] = drawn
    config["data"] = {"backend": "fake", "workers": 0}
    config["searcher"]["max_time"] = 2
    run = train(trial_classes()[detector], config)
    assert reports(run, "train")[-1]["batches"] == 2


def test_hydra_s_job_is_the_experiment_of_the_yaml_file(experiment_schema):
    pytest.importorskip("hydra.core")  # `hydra` alone is found as MMDetection's folder of that name
    import hydra
    from omegaconf import OmegaConf

    runpy.run_path(str(ROOT / "mmdetection/hydra/submit.py"))

    def job(*overrides):
        with hydra.initialize_config_dir(str(ROOT / "mmdetection/hydra/configs"), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)

    assert job() == load_yaml(ROOT / "mmdetection/const.yaml")
    for file in (ROOT / "mmdetection").glob("*.yaml"):
        assert job(f"experiment={file.stem}") == load_yaml(file)
    search = job("searcher=adaptive", "hyperparameters.global_batch_size={type: categorical, vals: [8, 16]}")
    experiment_schema.validate(search)
    assert search["searcher"]["name"] == "adaptive_asha"
    assert parse_schedule(handed_over(search)).max_length == Length("batches", 30000)
    assert search["hyperparameters"]["global_batch_size"] == {"type": "categorical", "vals": [8, 16]}


@pytest.mark.slow
def test_the_first_chart_of_a_newcomer_rises(detector, tmp_path):
    run_model_def("train", "const_fake.yaml", "--output-dir", tmp_path / "run", cwd=ROOT / detector)
    values = [report["metrics"]["bbox_mAP"] for report in reports(tmp_path / "run", "val")]
    assert len(values) == 4
    assert values == sorted(set(values))
    assert values[-1] > 3 * values[0]


# --- startup-hook.sh --------------------------------------------------------------------------------


MMCV_SETUP = """
from setuptools import setup

def get_version():
    exec(compile("__version__ = '1.7.2'", "version.py", "exec"))
    return locals()["__version__"]

setup(name="mmcv", version=get_version(), packages=["mmcv"], install_requires=["opencv-python"])
"""


def pack_mmcv(folder):
    """A source distribution with mmcv's name, version and way to read the version."""
    source = folder / "mmcv-1.7.2"
    (source / "mmcv").mkdir(parents=True)
    (source / "mmcv/__init__.py").write_text("")
    (source / "setup.py").write_text(MMCV_SETUP)
    shutil.make_archive(str(source), "gztar", folder, source.name)


@pytest.fixture
def container(tmp_path):
    """A fresh virtual environment that contains torch and determined. Its pip logs its arguments, builds wheels of an
    mmcv of this test's, and marks what it is to install as installed."""
    pack_mmcv(tmp_path / "links")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = next((home / "lib").glob("python*")) / "site-packages"
    here = Path(sysconfig.get_path("purelib"))
    for name in (
        "packaging",
        "setuptools",
        "setuptools-*.dist-info",
        "_distutils_hack",
        "torch-*.dist-info",
        "determined-*.dist-info",
    ):
        (found,) = here.glob(name)
        (site / found.name).symlink_to(found)
    (site / "torch.py").write_text("")
    pip = site / "pip"
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(
        "import json, pathlib, re, runpy, sys, zipfile\n"
        f"log = pathlib.Path({str(tmp_path / 'pip.log')!r})\n"
        "log.open('a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "if sys.argv[1] == 'wheel':\n"
        f"    sys.path.insert(0, {str(here)!r})\n"
        "    del sys.modules['pip']\n"
        f"    sys.argv += ['--no-index', '--find-links', {str(tmp_path / 'links')!r}]\n"
        "    runpy.run_module('pip', run_name='__main__', alter_sys=True)\n"
        f"site = pathlib.Path({str(site)!r})\n"
        "for need in sys.argv[2:]:\n"
        "    if need.endswith('.whl'):\n"
        "        zipfile.ZipFile(need).extractall(site)\n"
        "    elif found := re.fullmatch(r'([a-z][\\w-]*)(?:[=>]=([\\d.]+?)(?:\\.\\*)?)?', need):\n"
        "        name, version = found[1].replace('-', '_'), found[2] or '1'\n"
        "        info = site / f'{name}-{version}.dist-info'\n"
        "        info.mkdir(exist_ok=True)\n"
        "        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\\nName: {found[1]}\\nVersion: {version}\\n')\n"
    )
    return home, site, tmp_path / "pip.log"


def write_installed(site, name, version):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def source_hook(home, detector=EFFICIENTDET.name, **env):
    return subprocess.run(
        ["bash", "-c", "set -ex; . ./startup-hook.sh; . ./startup-hook.sh; echo AFTER"],
        cwd=ROOT / detector,
        env={"PATH": f"{home / 'bin'}:/usr/bin:/bin", "HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def installs(log):
    return [json.loads(line) for line in log.read_text().splitlines() if '"install"' in line]


def test_the_hook_installs_what_is_missing_and_leaves_torch(container):
    home, _, log = container
    done = source_hook(home)
    assert done.returncode == 0, done.stderr
    assert "AFTER" in done.stdout
    vision, rest = installs(log)  # the second time there is nothing to do
    assert "--no-deps" in vision
    assert {"effdet==0.4.1", "timm==1.0.31", "hotcoco>=1.3", "omegaconf", "pycocotools"} <= set(rest)
    assert "--constraint" in rest
    assert not {"torch", "torchvision", "determined"} & set(rest)


@pytest.mark.parametrize(
    ("torch_version", "torchvision"),
    [("2.3.0a0+nv24.3", "0.18"), ("2.13.0", "0.28"), ("2.14.0", "0.29"), ("2.15.0", "0.29")],
)
def test_the_hook_takes_the_torchvision_of_an_image_s_own_torch(container, torch_version, torchvision):
    home, site, log = container
    for found in site.glob("torch-*.dist-info"):
        found.unlink()
    write_installed(site, "torch", torch_version)
    assert source_hook(home).returncode == 0
    assert f"torchvision=={torchvision}.*" in installs(log)[0]


def test_the_hook_installs_mmcv_without_compiling(container):
    home, site, log = container
    done = source_hook(home, "mmdetection")
    assert done.returncode == 0, done.stderr
    assert (site / "mmcv/__init__.py").exists()
    (alone,) = [needs for needs in installs(log) if any("/mmcv-1.7.2-" in need for need in needs)]
    assert "--no-deps" in alone  # it requires an OpenCV of its own choice
    assert "mmcv-full" not in log.read_text()
    # nor where an image has the compiled one, and another OpenCV
    for found in [*site.glob("mmcv-*"), *site.glob("opencv*")]:
        shutil.rmtree(found)
    write_installed(site, "mmcv-full", "1.7.2")
    write_installed(site, "opencv", "4.7.0")
    log.write_text("")
    assert source_hook(home, "mmdetection").returncode == 0
    assert installs(log) == []


def test_detectron2_is_its_python_of_one_commit(container, tmp_path):
    """Its setup.py always compiles. Here it cannot."""
    home, site, _ = container
    source = tmp_path / "source"
    (source / "detectron2").mkdir(parents=True)
    (source / "detectron2/__init__.py").write_text("")
    (source / "broken.cpp").write_text("no C++")
    (source / "setup.py").write_text(
        "import os\nfrom setuptools import Extension, setup\n"
        "setup(name='detectron2', version='0.6' + os.environ.get('D2_VERSION_SUFFIX', ''), packages=['detectron2'], "
        "ext_modules=[Extension('detectron2._C', ['broken.cpp'])])"
    )
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"detectron2 @ git+file://{source}@{commit}\n")
    done = subprocess.run(
        [home / "bin/python", "-m", "shared.container", requirements], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (site / "detectron2/__init__.py").exists()
    assert not list((site / "detectron2").glob("_C*"))
    assert (site / f"detectron2-0.6+python.{commit[:7]}.dist-info/METADATA").exists()


@pytest.mark.parametrize(
    ("detector", "module", "requirement"),
    [("mmdetection", "mmcv/_ext.py", "mmcv-full==1.7.2"), ("detectron2", "detectron2/_C.py", "detectron2 @ git+https")],
)
def test_the_hook_compiles_where_asked_to_what_does_not_import(container, detector, module, requirement):
    home, site, log = container
    module = site / module
    module.parent.mkdir()
    (module.parent / "__init__.py").write_text("")
    write_installed(site, *(("mmcv-full", "1.7.2") if detector == "mmdetection" else ("detectron2", "0.6")))
    for content in ("raise ImportError('undefined symbol')", ""):
        module.write_text(content)
        log.write_text("")
        done = source_hook(home, detector, COMPILED_OPERATIONS="1")
        assert done.returncode == 0, done.stderr
        built = [need for need in installs(log) if any(part.startswith(requirement) for part in need)]
        assert all("--no-build-isolation" in need and "--no-deps" in need for need in built)
        assert len(built) == (2 if content else 0)  # sourced twice, and the pip of this test builds nothing


@pytest.mark.parametrize(("detector", "requirement"), [("mmdetection", "mmcv-full==1.7.2"), ("detectron2", "shapely")])
def test_an_image_is_made_ready_by_what_its_dockerfile_copies(container, tmp_path, detector, requirement):
    home, site, log = container
    if detector == "detectron2":  # compiled already: its own requirements are left
        (site / "detectron2").mkdir()
        for name in ("__init__.py", "_C.py"):
            (site / "detectron2" / name).write_text("")
        write_installed(site, "detectron2", "0.6")
    dockerfile = (ROOT / detector / "docker/Dockerfile").read_text()
    kept = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            assert f"!{source}" in kept or f"!*/{Path(source).name}" in kept
            (tmp_path / "image" / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / "image" / target)
    (command,) = re.findall(r"python3 (-m shared\.container.*)$", dockerfile, re.MULTILINE)
    done = subprocess.run(
        [home / "bin/python", *command.split()], cwd=tmp_path / "image", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked = {need for needs in installs(log) for need in needs}
    assert {"hotcoco>=1.3", requirement} <= asked


def test_an_installation_that_fails_ends_with_what_was_run(container):
    home, site, _ = container
    (site / "pip/__main__.py").write_text("raise SystemExit('ERROR: no such host')")
    done = source_hook(home)
    assert done.returncode == 1
    assert "ERROR: no such host" in done.stderr
    assert "-m pip install" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_compiled_extra_is_of_the_version_that_is_required():
    extra = re.search(r"mmcv-full==([\d.]+)", (ROOT / "setup.cfg").read_text())[1]
    assert f"mmcv=={extra}\n" in (ROOT / "mmdetection/requirements.txt").read_text()


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
        [home / "bin/python", "-c", check], cwd=EFFICIENTDET, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split("+")[0].strip() == version("torch").split("+")[0]


@pytest.mark.parametrize("detector", CONFIGS)
def test_the_hook_passes_shellcheck(detector):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, ROOT / detector / "startup-hook.sh"], check=True)
