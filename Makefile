# One command a chore; CI runs the same ones. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
# The arguments of pytest, as in `make test PYTEST="..."`. The tests of tools/ are left out: they
# take minutes, and matter only for changes to tools/.
PYTEST ?= tests --ignore=tests/tools

# The number of processes that run tests, each with its own RabbitMQ; most of the time they wait.
# With 0 the tests run in one process, for pdb.
PROCESSES ?= 4

BIN := $(VENV)/bin
RUN_TESTS := -m pytest --numprocesses $(PROCESSES) --dist loadgroup
# What depends on the version of RabbitMQ, and what depends on that of Python.
BROKER_TESTS := tests/broker tests/faults tests/cli tests/worker \
	$(foreach name,demo ecosystem recipes testing_guide,--ignore=tests/worker/test_$(name).py)
PYTHON_TESTS := tests/unit $(foreach name,aio fork_and_threads gevent publisher store_and_lookup tls \
	waiting,tests/broker/test_$(name).py)
# Code outside the package that is checked with it.
SCRIPTS := demo examples tools tests $(wildcard bench)

.PHONY: help demo test coverage test-newest-rabbitmq test-oldest test-newest-python test-matrix \
	test-pair lint format types docs \
	test-faults test-tools soak simulate mutants fuzz screenshots bench bench-check dist clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
		awk -F '\t' '{ printf "  make %-22s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## Show it at work, on a private RabbitMQ; BROKER=amqp://... to use yours
	@$(BIN)/python -m demo $(if $(BROKER),--broker "$(BROKER)") $(DEMO)

test: $(VENV)/.test ## Run the tests on a private RabbitMQ; PYTEST="tests/unit -k fold" to choose
	$(BIN)/python $(RUN_TESTS) $(PYTEST)

coverage: $(VENV)/.test ## Run tests and report the lines and branches that they miss, with a floor
	$(BIN)/python $(RUN_TESTS) --cov --cov-report=term-missing:skip-covered \
		$(if $(filter tests,$(PYTEST)),tests/unit tests/broker tests/cli,$(PYTEST))

test-newest-rabbitmq: $(VENV)/.test ## Run the tests that need a broker on Debian forky's RabbitMQ
	RABBITMQ_DISTRIBUTION=forky $(BIN)/python $(RUN_TESTS) \
		$(if $(filter tests,$(PYTEST)),$(BROKER_TESTS),$(PYTEST))

test-faults: $(VENV)/.test ## Run all fault tests, those under load too; RABBITMQ=forky for the newest
	LOAD=1 RABBITMQ_DISTRIBUTION=$(or $(RABBITMQ),system) $(BIN)/python -m pytest tests/faults

test-tools: $(VENV)/.test ## Run the tests of what runs the private RabbitMQ nodes
	$(BIN)/python -m pytest tests/tools

# The faults are chosen at random; the same SEED chooses the same ones.
soak: $(VENV)/.test ## Break things for MINUTES=n under load; SEED=n, RABBITMQ=forky, HISTORY=folder
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) \
		$(if $(RABBITMQ),--distribution $(RABBITMQ)) $(if $(HISTORY),--history $(HISTORY)) $(FAULTS)

test-oldest: ## Run unit and broker tests with the oldest supported Celery, and Python 3.9 if it is here
	@$(MAKE) --no-print-directory VENV=.venv-oldest PINS=tools/oldest.txt \
		PYTHON="$$($(PYTHON) tools/pythons.py oldest)" .venv-oldest/.test
	.venv-oldest/bin/python $(RUN_TESTS) $(if $(filter tests,$(PYTEST)),tests/unit tests/broker,$(PYTEST))

test-newest-python: ## Run unit tests and some broker tests on the newest Python that is here
	@$(MAKE) --no-print-directory VENV=.venv-newest \
		PYTHON="$$($(PYTHON) tools/pythons.py newest)" .venv-newest/.test
	.venv-newest/bin/python $(RUN_TESTS) $(if $(filter tests,$(PYTEST)),$(PYTHON_TESTS),$(PYTEST))

# All but the fault tests. `python tools/pythons.py pairs` lists the pairs.
test-matrix: ## Run tests on every pair of Python and Celery that is here; PAIRS="3.9-5.3 3.13-5.7"
	@set -e; for pair in $(or $(PAIRS),$$($(PYTHON) tools/pythons.py pairs)); do \
		$(MAKE) --no-print-directory test-pair PAIR=$$pair; done

test-pair:
	@$(MAKE) --no-print-directory VENV=.venv-$(PAIR) CELERY=$(lastword $(subst -, ,$(PAIR))) \
		PYTHON="$$($(PYTHON) tools/pythons.py $(firstword $(subst -, ,$(PAIR))))" .venv-$(PAIR)/.test
	.venv-$(PAIR)/bin/python $(RUN_TESTS) \
		$(if $(filter tests,$(PYTEST)),tests/unit tests/broker tests/worker,$(PYTEST))

lint: $(VENV)/.lint ## Check style, imports and format, and workflows against their schemas
	$(BIN)/ruff check celery_amqp_results $(SCRIPTS)
	$(BIN)/ruff format --check celery_amqp_results $(SCRIPTS)
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec examples/compose/compose.yaml

format: $(VENV)/.lint ## Format the code
	$(BIN)/ruff check --fix celery_amqp_results $(SCRIPTS)
	$(BIN)/ruff format celery_amqp_results $(SCRIPTS)

types: $(VENV)/.lint ## Check the types
	$(BIN)/mypy

docs: $(VENV)/.docs ## Build the documentation into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.bench ## Measure beside other backends; QUICK=1 for less, BENCH="..." for options
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(BENCH)

bench-check: $(VENV)/.bench ## Measure little, and fail if a ratio is worse than recorded
	$(BIN)/python -m bench --quick --compare $(BENCH)

mutants: $(VENV)/.mutants ## Change the pure cores in small ways and list what no test notices; ONLY="*page*"
	CI=1 EXAMPLES=25 SIMULATION_SEEDS=25 $(BIN)/mutmut run $(if $(ONLY),"$(ONLY)")
	$(BIN)/mutmut results

dist: $(VENV)/.release ## Build the wheel and the source archive into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

simulate: $(VENV)/.test ## Run the simulation of reads with SEEDS=10000 seeds, from FIRST=0 on
	$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),10000) --first $(or $(FIRST),0)

fuzz: $(VENV)/.test ## Feed the decoders with garbage for SECONDS=60; with atheris if it is installed
	$(BIN)/python -m tools.fuzz --seconds $(or $(SECONDS),60)

screenshots: $(VENV)/.test ## Make the pictures of the command line in docs/images/
	$(BIN)/python -m tools.screenshots

clean: ## Delete what was made here: environments, caches, the built documentation
	rm -rf .venv .venv-* site build dist .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis mutants *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- environments ------------------------------------------------------------------------------
# A stamp file for each set of dependencies: made once, and again when pyproject.toml changes.

$(VENV)/.made:
	@$(PYTHON) tools/pythons.py check
	@echo "making the virtual environment $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: pyproject.toml $(PINS) | $(VENV)/.made
	@echo "installing what '$*' needs into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(PINS),--requirement $(PINS)) $(if $(CELERY),'celery==$(CELERY).*') --editable '.[$*]'
	@touch $@
