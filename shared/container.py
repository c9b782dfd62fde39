"""`python3 -m shared.container`: installs what a detector needs and this Python lacks.

In a detector's folder it reads `requirements.txt` there and `shared/requirements.txt`. startup-hook.sh, the images and
the Makefile call it, and setup.cfg reads the same files. torch, torchvision and NumPy stay unchanged: torch may be
one that pip takes for older than it is (2.3.0a0+…), and what is compiled is compiled for it.

Nothing is compiled unless asked for: mmcv is pure Python without `-full`, and Detectron2 is its Python tree alone; the
operations are in PyTorch. With `--compiled`, or COMPILED_OPERATIONS=1 in the environment, both are compiled, which
takes minutes; pip keeps what it built in PIP_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # in a container it comes with determined
    sys.exit(f"error: {sys.executable} has no packages yet: {sys.executable} -m pip install packaging determined")

_SHARED = Path(__file__).with_name("requirements.txt")
# other packages that give the same modules
_OTHER_NAMES = {
    "mmcv": ("mmcv-full",),
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python", "opencv"),
}
_COMPILED = {"mmcv": ("mmcv-full", "mmcv._ext"), "detectron2": ("detectron2", "detectron2._C")}
# _runs_first runs these at the start of each Python that builds a wheel.
# mmcv's setup.py calls `exec(code)` and then reads `locals()`. From Python 3.13 on, exec does not change locals().
_EXEC_CHANGES_LOCALS = """
import builtins, sys
execute = builtins.exec
def execute_in_the_caller(code, names=None, local_names=None, **options):
    if names is None:
        caller = sys._getframe(1)
        names, local_names = caller.f_globals, caller.f_locals
    execute(code, names, local_names, **options)
builtins.exec = execute_in_the_caller
"""
# Detectron2's setup.py always compiles. pip runs this too, and warns if setuptools is imported before it.
_WITHOUT_EXTENSIONS = """
if "pip" not in sys.orig_argv:
    import setuptools
    setup = setuptools.setup
    setuptools.setup = lambda **given: setup(**{**given, "ext_modules": []})
"""


def install_missing(files: Iterable[Path], constraints: Iterable[str] = (), compiled: bool = False) -> None:
    """Installs those of the requirements that are not there.

    Args:
        constraints: files of pip's, with the versions to take.
        compiled: compiles the operations of mmcv and of Detectron2, if they are required and do not import.

    Raises:
        subprocess.CalledProcessError: pip or git failed; what it printed says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        if _is_there(Requirement("torch")) and not _is_there(Requirement("torchvision")):
            # torchvision 0.(N + 15) is for torch 2.N alone; from 0.29 on, torchvision supports all later torch versions
            _pip("--no-deps", f"torchvision==0.{min(int(version('torch').split('.')[1]) + 15, 29)}.*")
        keep = Path(folder, "keep.txt")
        kept = [name for name in ("torch", "torchvision", "numpy") if _is_there(Requirement(name))]
        keep.write_text("".join(f"{name}=={version(name)}\n" for name in kept))
        limits = [part for file in [str(keep), *constraints] for part in ("--constraint", file)]
        needs = _read(files)
        if compiled:
            for need in needs:
                _compile(need, limits, Path(folder))
        missing = {need.name: need for need in needs if not _is_there(need)}
        if missing.keys() & _COMPILED.keys():  # their setup.py knows no newer setuptools
            _pip("setuptools<81", "wheel")
        wheels = {name: _python_tree(missing.pop(name), Path(folder)) for name in _COMPILED if name in missing}
        if wheel := wheels.pop("mmcv", None):  # it would bring its own choice of OpenCV
            _pip("--no-deps", wheel)
        if arguments := [*map(str, missing.values()), *wheels.values()]:
            _pip(*limits, *arguments)


def _read(files: Iterable[Path]) -> list[Requirement]:
    lines = [line.partition(" #")[0].strip() for file in files for line in file.read_text().splitlines()]
    needs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [need for need in needs if need.marker is None or need.marker.evaluate()]


def _is_there(need: Requirement) -> bool:
    for name in (need.name, *_OTHER_NAMES.get(need.name, ())):
        with contextlib.suppress(PackageNotFoundError):
            if need.specifier.contains(version(name), prereleases=True):
                return True
    return False


def _compile(need: Requirement, limits: list[str], folder: Path) -> None:
    if need.name not in _COMPILED:
        return
    name, module = _COMPILED[need.name]
    if subprocess.run([sys.executable, "-c", f"import torch, {module}"], capture_output=True).returncode == 0:
        return
    print(f"{module} does not import: compiling {name}, which takes minutes", flush=True)
    _pip("setuptools<81", "wheel", "ninja", "psutil")
    requirement = str(need).replace(need.name, name, 1)
    # built for one torch: a folder that several images share keeps their builds apart
    cache = os.environ.get("PIP_CACHE_DIR")
    kept = {"PIP_CACHE_DIR": str(Path(cache, f"torch-{version('torch')}"))} if cache else {}
    before = _runs_first(_EXEC_CHANGES_LOCALS, folder)
    _pip("--no-build-isolation", "--no-deps", "--force-reinstall", requirement, **kept, **before)
    _pip(*limits, *(requires(name) or []))


def _python_tree(need: Requirement, folder: Path) -> str:
    """Builds a wheel of mmcv or Detectron2 without compiled modules; returns its path."""
    environment = _runs_first(_EXEC_CHANGES_LOCALS + _WITHOUT_EXTENSIONS, folder)
    cache = []
    if need.url is not None:
        environment["D2_VERSION_SUFFIX"] = f"+python.{need.url.rpartition('@')[2][:7]}"
        cache = ["--no-cache-dir"]  # from its cache, pip would install this wheel instead of compiling
    arguments = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), *cache, str(need)]
    _pip(*arguments, command="wheel", **environment)
    return str(next(folder.glob(f"{need.name}-*.whl")))


def _runs_first(code: str, folder: Path) -> dict[str, str]:
    """The environment that runs `code` at the start of each Python, including the one that executes setup.py."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def _pip(*arguments: str, command: str = "install", **environment: str) -> None:
    line = [sys.executable, "-m", "pip", command, "--quiet", *arguments]
    subprocess.run(line, env={**os.environ, **environment}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m shared.container", description="Installs what a detector needs and this Python lacks."
    )
    parser.add_argument("files", nargs="*", type=Path, default=[Path("requirements.txt")], metavar="REQUIREMENTS")
    add, compiled = parser.add_argument, os.environ.get("COMPILED_OPERATIONS", "0") not in ("", "0")
    add("--constraint", action="append", default=[], metavar="FILE", help="versions to take, as for pip")
    about = "compile the operations of mmcv and Detectron2 (or COMPILED_OPERATIONS=1)"
    add("--compiled", action="store_true", default=compiled, help=about)
    arguments = parser.parse_args()
    try:
        install_missing([_SHARED, *arguments.files], arguments.constraint, arguments.compiled)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(map(str, error.cmd))}` ended with status {error.returncode}: see above")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename}: no such file. Fix: name a requirements file that exists")


if __name__ == "__main__":
    main()
