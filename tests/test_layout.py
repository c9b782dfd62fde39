"""The rooms of `shared/`: imports go down only, and none leads to a detector's library."""

import ast
from pathlib import Path

from conftest import ROOT

# each may import from those after it, and from its own room
FLOORS = (
    *("__main__", "launch", "on_cluster", "here", "detect", "check"),
    *("training", "evaluation", "experiment", "data", "errors"),
)
BY_ITSELF = ("container",)  # runs before anything is installed
LIBRARIES = ("effdet", "timm", "mmdet", "mmcv", "detectron2", "model_def")


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files():
    return [path for path in (ROOT / "shared").rglob("*.py") if path.name != "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "shared").parts[0].removesuffix(".py")


def test_imports_go_down_only():
    for path in files():
        room = room_of(path)
        for name in imports_of(path):
            if name.startswith("shared.") and (other := name.split(".")[1]) != room:
                assert room not in BY_ITSELF, f"{path} imports {name}"
                assert FLOORS.index(room) < FLOORS.index(other), f"{path} imports {name}, which is above it"


def test_no_file_imports_a_detector_s_library():
    for path in files():
        libraries = [name for name in imports_of(path) if name.split(".")[0] in LIBRARIES]
        assert not libraries, f"{path} imports {libraries}"
