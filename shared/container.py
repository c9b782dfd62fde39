"""`python3 -m shared.container`: installs what a container lacks, for the detectors' startup-hook.sh.

Torch stays the image's. Its version may be one that pip takes for older than any requirement (2.3.0a0+…), so what
depends on torch is installed without its dependencies, and theirs are named. Only the standard library is here
already.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version

# what shared/ imports beside torch and determined
_SHARED = (
    "fsspec",
    "hotcoco>=1.3",
    "matplotlib",
    "msgspec",
    "numpy",
    "omegaconf",
    "pillow",
    "pycocotools",
    "pyyaml",
    "tabulate",
    "tenacity",
    "tensorboard",
    "tqdm",
)
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "opencv-python-headless": "cv2", "hydra-core": "hydra"}


def install_missing(on_torch: list[str], plain: list[str]) -> None:
    """Installs those of the requirements whose modules are not there.

    Args:
        on_torch: requirements that depend on torch.
        plain: requirements that do not, beside those of `shared/`.
    """
    missing = [need for need in on_torch if not _is_there(need)]
    if importlib.util.find_spec("torchvision") is None:
        # torch 2.N and torchvision 0.(N + 15) are one release
        missing.append(f"torchvision==0.{int(version('torch').split('.')[1]) + 15}.*")
    if missing:
        _pip("--no-deps", *missing)
    if missing := [need for need in (*_SHARED, *plain) if not _is_there(need)]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as keep:
            keep.write(_numpy_of_the_image())
            keep.flush()
            _pip("--constraint", keep.name, *missing)


def build(requirement: str, module: str) -> None:
    """Compiles a requirement against the image's torch, where its module does not import."""
    if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0:
        return
    print(
        f"{module} does not import: building {requirement}, which takes minutes; an image with it starts at once",
        flush=True,
    )
    _pip("setuptools<81", "wheel", "ninja", "psutil")
    _pip("--no-build-isolation", "--no-deps", "--force-reinstall", requirement)


def _is_there(requirement: str) -> bool:
    name = re.split(r"[<>=]", requirement)[0]
    return importlib.util.find_spec(_MODULES.get(name, name.replace("-", "_"))) is not None


def _numpy_of_the_image() -> str:
    # the one that the image's torch was built for
    try:
        return f"numpy=={version('numpy')}\n"
    except PackageNotFoundError:
        return ""


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install what this container lacks.")
    parser.add_argument("--on-torch", nargs="*", default=[], metavar="REQUIREMENT")
    parser.add_argument("--plain", nargs="*", default=[], metavar="REQUIREMENT")
    parser.add_argument("--build", nargs=2, metavar=("REQUIREMENT", "MODULE"))
    arguments = parser.parse_args()
    install_missing(arguments.on_torch, arguments.plain)
    if arguments.build:
        build(*arguments.build)


if __name__ == "__main__":
    main()
