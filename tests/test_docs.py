"""The tests that the documentation names exist, and its commands and links work."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, code_blocks

from shared.__main__ import _COMMANDS as COMMANDS
from shared.config.file import keys_of
from shared.config.schema import TrainingHyperparameters, key_names
from shared.launch import read_arguments


def names_of_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_each_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text()))
    assert len(named) > 20
    assert named <= names_of_tests()


def test_each_number_in_the_fault_tables_is_a_test():
    text = (ROOT / "docs/reliability.md").read_text()
    listed = set(re.findall(r"^(\d+)\. `test_", text, re.MULTILINE))
    rows = [line for line in text.splitlines() if line.startswith("|") and re.search(r"\| *\d", line)]
    used = {number for row in rows for number in re.findall(r"(\d+)(?=\*|,| \|)", row)}
    assert used == listed


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_to_a_file_leads_to_one(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def commands() -> list[tuple[str, str]]:
    """Each `python3 …` command in the code blocks of the pages."""
    found = []
    for page in pages():
        for block in code_blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("   #")[0].strip().removeprefix("$ ")
                if re.match(r"(python3|torchrun) ", command) and "…" not in command:
                    found.append((str(page.relative_to(ROOT)), command))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_each_command_of_the_docs_is_understood(page, command, monkeypatch):
    words = shlex.split(command)
    if "model_def.py" in words:
        arguments = words[words.index("model_def.py") + 1 :]
        if arguments[0] == "--help-config":
            assert arguments[1] in key_names(TrainingHyperparameters)
            return
        monkeypatch.setattr(sys, "argv", ["model_def.py", *arguments])
        assert read_arguments().command == arguments[0]
    elif words[:3] == ["python3", "-m", "shared"]:
        assert words[3] in COMMANDS
    else:
        in_detector = (ROOT / "efficientdet" / words[1]).exists()
        of_module = words[:2] == ["python3", "-m"] or words[1].startswith("hydra/")
        assert in_detector or (ROOT / words[1]).exists() or of_module, command


def test_the_tables_of_keys_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import tables

    for path, (name, section) in tables.sections().items():
        text = path.read_text()
        assert tables.with_table(text, name, section) == text, f"{path}: run .venv/bin/python docs/tables.py"


def test_the_table_of_exported_files_is_that_of_its_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import export_matrix

    page, results = export_matrix.PAGE.read_text(), json.loads(export_matrix.NUMBERS.read_text())
    assert export_matrix.with_table(page, results) == page, "run .venv/bin/python docs/export_matrix.py --only NOTHING"


def test_every_key_of_a_config_has_a_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import tables

    for _, section in tables.sections().values():
        assert [key.name for key in keys_of(section)] == key_names(section)


@pytest.mark.parametrize(("column", "file"), [(2, "constraints.txt"), (3, "constraints-oldest.txt")])
def test_the_versions_that_contributing_lists_are_those_installed(column, file):
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## Versions\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in page.splitlines() if row.startswith("|")]
    pinned = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE)
    versions = {"NumPy": ["numpy"], "OpenCV": ["opencv-python-headless"], "Determined": ["determined"]}
    checked = 0
    for row in rows[3:]:  # after the head and Python
        names = versions.get(row[1], row[1].split(", "))
        for listed in re.findall(r"\d+(?:\.\d+)+", re.sub(r"(Python )?3\.1\d: ", "", row[column])):
            assert any(name in names and version.startswith(listed) for name, version in pinned), (row[1], listed)
            checked += 1
    assert checked >= 7


def benchmark_commands() -> list[tuple[str, str, str]]:
    """The page, the script and the arguments of each benchmark in the pages and the Makefile."""
    found = []
    for page in [*pages(), ROOT / "Makefile"]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    .*\n(?:    .*\n)*|`[^`]+`|.+", text, re.MULTILINE):
            found += [
                (str(page.relative_to(ROOT)), script, " ".join(arguments.split()))
                for script, arguments in re.findall(r"benchmarks/(\w+\.py)([^`|&;<]*)", line)
            ]
    return found


def options_of_benchmark(script: str) -> dict[str, set[str]]:
    """The options of each command that a benchmark's `main` takes. A benchmark may use another one's commands."""
    tree = ast.parse((ROOT / "benchmarks" / script).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main":
            named = [argument.id for argument in node.args[1:]]
            return {
                name.replace("_", "-"): {a.arg.strip("_").replace("_", "-") for a in functions[name].args.args}
                for name in named
            }
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return options_of_benchmark(next(f"{name}.py" for name in imported if name == "against"))


@pytest.mark.parametrize(("page", "script", "arguments"), benchmark_commands())
def test_each_benchmark_that_a_page_names_takes_its_arguments(page, script, arguments):
    assert (ROOT / "benchmarks" / script).exists()
    if not arguments or "$" in arguments:
        return
    commands, words = options_of_benchmark(script), shlex.split(arguments)
    options = next(iter(commands.values()))
    if len(commands) > 1:
        assert words[0] in commands, f"{script} has the commands {', '.join(commands)}"
        options = commands[words[0]]
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= options
