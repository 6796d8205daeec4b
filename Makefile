# make demo   shows the main job on booted hosts, and leaves them up
# make test   runs every test, from a bare Debian machine, as root
# Single suites: make lint unit functional integration system; make again runs what has failed last, one after the other
# make soak   runs many thousands of logins, and shows that nothing grows
# make kernels runs how the kernels of Debian's releases treat the rules, emulated: an hour for each
# make bench  measures what the rules cost, and what applying and keeping them takes
# Single benchmarks: make bench-cost bench-scale bench-login
SHELL := /bin/bash
export MAILFW_CACHE ?= /var/cache/mailfw
VENV := $(MAILFW_CACHE)/venv-$(shell sha256sum pyproject.toml | cut -c1-12)
PYTEST := TMPDIR=/tmp $(VENV)/bin/pytest

.PHONY: demo test again lint unit functional integration system soak kernels bench bench-cost bench-scale bench-login docs packages clean

demo: packages $(VENV)/done
	test/lab/lab up
	$(VENV)/bin/python test/lab/demo.py

# One pytest run, so that its summary counts everything; most tests wait more than they work, so three run at a time.
test: lint
	$(PYTEST) --numprocesses 3 --dist loadgroup --durations=20

lint: $(VENV)/done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .
	$(VENV)/bin/salt-lint $$(git ls-files '*.sls')

again: $(VENV)/done
	$(PYTEST) --numprocesses 1 --dist loadgroup --last-failed --last-failed-no-failures none

unit functional integration system: $(VENV)/done
	$(PYTEST) test/$@

# Many thousands of logins, and what agent and Salt helper hold meanwhile; the network cut for a minute: ten minutes.
soak: packages $(VENV)/done
	$(PYTEST) -s --show-capture=no test/soak

# KERNELS is for pytest: without it, the tests that show most of a kernel.
kernels: packages $(VENV)/done
	test/kernels/install-packages
	for suite in bookworm trixie; do $(VENV)/bin/python test/kernels/kernels $$suite $(KERNELS) || exit 1; done

# A quarter of an hour for each, on a machine that does nothing else. BENCH is for the options of a single one.
bench: bench-cost bench-scale bench-login

# What the rules cost, in connections and packets.
bench-cost: $(VENV)/done
	test/bench/install-packages
	$(VENV)/bin/python test/bench/cost.py $(BENCH)

# What applying rules and keeping elements takes, by the number of elements.
bench-scale: $(VENV)/done
	test/bench/install-packages
	$(VENV)/bin/python test/bench/scale.py --picture docs/scale.svg $(BENCH)

# What is made from the code: the pillar reference.
docs: $(VENV)/done
	PYTHONPATH=_utils $(VENV)/bin/python docs/reference.py > docs/pillar.md

# What a login costs who logs in, and how soon the whole fleet trusts where that was: about twenty minutes.
bench-login: $(VENV)/done
	test/bench/install-packages
	$(VENV)/bin/python test/bench/login.py $(BENCH)

packages:
	test/install-packages

$(VENV)/done: pyproject.toml | packages
	/usr/bin/python3 -m venv --clear $(VENV)
	$(VENV)/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print("\n".join(sum(extras.values(), [])))' \
	  | $(VENV)/bin/pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

clean:
	test/lab/lab down
