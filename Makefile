# Everything runs from a bare clone: the first target that needs them installs Slurm's packages and a venv.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up

# Each version comes from one Debian suite: scripts/slurm_rootfs.py has the table.
SLURM_VERSIONS := 22.05 24.11 26.05
TEST_SLURM := $(addprefix test-slurm-,$(SLURM_VERSIONS))

.PHONY: help setup test test-all $(TEST_SLURM) test-slurm-all demo bench chaos hostile lint format clean

help:
	@echo "make setup     install what is missing (Slurm from Debian's packages, a venv in $(VENV))"
	@echo "make test      test against a real private Slurm; without the tests marked slow"
	@echo "make test-all  the same, with the slow tests"
	@echo "make test-slurm-VERSION  all tests with another Slurm ($(SLURM_VERSIONS)), in its own Debian; as root"
	@echo "make test-slurm-all      the same with each version"
	@echo "make demo      show how kernels start, share a job, restart and end"
	@echo "make bench     measure"
	@echo "make chaos     break the parts that a gateway depends on, a hundred times (docs/admins/reliability.md)"
	@echo "make hostile   attack a gateway as hostile users do, and measure another user meanwhile; as root"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff format the code"
	@echo "make clean     remove what these targets made in this directory"

setup: $(STAMP)

# Set up again when the dependencies have changed.
$(STAMP): pyproject.toml scripts/setup.sh
	scripts/setup.sh $(VENV)
	@touch $@

# ARGS is passed on: make test ARGS="-k launcher". Tests mostly wait for Slurm, so several processes share the tests, a
# file at a time, each with its own Slurm. WORKERS=0 runs all tests in one process, as for --pdb.
ARGS ?=
WORKERS ?= 3
PYTEST = $(PYTHON) -m pytest $(if $(ALL),,-m "not slow")
# Run the failed tests again, alone; only if the run was complete and some tests failed (pytest's exit status 1).
AGAIN_ALONE = { test $$? = 1 && echo "==> the failed tests are run again" && \
  $(PYTEST) --last-failed --last-failed-no-failures=none $(ARGS); }

test: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS) $(if $(AGAIN),|| $(AGAIN_ALONE))

test-all:
	@$(MAKE) --no-print-directory test ALL=1

# These targets set up a venv in the root file system, and need none here.
$(TEST_SLURM): test-slurm-%:
	python3 scripts/slurm_rootfs.py $* $(ARGS)

# One after the other, even if one of them fails.
test-slurm-all:
	@$(MAKE) --no-print-directory --keep-going --jobs=1 $(TEST_SLURM)

demo: $(STAMP)
	$(PYTHON) scripts/demo.py

bench: $(STAMP)
	$(PYTHON) -m bench

# Fifty rounds for each of the two kinds of store. make chaos SEED=2 uses another order.
ROUNDS ?= 50
KERNELS ?= 20
SEED ?= 1

chaos: $(STAMP)
	CHAOS_ROUNDS=$(ROUNDS) CHAOS_KERNELS=$(KERNELS) CHAOS_SEED=$(SEED) $(PYTHON) -m pytest -s -o faulthandler_timeout=0 \
		tests/gateway/test_chaos.py -k whatever

# The attacks of docs/admins/security.md, in their full size. ATTACK is a part of an attack's name.
hostile: $(STAMP)
	HOSTILE=full HOSTILE_ONLY="$(ATTACK)" $(PYTHON) -m pytest -s --tb=line -o faulthandler_timeout=0 tests/gateway/hostile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .slurm build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find gateway_slurm launchers tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
