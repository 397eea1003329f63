# One target per habit. `make reproduce` and `make test` need Python 3.11 or newer and nothing else.
SHELL := /bin/bash
PYTHON ?= python3
PRESET ?= smoke
DATA ?=
OUT ?= runs/$(PRESET)
BIN := .venv/bin
absolute = $(if $(1),$(if $(filter /%,$(1)),,$(CURDIR)/)$(1))

.PHONY: help setup reproduce test test-slow lint sync format readme docs bundle lab viewer clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/done  ## the pinned environment in .venv

.venv/done: constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

reproduce: setup  ## the whole method: PRESET=smoke|light|strong|paper DATA=folder (default: synthetic pictures)
	$(BIN)/python nbs/runs/reproduce.py --preset $(PRESET) --data '$(DATA)' --out $(OUT)

test: setup lint sync  ## all fast tests: library, chapters, style, notebooks in sync
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow' tests --ignore tests/test_backends.py
	$(BIN)/python -m pytest -q -m 'not slow' tests/test_backends.py  # by themselves: three runtimes in one process are enough

test-slow: setup  ## the slow tests
	$(BIN)/python -m pytest -q -m slow tests

lint: setup  ## ruff's rules (pyproject.toml) and layout
	$(BIN)/ruff check nbs tests docs
	$(BIN)/ruff format --check --quiet nbs tests docs

sync: setup  ## are notebooks clean, and do the modules stand as the notebooks export them?
	$(BIN)/python tests/check_sync.py

format: setup  ## notebooks and tests formatted, modules exported, notebooks cleaned and small
	$(BIN)/ruff format --quiet nbs tests docs
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/tidy.py

readme: setup  ## README.md from nbs/index.ipynb, docs/results.md from results/
	$(BIN)/python nbs/readme.py
	$(BIN)/python docs/results_page.py

docs: setup  ## the documentation site, offline, in _docs/html
	$(BIN)/python docs/build.py _docs

bundle: setup  ## the networks of runs/light become those of the package
	rm -rf segpc_nb/bundle/nucleus segpc_nb/bundle/cytoplasm_*
	cp -r runs/light/bundle/. segpc_nb/bundle/
	$(BIN)/python -c 'from segpc_nb.graphs import write_graphs; write_graphs()'

lab: setup  ## open the chapters and runs in JupyterLab
	$(BIN)/jupyter lab nbs

viewer: setup  ## the viewer as a page: BUNDLE=folder PICTURES=folder (default: the shipped networks, synthetic pictures)
	SEGPC_BUNDLE='$(call absolute,$(BUNDLE))' SEGPC_PICTURES='$(call absolute,$(PICTURES))' $(BIN)/voila nbs/viewer_app.ipynb

clean:  ## remove the environment and what runs left behind
	rm -rf .venv runs data build _docs *.egg-info
