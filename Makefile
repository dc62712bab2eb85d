# Everything runs from a bare clone: the first target that needs it sets up Slurm's packages and a venv.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up

# Each is Debian's, of one suite: scripts/slurm_rootfs.py has the table.
SLURM_VERSIONS := 22.05 24.11 26.05
TEST_SLURM := $(addprefix test-slurm-,$(SLURM_VERSIONS))

.PHONY: help setup test test-all $(TEST_SLURM) test-slurm-all demo bench chaos lint format clean

help:
	@echo "make setup     install what is missing (Slurm from Debian's packages, a venv in $(VENV))"
	@echo "make test      test against a real private Slurm; leaves out what is marked slow"
	@echo "make test-all  the same with the slow ones"
	@echo "make test-slurm-VERSION  all tests with another Slurm ($(SLURM_VERSIONS)), in a Debian of its own; as root"
	@echo "make test-slurm-all      the same with each of them"
	@echo "make demo      see kernels start, share a job, restart, and go"
	@echo "make bench     measure"
	@echo "make chaos     break what is under a gateway, a hundred times (docs/admins/reliability.md)"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff format the code"
	@echo "make clean     remove what the above made in this directory"

setup: $(STAMP)

# Anew when what is to be installed has changed.
$(STAMP): pyproject.toml scripts/setup.sh
	scripts/setup.sh $(VENV)
	@touch $@

# ARGS is passed on: make test ARGS="-k launcher". Most of a test's time is spent waiting for Slurm, so that several
# processes share the tests, a file at a time, each with a Slurm of its own; WORKERS=0 runs them in one, as for --pdb.
ARGS ?=
WORKERS ?= 3
PYTEST = $(PYTHON) -m pytest $(if $(ALL),,-m "not slow")
# What failed, and nothing else, by itself; only where all tests were run and no more than some failed (pytest's 1).
AGAIN_ALONE = { test $$? = 1 && echo "==> what failed is tried once more" && \
  $(PYTEST) --last-failed --last-failed-no-failures=none $(ARGS); }

test: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile $(ARGS) $(if $(AGAIN),|| $(AGAIN_ALONE))

test-all:
	@$(MAKE) --no-print-directory test ALL=1

# They set up a venv of their own, and need none here.
$(TEST_SLURM): test-slurm-%:
	python3 scripts/slurm_rootfs.py $* $(ARGS)

# One after the other, also when one of them fails.
test-slurm-all:
	@$(MAKE) --no-print-directory --keep-going --jobs=1 $(TEST_SLURM)

demo: $(STAMP)
	$(PYTHON) scripts/demo.py

bench: $(STAMP)
	$(PYTHON) -m bench

# Fifty rounds for each of the two kinds of store; make chaos SEED=2 has another order.
ROUNDS ?= 50
KERNELS ?= 20
SEED ?= 1

chaos: $(STAMP)
	CHAOS_ROUNDS=$(ROUNDS) CHAOS_KERNELS=$(KERNELS) CHAOS_SEED=$(SEED) $(PYTHON) -m pytest -s -o faulthandler_timeout=0 \
		tests/gateway/test_chaos.py -k whatever

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
