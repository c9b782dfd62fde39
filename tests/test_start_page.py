"""The commands of the docs' first page, run as a user runs them."""

import json
import os
import shutil
import subprocess
import sys

import tiny_formats
from conftest import ROOT, code_blocks


def commands_of(page):
    """The block of commands from `convert` to `predict`."""
    return next(block for block in code_blocks(ROOT / page) if "shared convert" in block)


def test_the_start_page_s_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_formats, "PICTURES", 16)
    tiny_formats.write_xml(tmp_path / "cells", ["rectangle", "circle", "triangle"], "JPEGImages")
    folder = shutil.copytree(ROOT / "efficientdet", tmp_path / "efficientdet")  # links become files, as in a submission
    (config,) = (block for block in code_blocks(ROOT / "docs/index.md", "yaml") if "name: cells" in block)
    shorter = config.replace("epochs: 24", "epochs: 1").replace("epochs: 6", "epochs: 1")
    assert shorter.count("epochs: 1}") == 2
    (folder / "cells.yaml").write_text(shorter)
    subprocess.run(
        ["bash", "-exc", f'python3() {{ "{sys.executable}" "$@"; }}\n{commands_of("docs/index.md")}'],
        cwd=folder,
        env={**os.environ, "HOME": str(tmp_path)},
        check=True,
    )
    assert (folder / "labels.png").exists()
    assert (folder / "runs/cells/evaluation/report.html").exists()
    assert {result["image_id"] for result in json.loads((folder / "found/results.json").read_text())}


def test_the_readme_has_the_start_page_s_commands():
    readme, start = (
        [line.split("  #")[0].strip() for line in commands_of(page).splitlines() if line.startswith("python3")]
        for page in ("README.md", "docs/index.md")
    )
    assert readme == start
