# make train    train the tiny model on the bundled novels (CPU, under 3 minutes once installed)
# make test     format, lint, types, tests
# PYTHON=python3.12 picks the interpreter of the new .venv, EXTRA=cuda13 adds jax's CUDA packages.

PYTHON ?= python3
EXTRA ?=
comma := ,
EXTRAS = dev$(if $(EXTRA),$(comma)$(EXTRA))
BIN := .venv/bin
INSTALLED := .venv/installed-$(if $(EXTRA),$(EXTRA),cpu)

.PHONY: train test clean

train: $(INSTALLED)
	$(BIN)/python -m train run tiny

test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv
