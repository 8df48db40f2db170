# Every target creates `.venv` first where it needs it: Python 3.11+, pip and make are enough.
# A target is documented by the `## ` comment behind its name; `make help` prints these.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

N ?= 10
SEED ?= 1
IMAGES ?= 2000
STEPS ?= 2
ONLY ?= system
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test fast near system coverage check fuzz attacks chaos permanent losses cluster clean

help: ## List the targets, one line each
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## Generate 64 images with the shipped model and verify the output
	$(BIN)/python jobs/demo_prompts.py out/demo-prompts.parquet
	rm -rf out/demo
	$(BIN)/batchgen run jobs/demo.yaml
	$(BIN)/batchgen verify out/demo
	@echo "look at out/demo/_batchgen/contact-sheet.png"

test: $(VENV)/.installed ## Run all tests except those of `make system`
	$(PYTEST) tests/unit tests/model tests/ray

fast: $(VENV)/.installed ## Run the tests that load no model and no Ray, in under a minute
	$(PYTEST) tests/unit

# STEPS: how many imports may lie between a test and a changed file; 9 is as good as all.
near: $(VENV)/.installed ## Run the tests near to what differs from main, nearest first (STEPS=2)
	chosen=$$($(BIN)/python -m tests.near $(STEPS)) && test -z "$$chosen" || $(PYTEST) $$chosen

# ONLY="not long" leaves out the longest, as .ci/run does.
system: $(VENV)/.installed ## Run the long tests: clusters, launcher, chaos, submitted jobs, wheel
	$(PYTEST) -m "$(ONLY)" tests/system

# The tests in tests/ray run most lines in Ray's workers or in new processes, which do not count.
coverage: $(VENV)/.installed ## Run the tests of `make test` that start nothing, and fail below the floor of coverage
	$(PYTEST) --cov --cov-report=term:skip-covered tests/unit tests/model

check: $(VENV)/.installed ## Check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict batchgen

# `make test` tries only a few of these cases.
fuzz: $(VENV)/.installed ## Try 2,000 random cases in each fuzz test
	$(BIN)/python -m pytest -n 2 -m fuzz --hypothesis-profile=slow

attacks: $(VENV)/.installed ## Try hostile input, faults and wrong usage; print what held and what broke
	mkdir -p out
	$(BIN)/python -m tests.attacks --results out/attacks.json out/attacks

# Needs an S3 server (apt: radosgw ceph-mon ceph-osd); ends with `make losses`.
chaos: $(VENV)/.installed ## Run N=10 jobs with seeded faults (SEED=1) on an S3 server, then `make losses`
	mkdir -p out
	$(BIN)/python -m tests.chaos.store --runs $(N) --seed $(SEED) --results out/chaos.jsonl out/chaos
	$(MAKE) losses

# Needs the same server; the test of a full disk needs root.
permanent: $(VENV)/.installed ## Run one job for each fault that does not pass, on an S3 server
	mkdir -p out
	$(BIN)/python -m tests.chaos.permanent --results out/permanent.json out/permanent

# Needs root, the S3 server and iproute2 and redis-server (apt); nodes are network namespaces.
losses: $(VENV)/.installed ## Run one job for each part that a cluster of three nodes can lose
	mkdir -p out
	$(BIN)/python -m tests.cluster.losses --results out/losses.json

# Needs the same.
cluster: $(VENV)/.installed ## Run a job of IMAGES=2000 images on three nodes; one is killed, one joins
	mkdir -p out
	$(BIN)/python -m tests.cluster.job --images $(IMAGES) --results out/cluster.json

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,check]'
	touch $@

clean: ## Remove `.venv` and `out`
	rm -rf out $(VENV)
