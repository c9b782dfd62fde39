"""What `gpu_kit.sh` does in Python: a kit's trees, and runs of the tests and the benchmarks, each into one JSON file.

The JSON file has `device`, `machine`, `packages`, `commit`, `seconds`, `failed` (a count) and `results`. Each test or
benchmark has one result: its `outcome`, `seconds` and `measured`, and a `reason` unless it passed. The file is written
after each benchmark, and when the tests end.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shared.durable import write_file

SECONDS = 570  # from the start of gpu_kit.sh to the last write
PURE_PYTHON = ("antlr4-python3-runtime", "detectron2", "fvcore", "mmcv")  # they have no wheel on PyPI
NEEDED = ("addict", "cv2", "determined", "effdet", "hotcoco", "matplotlib", "msgspec", "omegaconf", "pathspec")
NEEDED += ("psutil", "pytest", "scipy", "tabulate", "tensorboard", "timm", "yaml")
LIBRARIES = {"MMDetection": "import mmcv, mmdet", "Detectron2": "import detectron2.config"}
PACKAGES = ("torch", "torchvision", "numpy", "determined", "effdet", "timm", "mmcv", "mmcv-full", "mmdet", "detectron2")
TESTS = (*("-m", "pytest", "-q", "-p", "gpu_kit_plugin", "-p", "no:cacheprovider"), "-m", "gpu", "tests/gpu")


# --- pack -------------------------------------------------------------------------------------------


def trees(kit: Path) -> None:
    """Writes `trees.tar.gz`: the pure-Python packages installed here, without compiled files."""
    checkout, upstream = os.environ.get("DETECTRON2"), os.environ.get("EFFDET")
    with tarfile.open(kit / "trees.tar.gz", "w:gz") as tar:
        for name in PURE_PYTHON:
            if name == "detectron2" and checkout:
                tar.add(Path(checkout) / name, name, filter=_pure)
                tar.add(Path(checkout) / "configs", f"{name}/model_zoo/configs", filter=_pure)
                continue
            try:
                files = importlib.metadata.distribution(name).files or ()
            except importlib.metadata.PackageNotFoundError:
                _left_out(name)
                continue
            for file in files:
                if file.parts[0] != ".." and file.locate().exists():
                    tar.add(file.locate(), str(file), filter=_pure)
    if upstream:
        (kit / "effdet").mkdir()
        (kit / "effdet/train.py").write_bytes((Path(upstream) / "train.py").read_bytes())


def _pure(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    is_a_link = member.issym() or member.islnk()
    return None if is_a_link or "__pycache__" in member.name or member.name.endswith((".pyc", ".so")) else member


def _left_out(name: str) -> None:
    variable = ", or set DETECTRON2 to a checkout" if name == "detectron2" else ""
    print(
        f"{name}: it is not installed in {sys.executable}, so the kit omits it."
        f" Fix: run `make gpu-kit`, which installs it{variable}.",
        file=sys.stderr,
    )


# --- run --------------------------------------------------------------------------------------------


class Report:
    """The JSON file of one run."""

    def __init__(self, path: Path, facts: dict, started: float):
        self.path, self.started = path, started
        self.content = {**facts, "seconds": 0.0, "failed": 0, "results": []}

    def seconds_left(self) -> float:
        return self.started + SECONDS - time.time()

    def write(self, results: list[dict]) -> None:
        self.content["results"] = results
        self.content["failed"] = sum(result["outcome"] == "failed" for result in results)
        self.content["seconds"] = round(time.time() - self.started, 1)
        write_file(self.path, json.dumps(self.content, indent=1) + "\n")


def facts(what: str) -> dict:
    """The device and the software. Exits with one line if there is no GPU, or if the kit is not complete."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"benchmarks/gpu_kit.sh: {sys.executable} lacks {', '.join(missing)}."
            " Fix: make the kit with `benchmarks/gpu_kit.sh pack --all` and copy it here."
        )
    import torch

    try:
        device = torch.cuda.get_device_properties(0)
    except Exception as error:  # of many kinds
        problem = str(error).strip().splitlines()[-1].rstrip(".")
        sys.exit(f"benchmarks/gpu_kit.sh: {sys.executable} finds no GPU: {problem}. Fix: use a machine with a GPU.")
    smi = "nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv,noheader"
    return {
        "what": what,
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _output("git log -1 --format=%H"),
        "has_changes": bool(_output("git status --porcelain --untracked-files=no")),
        "device": {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "driver, highest clock, power limit": _output(smi),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "machine": {"cpus": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _imports(statement: str) -> bool:
    return subprocess.run([sys.executable, "-c", statement], cwd="/", capture_output=True).returncode == 0


def _output(command: str) -> str | None:
    try:
        return subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def run_program(arguments: list[str], seconds: float, stdout=None, stderr=None, **environment: str) -> int | None:
    """The exit status of a Python program; None if it was killed, with all that it started, after `seconds`."""
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- tests ------------------------------------------------------------------------------------------


def tests(report: Report, pretended: bool, selection: str | None) -> int:
    """Runs tests/gpu, the most telling first; those that find no time left are `not run`."""
    arguments = list(TESTS)
    if pretended:  # torch.compile would compile for a real one
        arguments[2:2] = ["-p", "pretended_gpu.plugin"]
        selection = f"({selection or 'test'}) and not torch_compile"
    if selection:
        arguments += ["-k", selection]
    results, status = {}, None
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "tests.jsonl"
        left = report.seconds_left()
        environment = {"GPU_KIT_RECORD": str(record), "GPU_KIT_DEADLINE": str(time.time() + left - 30)}
        try:
            status = run_program(arguments, left, PYTEST_ADDOPTS="", **environment)
        finally:
            for line in record.read_text().splitlines() if record.exists() else ():
                result = json.loads(line)
                results[result["test"]] = result
            report.write(list(results.values()))
    counts = dict.fromkeys(("passed", "failed", "skipped", "not run"), 0)
    for result in results.values():
        counts[result["outcome"]] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] or status not in (0, None) else 0


# --- benchmarks -------------------------------------------------------------------------------------

# at their full size, and on the pretended GPU: the detector, its limit in seconds, its program and arguments
FULL = (
    ("EfficientDet", 150, "training_step.py step --full --batch-size 16 --workers 6 --blocks 9"),
    ("MMDetection", 200, "against_mmdetection.py step --full --workers 4"),
    ("Detectron2", 200, "against_detectron2.py step --full --workers 4"),
)
SMALL = (
    ("EfficientDet", 180, "training_step.py step --batch-size 1 --block 1 --blocks 1 --images 8 --workers 0"),
    ("MMDetection", 180, "against_mmdetection.py step --batch-size 1 --block 1 --blocks 1"),
    ("Detectron2", 180, "against_detectron2.py step --batch-size 1 --block 1 --blocks 1"),
)


def benchmarks(report: Report, pretended: bool, kit: Path) -> int:
    """Runs each detector's steps against upstream's loop; one that fails does not stop the next."""
    results = []
    for detector, limit, command in SMALL if pretended else FULL:
        result = {"benchmark": detector, "outcome": "skipped", "seconds": 0.0, "measured": None, "command": command}
        results.append(result)
        if detector in LIBRARIES and not _imports(LIBRARIES[detector]):
            result["reason"] = f"{detector} cannot be imported"
        else:
            (program, *arguments), environment = command.split(), {}
            if detector == "EfficientDet" and (kit / "effdet").is_dir() and not pretended:
                environment["EFFDET"] = str(kit / "effdet")
            program = [str(ROOT / "benchmarks" / program), *arguments]
            if pretended:
                program = ["-m", "pretended_gpu.program", *program]
            result.update(_measure(program, min(limit, report.seconds_left()), environment))
        report.write(results)
        print(json.dumps(result, indent=1), flush=True)
    return 1 if report.content["failed"] else 0


def _measure(program: list[str], seconds: float, environment: dict[str, str]) -> dict:
    started = time.time()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        status = run_program(program, seconds, output, errors, **environment)
        for file in (output, errors):
            file.seek(0)
        text, problems = output.read(), errors.read()
    took = {"seconds": round(time.time() - started, 1)}
    found = re.search(r"^\{.*^\}", text, re.MULTILINE | re.DOTALL)
    if status == 0 and found:
        return {**took, "outcome": "passed", "measured": json.loads(found[0])}
    reason = f"exit status {status}" if status is not None else f"not done after {seconds:.0f} s"
    return {**took, "outcome": "failed", "reason": f"{reason}: {problems.strip()[-2000:]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("trees", "tests", "benchmarks"))
    parser.add_argument("--pretended", action="store_true", help="on the pretended GPU")
    parser.add_argument("-k", dest="selection", help="tests: pytest's expression")
    parser.add_argument("--kit", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--started", type=float, default=time.time(), help="when the 10 minutes began")
    arguments = parser.parse_args()
    if arguments.what == "trees":
        trees(arguments.kit)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops what was started, and writes the report
    if arguments.pretended:
        sys.path.insert(0, str(ROOT / "tests"))
        from pretended_gpu.cuda import install

        install()
    measured_on = facts(arguments.what)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", measured_on["device"]["name"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out.absolute() / f"{arguments.what}-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report = Report(path, measured_on, arguments.started)
    report.write([])
    if arguments.what == "tests":
        status = tests(report, arguments.pretended, arguments.selection)
    else:
        status = benchmarks(report, arguments.pretended, arguments.kit)
    print(f"the report: {path}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
