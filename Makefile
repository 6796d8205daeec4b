# make demo   shows the main job on booted hosts, and leaves them up
# make test   runs every test, from a bare Debian machine, as root
# Single suites: make lint unit functional integration system
# make bench  measures what the rules cost
SHELL := /bin/bash
export MAILFW_CACHE ?= /var/cache/mailfw
VENV := $(MAILFW_CACHE)/venv-$(shell sha256sum pyproject.toml | cut -c1-12)
PYTEST := TMPDIR=/tmp $(VENV)/bin/pytest

.PHONY: demo test lint unit functional integration system bench packages clean

demo: packages $(VENV)/done
	test/lab/lab up
	$(VENV)/bin/python test/lab/demo.py

# One pytest run at the end, so that its summary counts everything.
test: lint
	$(PYTEST)

lint: $(VENV)/done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .
	$(VENV)/bin/salt-lint $$(git ls-files '*.sls')

unit functional integration system: $(VENV)/done
	$(PYTEST) test/$@

# What the rules cost, in connections and packets; about a quarter of an hour, on a machine that does nothing else.
bench: $(VENV)/done
	test/bench/install-packages
	$(VENV)/bin/python test/bench/cost.py $(BENCH)

packages:
	test/install-packages

$(VENV)/done: pyproject.toml | packages
	/usr/bin/python3 -m venv --clear $(VENV)
	$(VENV)/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print("\n".join(sum(extras.values(), [])))' \
	  | $(VENV)/bin/pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

clean:
	test/lab/lab down
