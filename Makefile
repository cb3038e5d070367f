# `make demo` and `make test` need nothing but Python 3.11 or newer: they make their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := export runtime plugins serving tools

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/fastvar-export demo --prune none --out out/demo_dense --force
	$(BIN)/fastvar-export bundle --from out/demo_dense --prune fastvar-demo --out out/demo_pruned --force
	$(BIN)/fastvar generate out/demo_pruned --class 0 -o out/astronaut.png
	$(BIN)/fastvar compare out/demo_dense out/demo_pruned --class 0 --class 1 --class 2 --class 3 --seeds 3 -o out/demo.png

test: $(INSTALLED)
	$(BIN)/pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# mypy does not follow the mapping of our folders to one package: it gets a folder of links instead.
	mkdir -p build/types/fastvar_trt
	for name in $(PACKAGES); do ln -sfn ../../../$$name build/types/fastvar_trt/$$name; done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastvar_trt

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[export,cpu,quality,serve,train,dev]'
# Without the package that they describe, which comes from NVIDIA's index.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps tensorrt-stubs
	touch $@

clean:
	rm -rf $(VENV) build out
