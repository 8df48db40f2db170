# `make demo` and `make test` each do everything on a machine that has Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

N ?= 10
SEED ?= 1
IMAGES ?= 2000

.PHONY: demo test fuzz check chaos permanent attacks cluster losses clean

demo: $(VENV)/.installed
	$(BIN)/python jobs/demo_prompts.py out/demo-prompts.parquet
	rm -rf out/demo
	$(BIN)/batchgen run jobs/demo.yaml
	$(BIN)/batchgen verify out/demo
	@echo "look at out/demo/_batchgen/contact-sheet.png"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# 2,000 random cases of each test of hostile input, which `make test` tries few of.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m fuzz --hypothesis-profile=slow

check: $(VENV)/.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict batchgen

# N whole runs against a real S3 server (apt: radosgw ceph-mon ceph-osd), each with seeded faults;
# then the losses of a cluster's parts, see below.
chaos: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.chaos.store --runs $(N) --seed $(SEED) --results out/chaos.jsonl out/chaos
	$(MAKE) losses

# One whole run for every fault that does not pass, on the same server; the full disk needs root.
permanent: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.chaos.permanent --results out/permanent.json out/permanent

# Hostile input, faults and wrong usage against this checkout: a table of what held and what broke.
attacks: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.attacks --results out/attacks.json out/attacks

# A job of IMAGES images on a cluster of three nodes in network namespaces (root; apt: iproute2,
# redis-server and the S3 server), one of which is killed; and one for every part it can lose.
cluster: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.cluster.job --images $(IMAGES) --results out/cluster.json

losses: $(VENV)/.installed
	mkdir -p out
	$(BIN)/python -m tests.cluster.losses --results out/losses.json

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,check]'
	touch $@

clean:
	rm -rf out $(VENV)
