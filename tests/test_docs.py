"""What the documents promise is held by tests that exist."""

import re

import pytest
from conftest import ROOT


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
