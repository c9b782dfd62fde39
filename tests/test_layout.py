"""Imports in `shared/` go down only, without circles, and never to a detector's library."""

import ast
import graphlib
import subprocess
import venv
from pathlib import Path

import pytest
from conftest import ROOT

# each may import from those after it, and from its own room
FLOORS = (
    *(
        "__main__",
        "launch",
        "predictor",
        "commands",
        "search",
        "export",
        "report",
        "training",
        "evaluation",
    ),
    *("library", "data", "config", "durable", "log", "environment", "errors"),
)
BY_ITSELF = ("container",)  # runs before anything is installed
LIBRARIES = ("effdet", "timm", "mmdet", "mmcv", "detectron2", "transformers", "model_def")


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(path: Path, for_types: bool = False) -> list[str]:
    """The imports of a file, including those in functions; `for_types`: and those for type checkers only."""
    names, tree = [], ast.parse(path.read_text())
    of_types = [] if for_types else [node for node in ast.walk(tree) if is_for_types(node)]
    unseen = {id(node) for block in of_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
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


def imported_at_start(path: Path) -> set[str]:
    """All imports that importing a file of `shared/` causes."""
    found, to_read = set(), [path]
    while to_read:
        tree = ast.parse(to_read.pop().read_text())
        for node in tree.body:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                files = [ROOT.joinpath(*parts[:count]).with_suffix(".py") for count in (len(parts), len(parts) - 1)]
                to_read += [file for file in files if name not in found and parts[0] == "shared" and file.is_file()]
                found.add(name)
    return found


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_command_starts_without_matplotlib_s_figures(command):
    """Importing them takes half a second. Only a report needs them."""
    names = imported_at_start(ROOT / f"shared/commands/{command}.py")
    assert "shared.training.trial.DetectionTrial" in names
    slow = ("matplotlib.figure", "matplotlib.pyplot", "matplotlib.axes", "matplotlib.backends")
    assert not [name for name in names if name.startswith(slow)]


def test_a_config_is_read_in_one_place():
    callers = []
    for path in files():
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        callers += [path.name for function in calls if isinstance(function, ast.Name) and function.id == "load_config"]
    assert callers == ["experiment.py"]


def test_no_backend_is_compared_by_its_name():
    """The table in config/schema.py has each backend's needs."""
    for path in [*files(), *ROOT.glob("*/model_def.py"), *ROOT.glob("*/*_files/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = [side.value for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
                assert "fake" not in compared, f"{path}: {ast.unparse(node)}"


def test_python_without_the_packages_says_in_one_line_what_to_do(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    for arguments in (["model_def.py", "--help"], ["-m", "shared", "check", "bccd.yaml"]):
        done = subprocess.run(
            [tmp_path / "bare/bin/python", *arguments], cwd=ROOT / "mmdetection", capture_output=True, text=True
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "lacks the package" in line
        assert "`make demo`" in line
        assert ".venv/bin/python" in line


@pytest.mark.parametrize(
    "package", ["shared", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*_files"))]
)
def test_no_files_import_each_other_in_a_circle(package):
    folder = ROOT / package
    modules = {".".join(path.relative_to(folder.parent).with_suffix("").parts): path for path in folder.rglob("*.py")}
    assert len(modules) > 1
    graph = {
        module: {
            other
            for name in imports_of(path, for_types=True)
            for other in (name, name.rpartition(".")[0])
            if other in modules
        }
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


# objects of libraries, by the module that sets their attributes: sockets' options, modules and functions of PyTorch
SET_BY = {
    "checkpoints.py": ["plain"],  # a state dict's versions
    "hang.py": ["self._context"],
    "run.py": ["threading"],  # what prints the errors of threads
    "processes.py": ["self._context", "self._socket"],
    "stopping.py": ["_before_fork"],
    "switches.py": ["TrainedInFloat32", "module", "probe"],
    "validation.py": ["module", "torch.distributed"],
}
# names of libraries that are private, and why they are used
PRIVATE = {
    "_current_frames": "Python documents it",
    "_exit": "Python documents it",
    "_foreach_copy_": "the averages of a small detector take as long as its step without it",
    "_foreach_lerp_": "the same",
    "_metadata": "the versions of a state dict's modules have no other name",
}


def test_no_object_of_the_training_changes_the_attributes_of_another():
    for path in sorted((ROOT / "shared/training").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = ast.unparse(node.value)
                assert owner in ("self", *SET_BY.get(path.name, ())), f"{path}: {ast.unparse(node)}"


def test_the_training_uses_public_names_of_libraries():
    for path in sorted((ROOT / "shared/training").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_own = ast.unparse(node.value) in ("self", "cls")
                assert is_own or node.attr in PRIVATE, f"{path}: {ast.unparse(node)}"
