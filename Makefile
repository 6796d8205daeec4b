# make demo   shows the main job on booted hosts, and leaves them up
# make test   runs every test, from a bare Debian machine, as root
# Single suites: make lint unit functional integration system
SHELL := /bin/bash
export MAILFW_CACHE ?= /var/cache/mailfw
VENV := $(MAILFW_CACHE)/venv-$(shell sha256sum pyproject.toml | cut -c1-12)
PYTEST := TMPDIR=/tmp $(VENV)/bin/pytest

.PHONY: demo test lint unit functional integration system packages clean

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

packages:
	test/install-packages

$(VENV)/done: pyproject.toml | packages
	/usr/bin/python3 -m venv --clear $(VENV)
	$(VENV)/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print("\n".join(sum(extras.values(), [])))' \
	  | $(VENV)/bin/pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

clean:
	test/lab/lab down
