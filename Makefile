# `make demo` and `make test` need nothing but Python 3.11 or newer: they make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.docs
OLDEST := $(VENV)/.oldest
GPU := $(VENV)/.gpu
PIP := $(BIN)/pip --quiet --disable-pip-version-check
PACKAGES := export runtime plugins serving tools

.PHONY: demo test test-all check docs links format clean

demo: $(DEMO)
	$(BIN)/fastvar-export scenes --prune none --target cpu --out out/demo_dense --force
	$(BIN)/fastvar-export bundle --from out/demo_dense --prune fastvar-infinity --target cpu --out out/demo_pruned --force
	$(BIN)/fastvar compare out/demo_dense out/demo_pruned --seeds 1 --no-vif -o out/demo.png \
	    --prompt "a red sphere left of a blue cube on sand" \
	    --prompt "a glossy purple cone in the middle on a checkered floor at night" \
	    --prompt "three yellow cylinders on snow at sunset" \
	    --prompt "a green cube in front of an orange sphere on grass by day"

test: $(INSTALLED) $(OLDEST) $(GPU)
	$(BIN)/pytest

test-all: $(INSTALLED) $(OLDEST) $(GPU)
	$(BIN)/pytest -m ''

check: $(INSTALLED) links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastvar_trt
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../benchmarks ../../examples
	cd build/types && PYTHONPATH=. ../../$(BIN)/lint-imports --no-cache ../../.importlinter

# Into build/site; a warning is an error.
docs: $(DOCS) links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# mypy, import-linter and mkdocstrings do not follow the mapping of our folders to one package: they get links instead.
links:
	mkdir -p build/types/fastvar_trt
	for name in $(PACKAGES); do ln -sfn ../../../$$name build/types/fastvar_trt/$$name; done

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What `make demo` and looking at it over HTTP need, and no more.
$(DEMO): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e '.[export,cpu,text,quality,serve]'
	touch $@

$(INSTALLED): $(DEMO)
	$(PIP) install -e '.[export,cpu,text,quality,serve,dev]'
# Without the package that they describe, which comes from NVIDIA's index.
	$(PIP) install --no-deps tensorrt-stubs
	touch $@

$(DOCS): $(DEMO)
	$(PIP) install -e '.[docs]'
	touch $@

# The oldest ONNX Runtime that is allowed, over the packages that are there: a promise about its memory is tested on both.
$(OLDEST): $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/oldest
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	    "$$($(VENV)/oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"
	$(VENV)/oldest/bin/pip --quiet --disable-pip-version-check install --no-deps -e . \
	    "onnxruntime==$$(sed -n 's/^cpu = \["onnxruntime>=\(.*\)"\]/\1/p' pyproject.toml)" || \
	    { echo "It is not built for this Python: what is tested on it is skipped."; rm -rf $(VENV)/oldest; }
	touch $@

# onnxruntime-gpu, which overwrites onnxruntime where both are installed, and what the stand-ins for CUDA are compiled
# with: the tests load it over these, on any machine.
$(GPU): $(INSTALLED) tests/cuda_stubs.py tests/stubs/cuda.cpp
	rm -rf $(VENV)/gpu
	$(PIP) install --no-deps --target $(VENV)/gpu nvidia-cuda-runtime nvidia-cuda-crt \
	    "$$(sed -n 's/^ *"onnxruntime-gpu\[cuda,cudnn\]\(.*\); .*",$$/onnxruntime-gpu\1/p' pyproject.toml)" && \
	    $(BIN)/python tests/cuda_stubs.py $(VENV)/gpu $(VENV)/gpu/stubs && touch $@ || \
	    { echo "onnxruntime-gpu or a compiler is not here: what is tested on it is skipped."; rm -rf $(VENV)/gpu; }

clean:
	rm -rf $(VENV) build out
