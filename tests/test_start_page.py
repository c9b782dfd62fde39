"""The commands of the docs' first page, run as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny_formats
from conftest import ROOT, code_blocks


def commands_of(page):
    """The blocks of commands from `convert` to `predict`."""
    blocks = code_blocks(ROOT / page)
    (first,) = (number for number, block in enumerate(blocks) if "shared convert" in block)
    (last,) = (number for number, block in enumerate(blocks) if "--output found" in block)
    return "\n".join(blocks[first : last + 1])


def test_the_start_page_s_commands_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("mmdet", reason="the start page trains MMDetection")
    monkeypatch.setattr(tiny_formats, "PICTURES", 16)
    tiny_formats.write_xml(tmp_path / "cells", ["rectangle", "circle", "triangle"], "JPEGImages")
    shutil.copytree(tmp_path / "cells/JPEGImages", tmp_path / "new")
    folder = shutil.copytree(ROOT / "mmdetection", tmp_path / "mmdetection")  # links become files, as in a submission
    convert, rest = commands_of("docs/index.md").split("cp bccd.yaml cells.yaml\n")
    printed = run(convert, folder, tmp_path)
    lines = re.findall(r"^  (?:train|val): .*\n", printed, re.MULTILINE)
    assert len(lines) == 2
    config = (folder / "bccd.yaml").read_text()
    for line in lines:
        config = re.sub(rf"^{line.partition(':')[0]}: .*\n", line, config, flags=re.MULTILINE)
    (folder / "cells.yaml").write_text(
        config.replace("batches: 1200", "batches: 2").replace("batches: 400", "batches: 2")
    )
    run(rest, folder, tmp_path)
    assert (folder / "labels.png").exists()
    assert (folder / "runs/cells/evaluation/report.html").exists()
    assert {result["image_id"] for result in json.loads((folder / "found/results.json").read_text())}


def run(commands, folder, home):
    """Runs commands as the page's reader does, up to the first that fails; returns what they print."""
    ended = subprocess.run(
        ["bash", "-exc", f'python3() {{ "{sys.executable}" "$@"; }}\n{commands}'],
        cwd=folder,
        env={**os.environ, "HOME": str(home)},
        check=True,
        capture_output=True,
        text=True,
    )
    return ended.stdout


def test_the_readme_has_the_start_page_s_commands():
    readme, start = (
        [line.split("  #")[0].strip() for line in commands_of(page).splitlines() if line.startswith(("python3", "cp"))]
        for page in ("README.md", "docs/index.md")
    )
    assert readme == start
