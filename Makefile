# Two commands for a newcomer: `make demo` and `make test`. Both create .venv and install the pinned dependencies first.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export MAPLE_DATA ?= ../shared/data
# One thread per numeric library unless told otherwise: Ray and the tests run several processes.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help demo test unit lint bench doctor clean

help:  ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## The whole loop on a simulated shop, or on real data: make demo DATA=path/to/online-retail; KEEP=1 leaves it up
	$(BIN)/maple demo $(if $(DATA),--data $(DATA)) $(if $(KEEP),--keep) $(ARGS)

test: unit $(STAMP)  ## All tests
	$(BIN)/python -m pytest tests/integration tests/browser $(ARGS)

unit: $(STAMP)  ## The tests that start no Ray, in about two minutes
	$(BIN)/python -m pytest -n 2 --ignore=tests/integration --ignore=tests/browser $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## One benchmark: make bench NAME=quality
	@test -n "$(NAME)" || { echo "say which: make bench NAME=$$(ls benchmarks/*.py | xargs -n1 basename | sed 's/.py//' | paste -sd'|')"; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

doctor: $(STAMP)  ## Versions, Ray flags, ports, stores
	$(BIN)/maple doctor

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "Maple needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Installing the pinned dependencies into $(VENV): about 3 GB, some minutes on the first run"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,redis,content]'
	touch $@

clean:  ## Remove the virtual environment and what the demo wrote
	rm -rf $(VENV) .maple build *.egg-info
