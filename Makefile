# Everything from a fresh clone, each target with its own set-up:
#   make reproduce [PROFILE=emoji]   run every notebook that the profile needs; ends with reports/PROFILE/index.html
#   make test [WORKERS=2]            style, unit tests, notebooks: so many side by side, each in one thread
#   make coverage                    the unit tests, and which lines none of them runs
#   make test-gpu                    the tests that need a GPU, on one; `make test` hides all of them
#   make test-slurm                  a profile on a real Slurm of this machine, where it is installed and nothing is set up
#   make lab                         JupyterLab on notebooks/start_here.ipynb
#   make mutants [ONLY='codalib.models.sampling*']   which small wrong changes to the science the tests let live (hours
#                                    for all of it; goes on where it stopped); `mutmut show NAME` prints one
#   make bench                       time and memory of the quantizers: reports/bench/index.html; goes on where it stopped
#   make faults [KILLS=20]       kill -9, full disks and damage at every stage, hours: reports/faults/README.md
#   make fetch PROFILE=NAME          download the pretrained networks that a profile needs, or say where each file belongs
#   make rehearse PROFILE=NAME       two steps of a profile's training with random weights: memory, work, hours on a GPU
#   make docs                        the API reference, from the docstrings: docs/api/index.html
#   make readme                      what README.md says of the claims, from the committed report: after a new one
#   make notebooks                   run each as it is and keep the outputs of its checked cells, to be committed
#   make clean                       remove the environment and everything under runs/ (trained weights too)
#   make setup [LATEST=1]            the environment alone: the versions of requirements.lock, or the newest
#   make lock                        write requirements.lock anew, with the newest versions
# PYTHON=python3.12 takes another interpreter (3.11 to 3.13). On a machine without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the download of the CUDA libraries.

PYTHON ?= python3
PROFILE ?= emoji
TORCH_INDEX ?=
LATEST ?=
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ONLY ?=
# One module or notebook stays on one worker. Threads that spin while they wait would slow the other worker down.
PARALLEL = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
STAMP := $(VENV)/.installed

.PHONY: setup lock reproduce test coverage test-gpu test-slurm mutants lab bench faults fetch rehearse docs readme notebooks clean FORCE

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock $(if $(LATEST),FORCE)
	@if [ "$$(uname)" != Linux ]; then echo "The environment in $(VENV): 0.6 GB to download."; \
	elif [ -n "$(TORCH_INDEX)" ]; then echo "The environment in $(VENV): about 1 GB to download, below 3 GB on disk."; \
	else echo "The environment in $(VENV): 3.6 GB to download, 7 GB on disk."; \
	    command -v nvidia-smi > /dev/null || echo "No NVIDIA GPU is seen: TORCH_INDEX=https://download.pytorch.org/whl/cpu spares 2.5 GB."; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LATEST),--upgrade --upgrade-strategy eager,--constraint requirements.lock) \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[test]"
	touch $@

FORCE:  # the newest versions are asked for again, whatever is there

# Its first lines, the comment, stay.
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	sed -n '/^#/p' requirements.lock > $(VENV)/lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-header --quiet --upgrade >> $(VENV)/lock
	mv $(VENV)/lock requirements.lock

reproduce: $(STAMP)
	$(BIN)/codalib run --profile $(PROFILE) --exclusive

# The pictures are compared once all notebooks have drawn them.
test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(PARALLEL) tests
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	    export CODALIB_RUNS="$$runs/runs" CODALIB_REPORTS="$$runs/reports" && \
	    $(PARALLEL) --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks && \
	    $(BIN)/python -m pytest tests/pictures_check.py

coverage: $(STAMP)
	$(PARALLEL) --cov --cov-fail-under=85 --cov-report=term:skip-covered tests

test-gpu: $(STAMP)
	CODALIB_TEST_GPU=1 $(BIN)/python -m pytest -m gpu tests

test-slurm: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[test,cluster]"
	$(BIN)/python tests/slurm/proof.py

# mutmut works in a copy, mutants/, and changes no decorated function (`generate`, psnr) and no constant: change those by
# hand. The table counts each file's mutants by what became of them.
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,mutants]"
	CODALIB_DATA=$(CURDIR)/data OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/mutmut run --max-children $(WORKERS) $(if $(ONLY),'$(ONLY)')
	$(BIN)/mutmut results
	$(BIN)/mutmut results --all true | sed -nE 's/^ *(.*)\.x[^.]*: (.*)/\1 \2/p' | sort | uniq -c

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=. notebooks/start_here.ipynb

bench: $(STAMP)
	$(BIN)/codalib bench

faults: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/faults/faults_*.py

fetch: $(STAMP)
	$(BIN)/codalib fetch --profile $(PROFILE)

rehearse: $(STAMP)
	$(BIN)/codalib rehearse --profile $(PROFILE)

docs: $(STAMP)
	$(BIN)/python docs/build_api.py

readme: $(STAMP)
	$(BIN)/python docs/build_readme.py

notebooks: $(STAMP)
	set -e; for notebook in notebooks/*.ipynb; do $(BIN)/codalib run $$notebook --keep-checked; done

clean:
	rm -rf $(VENV) runs mutants .snakemake .coverage
