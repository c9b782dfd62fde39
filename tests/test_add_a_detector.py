"""The detector of docs/design/add-a-detector.md, built from the page."""

import importlib.util
import re
import shutil
import sys

import pytest
from conftest import ROOT, reports, run_model_def


@pytest.fixture
def fcos(tmp_path):
    """The folder of the page, with links to `shared/` as `make links` makes them."""
    text = (ROOT / "docs/design/add-a-detector.md").read_text()
    folder = tmp_path / "fcos"
    folder.mkdir()
    for language, name in (("python", "model_def.py"), ("yaml", "const_fake.yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        (folder / name).write_text(block)
    shutil.copytree(ROOT / "efficientdet/shared", folder / "shared")
    return folder


def test_the_detector_of_the_page_trains_resumes_and_evaluates(fcos, command, without_figures, monkeypatch, capsys):
    run_model_def("train", "const_fake.yaml", "--output-dir", "run", cwd=fcos, figures=False)
    validated = [report["batches"] for report in reports(fcos / "run") if report["split"] == "val"]
    assert validated == [4, 8]
    spec = importlib.util.spec_from_file_location("fcos_model_def", fcos / "model_def.py")
    monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    resumed = ("--resume", "last", "--set", "searcher.max_length.batches=12")
    command(module.FcosTrial, "train", "const_fake.yaml", "--output-dir", "run", *resumed)
    assert reports(fcos / "run")[-1]["batches"] == 12
    command(module.FcosTrial, "evaluate", "const_fake.yaml", "--checkpoint", "run/checkpoints/last")
    assert "mAP" in capsys.readouterr().out


def test_the_page_names_all_that_a_detector_must_define(fcos):
    text = (fcos / "model_def.py").read_text()
    contract = (ROOT / "shared/training/detector.py").read_text()
    abstract = set(re.findall(r"@abstractmethod\n    def (\w+)", contract))
    assert len(abstract) == 8
    assert all(f"def {name}(" in text for name in abstract)
    assert len(text.splitlines()) <= 110
