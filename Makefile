# demo · test · docs · bench: each sets up all that it needs, in .venv (VENV=… for another place).

VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PY = $(abspath $(VENV))/bin/python
READY = $(VENV)/.ready-$(notdir $(CONSTRAINTS))
ALL_READY = $(READY)-all

.PHONY: demo test test-oldest test-compiled test-gpu gpu-kit lint bench docs docs-serve links

# What pip calls the distribution is not upgraded: torch and torchvision must be of one release.
$(READY): setup.cfg shared/requirements.txt efficientdet/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip 'setuptools<81' wheel
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) '.[efficientdet,export,search,test]'
	touch $@

# As a container is made ready: MMDetection over mmcv without compiled operations, and Detectron2's Python. A library that
# is on no package index is skipped where GitHub cannot be reached.
LIBRARIES = $(filter-out shared/% docs/% efficientdet/%, $(wildcard */requirements.txt))
READY_FOR = PATH="$(abspath $(VENV))/bin:$$PATH" timeout 600 $(PY) -m shared.container --constraint $(CONSTRAINTS)
install = for file in $(LIBRARIES); do $(READY_FOR) $(1) $$file || { grep -q github.com $$file && \
		echo "$$file: GitHub cannot be reached: the detector's tests will be skipped"; } || exit 1; done
$(ALL_READY): $(READY) $(LIBRARIES)
	$(call install,)
	touch $@

# With the operations compiled, in a place of their own, for some minutes.
COMPILED_READY = .venv-compiled/.ready-compiled
$(COMPILED_READY): $(LIBRARIES)
	$(MAKE) .venv-compiled/.ready-$(notdir $(CONSTRAINTS)) VENV=.venv-compiled
	$(MAKE) compiled VENV=.venv-compiled
	touch $@

.PHONY: compiled
compiled:
	$(call install,--compiled)

# Writes a synthetic data set, trains a small EfficientDet on it and draws what it finds.
demo: $(READY)
	$(PY) -m shared synthetic demo/data
	rm -rf demo/run
	cd efficientdet && $(PY) model_def.py train demo.yaml --output-dir ../demo/run

# two at a time; a file's tests stay together, so that they share its trained run
TWO = -n 2 --dist worksteal
test: lint $(ALL_READY)
	$(PY) -m pytest $(TWO)

# The same tests in the versions of Determined's default task image, on Python 3.10 if it is installed.
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt \
		PYTHON="$$(python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))"

# The operations in PyTorch against those that are compiled.
test-compiled: $(COMPILED_READY)
	.venv-compiled/bin/python -m pytest -n 2 tests/*/test_*_operations.py

# What only a GPU can show. With PY=python3 nothing is set up: for a machine that has all of it, and no network.
test-gpu: $(if $(filter command,$(origin PY)),,$(ALL_READY))
	$(PY) -m pytest -m gpu --durations=10 tests/gpu

# Packs into the folder gpu-kit the packages that a GPU machine with PyTorch and no network needs for tests and benchmarks.
gpu-kit: $(ALL_READY)
	benchmarks/gpu_kit.sh pack

.PHONY: pytest
pytest: $(ALL_READY)
	$(PY) -m pytest $(TWO)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(abspath $(VENV))/bin/shellcheck */startup-hook.sh .ci/run benchmarks/gpu_kit.sh deploy/slurm/train.sbatch

bench: $(ALL_READY)
	$(PY) benchmarks/evaluation.py coco-numbers
	$(PY) benchmarks/annotations.py memory
	$(PY) benchmarks/annotations.py check
	$(PY) benchmarks/annotations.py ranks
	$(PY) benchmarks/annotations.py disk
	OMP_NUM_THREADS=1 $(PY) benchmarks/remote.py remote
	OMP_NUM_THREADS=1 $(PY) benchmarks/scale.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/training_step.py step
	OMP_NUM_THREADS=1 $(PY) benchmarks/against_transformers.py step
	for library in mmdetection detectron2; do for what in step memory evaluation; do \
		OMP_NUM_THREADS=1 $(PY) benchmarks/against_$$library.py $$what || exit 1; \
	done; done

# The documentation, in an environment of its own: it imports none of the code.
DOCS_READY = .venv-docs/.ready
$(DOCS_READY): docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

docs: $(DOCS_READY)
	.venv-docs/bin/mkdocs build --strict

docs-serve: $(DOCS_READY)
	.venv-docs/bin/mkdocs serve

# Determined uploads a detector's folder and follows no link to a folder: shared/ is in it as a link a file. Python needs
# no __init__.py in its folders. The documentation's API pages do.
links:
	for detector in $$(dirname */model_def.py); do \
		rm -rf $$detector/shared && \
		for file in $$(cd shared && find . -name '*.py' ! -path './*/__init__.py' -o -name '*.jinja' -o -name requirements.txt | sort); do \
			link=$$detector/shared/$${file#./} && mkdir -p "$$(dirname $$link)" && \
			ln -s --relative "shared/$${file#./}" "$$link" || exit 1; \
		done; \
	done
