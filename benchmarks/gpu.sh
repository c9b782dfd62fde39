#!/usr/bin/env bash
# Every step benchmark at its full size on one GPU, within 10 minutes in all; one that fails or runs out of its time
# does not keep the next from running. The report goes to benchmarks/results-<GPU>-<date>.txt, or into the folder OUT.
#
#   benchmarks/gpu.sh             with .venv's Python where there is one (`make test` makes it), else python3
#   PY=/opt/conda/bin/python benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PY:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
if ! name=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>&1); then
    echo "benchmarks/gpu.sh: $python finds no GPU: ${name##*$'\n'}" >&2
    exit 1
fi
out=${OUT:-benchmarks}
mkdir -p "$out" || exit 1
report=$out/results-${name//[^A-Za-z0-9.]/-}-$(date +%Y%m%d-%H%M%S).txt
failed=0

# has PACKAGE MODULE…: whether the modules can be imported; else the report says why not
has() {
    local package=$1 reason module statement=""
    shift
    for module in "$@"; do statement+="import $module; "; done
    reason=$("$python" -c "$statement" 2>&1) && return
    printf '\n# left out: %s is not here: %s\n' "$package" "${reason##*$'\n'}"
    return 1
}

# run SECONDS ARGUMENTS…: a benchmark, with a limit
run() {
    local limit=$1 status=0 started=$SECONDS
    shift
    printf '\n$ python %s\n' "$*"
    timeout --kill-after=10 "$limit" "$python" "$@" || status=$?
    case $status in
        0) echo "# $((SECONDS - started)) s" ;;
        124 | 137) echo "# FAILED: not done after $limit s" ;;
        *) echo "# FAILED: exit status $status after $((SECONDS - started)) s" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
}

benchmarks() {
    date -u '+%Y-%m-%d %H:%M UTC'
    git log -1 --format='commit %H %s' 2> /dev/null || echo "commit unknown: no git checkout"
    git diff --quiet HEAD 2> /dev/null || echo "with changes that are not committed"
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit --format=csv,noheader
    echo "$(nproc) CPU cores"
    "$python" - << 'END'
import importlib.metadata, platform, torch

print("python", platform.python_version(), "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
for name in ("torch", "torchvision", "numpy", "determined", "effdet", "timm", "mmcv", "mmcv-full", "mmdet", "detectron2"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
END
    if has EfficientDet effdet timm; then
        run 150 benchmarks/training_step.py --full --batch-size 16 --workers 6 --blocks 9
    fi
    if has MMDetection mmdet; then
        run 200 benchmarks/against_mmdetection.py step --full --workers 4
    fi
    if has Detectron2 detectron2.config; then
        run 200 benchmarks/against_detectron2.py step --full --workers 4
    fi
    echo
    [ "$failed" -eq 0 ] && echo "all done" || echo "some FAILED"
    return "$failed"
}

benchmarks 2>&1 | tee "$report"
status=${PIPESTATUS[0]}
echo "the report: $report" >&2
exit "$status"
