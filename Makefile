# Two commands matter: `make run` and `make test`. Each makes .venv on first use, then does its job.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SEED   ?= 1
RECIPE ?= tiny

.PHONY: help run try-me try test test-slow lab export outputs readme docs check-docs env
.DEFAULT_GOAL := help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18
	@echo "  (PYTHON=python3.12 picks the Python that makes $(VENV); RECIPE=, SEED= change \`make run\`)"

env: $(STAMP)    ## only make .venv and install what constraints.txt pins

$(STAMP): setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pgolf needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "cannot make $(VENV): install the venv module (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): one to three minutes without a word"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[lab,dev]' -c constraints.txt \
	  --config-settings editable_mode=compat
	@touch $@

run: $(STAMP)    ## train, pack, reload and score the tiny model; ends with the result table
	$(BIN)/python -m pgolf.lab.execute nbs/runs/record.ipynb out/record-$(RECIPE).ipynb \
	  -p recipe $(RECIPE) -p seed $(SEED) --no-progress-bar --stdout-file - --stderr-file -

try-me: $(STAMP) ## the same as run, at the smallest size: a first look in under a minute
	$(BIN)/python -m pgolf.lab.execute nbs/runs/record.ipynb out/record-$(RECIPE)-smoke.ipynb \
	  -p recipe $(RECIPE) -p scale smoke -p seed $(SEED) --no-progress-bar --stdout-file - --stderr-file -

try: $(STAMP)    ## NB=2_model/xsa: export that notebook, run it, and take every recipe through a small run
	@test -n "$(NB)" || { echo "make try wants a notebook: make try NB=2_model/xsa"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python tools/try_one.py $(NB)

test: $(STAMP)   ## every notebook and the quick tests, in the order that fails fastest
	$(BIN)/ruff check .
	$(BIN)/python tools/check_notebooks.py
	$(BIN)/python tools/readme.py --check
	$(BIN)/python -m pytest -m "not slow" tests/test_house.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/check_outputs.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --ignore tests/test_house.py

test-slow: $(STAMP) ## the other tests: whole runs and studies, kills, ranks, dry runs, proofs, the browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lab: $(STAMP)    ## open the notebooks in JupyterLab; ARGS="--port 9000 --no-browser" are passed on
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) nbs

export: $(STAMP) ## after an edit: clean notebooks, export them to pgolf/, write README.md
	$(BIN)/python tools/check_notebooks.py --fix
	$(BIN)/python tools/readme.py

outputs: $(STAMP) ## run the notebooks (NB=2_model: those of a wing) and store what they print now
	OMP_NUM_THREADS=1 $(BIN)/python tools/check_outputs.py --fix $(if $(NB),nbs/$(NB))

docs: $(STAMP)   ## the site, into _docs: notebooks, API, records; installs mkdocs first; three minutes
	@$(BIN)/python -c 'import mkdocs, material, mkdocs_jupyter, latex2mathml' 2>/dev/null || $(BIN)/python -m pip install -q \
	  --disable-pip-version-check -c constraints.txt $$(sed -n 's/^docs_requirements = //p' settings.ini)
	$(BIN)/python tools/docs.py

check-docs:      ## every page of _docs in Chromium, at desk and at phone width
	$(BIN)/python tools/check_docs.py

readme: $(STAMP) ## only README.md, from nbs/index.ipynb, and its pictures of records
	$(BIN)/python tools/readme.py
