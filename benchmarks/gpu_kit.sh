#!/usr/bin/env bash
# What only a GPU can show, on a machine without a network.
#
#   benchmarks/gpu_kit.sh pack [--all]               here: gathers what a machine with Python 3.12 and torch lacks
#   benchmarks/gpu_kit.sh run tests|benchmarks       there, in this checkout with the kit: at most 10 minutes
#   benchmarks/gpu_kit.sh run tests --pretended      the same on the pretended GPU of tests/pretended_gpu
#
# `pack` writes to the folder gpu-kit, or to KIT. `--all` is for a machine with torch and torchvision alone. `run` installs
# the kit inside that folder, if it is there, and writes one JSON file to benchmarks, or to OUT. Environment variables:
#   PY               the Python; default .venv's if it exists, else python3
#   PYTHON_VERSION   pack: the other machine's; default 3.12
#   DETECTRON2       pack: a checkout of Detectron2, instead of the one installed in PY
#   EFFDET           pack: a checkout of github.com/rwightman/efficientdet-pytorch, to compare with its train.py
set -euo pipefail

cd "$(dirname "$0")/.."
started=$(date +%s)
kit=$(realpath -m "${KIT:-gpu-kit}")
python=${PY:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3

fail() {
    echo "benchmarks/gpu_kit.sh: $*" >&2
    exit 1
}

pack() {
    local packages=benchmarks/gpu_kit.txt glibc platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    case ${1-} in
        "") ;;
        --all) packages=benchmarks/gpu_kit_all.txt ;;
        *) fail "pack: unknown option \"$1\". Fix: pass --all or nothing." ;;
    esac
    for glibc in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    rm -rf "$kit"/{wheels,effdet,trees.tar.gz} "$kit"/cpython-*
    mkdir -p "$kit/wheels"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp "${platforms[@]}" \
        --python-version "${PYTHON_VERSION:-3.12}" --constraint constraints.txt --requirement "$packages" --dest "$kit/wheels"
    "$python" benchmarks/gpu_kit.py trees --kit "$kit"
    echo "$kit: $(du -sh "$kit" | cut -f1)"
}

# Installs the kit once: packages stay in a folder of their own, before those of the machine.
set_up() {
    local site
    [ -d "$kit/wheels" ] || return 0
    # tests and reports know a library by this folder's name
    site=$kit/$("$python" -c 'import sys; print(sys.implementation.cache_tag)')/site-packages
    if [ ! -e "$site/.ready" ]; then
        rm -rf "$site"
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$kit"/wheels/*.whl ||
            fail "$kit: its wheels are not for $python. Fix: pack again with the PYTHON_VERSION of that Python."
        tar -C "$site" -xzf "$kit/trees.tar.gz"
        touch "$site/.ready"
    fi
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
}

case ${1-} in
    pack)
        pack "${@:2}"
        ;;
    run)
        case ${2-} in
            tests | benchmarks) ;;
            *) fail "run: unknown argument \"${2-}\". Fix: use run tests or run benchmarks." ;;
        esac
        set_up
        exec "$python" benchmarks/gpu_kit.py "${@:2}" --kit "$kit" --out "${OUT:-benchmarks}" --started "$started"
        ;;
    *)
        fail "unknown command \"${1-}\". Fix: use pack, run tests or run benchmarks."
        ;;
esac
