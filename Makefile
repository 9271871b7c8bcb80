# `make run` and `make test` need Python, pip and make, nothing else: everything
# they install goes into .venv, from the hashed lists in requirements/.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# PIP_USER=0: a personal `pip install --user` default would break the virtual environment.
PIP := PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 $(PYTHON) -m pip --python $(PY) \
	install --quiet --no-input --root-user-action=ignore --require-hashes
UV ?= uv
# Two tests for each processor: most of them wait for a process or a database.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(2 * (os.cpu_count() or 1))' 2>/dev/null || echo auto)
# Libraries for built-in callbacks: EXTRAS="nats blob" make run
EXTRAS ?=
ALL_EXTRAS := blob kafka nats rabbitmq redis

# What must be covered to the last branch: losing an event hides in these.
CORE := app/events/**,app/intake.py,app/intake/**,app/dispatch/**,app/store/**

# Where much else runs, one test in thousands may come too late; a defect fails alone, too.
define tested
$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS) $(1) || { \
	echo 'make: what failed is run once more by itself; if it passes now, it is a test to be mended' >&2; \
	$(PY) -m pytest --last-failed --last-failed-no-failures none --maxfail 1 $(1); }
endef

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:
# Tests start hundreds of processes: none of them shall compile everything anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup run test check audit openapi fix bench bench-large profile mutants soak migration lock

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS=@ read -r verb text; do printf '%-16s %s\n' "$$verb" "$$text"; done

setup: $(VENV)/run.stamp $(EXTRAS:%=$(VENV)/extra-%.stamp) ## Install what the service needs into .venv (EXTRAS="nats blob")

run: setup ## Set everything up and run the service on SQLite (PORT=9000 make run)
	@mkdir -p -m 700 var
	@$(PY) scripts/make_env.py
	@exec $(PY) -m app serve --migrate $(if $(PORT),--port '$(PORT)')

test: $(VENV)/test.stamp ## Run the tests on SQLite and on a real PostgreSQL (ARGS="-k intake")
	@exec $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/tools.stamp ## Format, lint, types, import contracts, tests, coverage, container files
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@$(PY) -m app openapi | diff -q - docs/openapi.json >/dev/null || { \
		echo 'docs/openapi.json is not what the routes say: write it with "make openapi"' >&2; exit 1; }
	$(call tested,tests/acceptance)
	$(PY) -m coverage erase
	$(call tested,--cov --cov-append --cov-report= tests/unit tests/integration tests/architecture)
	@# What only started processes run, such as the routes of the API, is not measured here.
	$(PY) -m coverage report --format=total --fail-under=87
	$(PY) -m coverage report --precision=2 --include='$(CORE)' --fail-under=100

audit: $(VENV)/audit.stamp ## Look for known vulnerabilities in everything that is locked (asks the internet)
	@PYTHONPATH=$(VENV)/audit exec $(PY) scripts/audit.py

openapi: setup ## Write docs/openapi.json from the routes
	$(PY) -m app openapi > docs/openapi.json

fix: $(VENV)/tools.stamp ## Format the code and repair what the linter can repair
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/bench.stamp ## Measure, and print a table of ratios
	@exec $(PY) -m tests.bench $(ARGS)

bench-large: $(VENV)/bench.stamp ## Measure with a million envelopes (ARGS="--scratch /mnt/big")
	@exec $(PY) -m tests.bench.large $(ARGS)

profile: $(VENV)/test.stamp ## Show where the processor time of a webhook goes (ARGS="--connections 1")
	@exec $(PY) -m tests.bench.profiling $(ARGS)

mutants: $(VENV)/test.stamp ## Change the code in small ways, and see whether a test notices (ARGS="signature")
	@exec $(PY) -m tests.mutants $(ARGS)

soak: $(VENV)/test.stamp ## Kill replicas, workers and database under load, and count (ARGS="--events 5000")
	@exec $(PY) -m tests.faults soak $(ARGS)

# Whatever environment and .env say: no real database is touched.
SCRATCH := ENV_FILE= MIGRATE_DATABASE_URL= DATABASE_URL=sqlite:///var/migration.db

migration: setup ## Write a migration from the models (m="what it does")
	@test -n '$(m)' || { echo 'Say what it does: make migration m="index events by type"' >&2; exit 2; }
	@mkdir -p -m 700 var
	@rm -f var/migration.db
	$(SCRATCH) $(PY) -m app migrate
	$(SCRATCH) $(PY) -m alembic revision --autogenerate --rev-id "$$(date -u +%Y%m%d_%H%M)" -m '$(m)'

lock: ## Make the lists in requirements/ anew (needs uv: python3 -m pip install uv)
	@command -v $(UV) >/dev/null || { \
		echo 'Locking needs uv: "$(PYTHON) -m pip install uv", or UV=/path/to/uv make lock' >&2; exit 1; }
	$(COMPILE) $(ARGS) pyproject.toml -o requirements/run.txt
	$(COMPILE) $(ARGS) --group test pyproject.toml --all-extras -c requirements/run.txt -o requirements/test.txt
	$(COMPILE) $(ARGS) --group tools -c requirements/run.txt -c requirements/test.txt -o requirements/tools.txt
	$(COMPILE) $(ARGS) --group bench -c requirements/run.txt -c requirements/test.txt -o requirements/bench.txt
	$(COMPILE) $(ARGS) --group audit -c requirements/run.txt -c requirements/test.txt -c requirements/tools.txt \
		-o requirements/audit.txt
	for extra in $(ALL_EXTRAS); do $(COMPILE) $(ARGS) pyproject.toml --extra $$extra \
		-c requirements/test.txt -o requirements/extra-$$extra.txt || exit; done

# No header and no addresses: both would tell where this was made, not what is in it.
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

# A missing interpreter (none yet, or its Python was upgraded away) means a new environment.
$(PY):
	@command -v $(PYTHON) >/dev/null || { \
		echo 'Python is missing. Install Python 3.11 or newer, or name one: PYTHON=python3.12 make ...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old. Name Python 3.11 or newer: PYTHON=python3.12 make ..." >&2; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo 'pip is missing for $(PYTHON). Install it (Debian: apt install python3-pip), or name another: PYTHON=...' >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv --without-pip --clear $(VENV)

# A stamp is as new as the list it was installed from, so the second call does nothing.
$(VENV)/run.stamp: requirements/run.txt | $(PY)
	@echo 'Installing $<'
	@$(PIP) -r $<
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/run.stamp
	@echo 'Installing $<'
	@$(PIP) -r $<
	@touch $@

# Beside the others, not among them: pip comes with it, which this environment does without.
$(VENV)/audit.stamp: requirements/audit.txt | $(PY)
	@echo 'Installing $<'
	@rm -rf $(VENV)/audit
	@$(PIP) --target $(VENV)/audit -r $<
	@touch $@

$(VENV)/bench.stamp: requirements/bench.txt $(VENV)/test.stamp
	@echo 'Installing $<'
	@$(PIP) -r $<
	@touch $@

$(VENV)/extra-%.stamp: requirements/extra-%.txt $(VENV)/run.stamp
	@echo 'Installing $<'
	@$(PIP) -r $<
	@touch $@

$(VENV)/tools.stamp: requirements/tools.txt $(VENV)/test.stamp
	@echo 'Installing $<'
	@$(PIP) -r $<
	@touch $@
