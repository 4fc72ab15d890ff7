# Bare `make` lists the targets. Each one first installs what is missing (.ci/setup).
PREFIX ?= /usr/local
bin := .venv/bin
as_root = [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null || sudo -v

# Four processes share the tests (tests/spread.py): most of them wait for Tor or for a deadline.
share = -n 4

# Tests marked `root` change to other users themselves; a user runs them through sudo.
by_sudo = sudo -n -E PYTHONDONTWRITEBYTECODE=1 $(bin)/pytest -p no:cacheprovider
ifeq ($(shell id -u),0)
pytest = $(bin)/pytest $(share) $(1)
again = $(bin)/pytest --last-failed --last-failed-no-failures none
else
pytest = $(bin)/pytest $(share) $(1) -m 'not root' && $(by_sudo) $(share) $(1) -m root
again = false
endif

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## boot the lab, run curl through it, show exit address, IsTor and leak verdict
	@$(bin)/python bench/demo.py

test: lint everyday docker ## run every test; as a user, those that need root go through sudo
	@$(as_root)
	$(call pytest) || { echo 'once more, and alone, what failed on a machine that was busy'; $(again); }

check: lint ## linters, types, unit, golden and document tests: seconds, without root
	$(bin)/pytest -m 'not lab and not root' tests/unit tests/golden tests/docs

stories: setup ## run the behaviour tests
	@$(as_root)
	$(call pytest,tests/stories)

lab: everyday ## run the tests that need a lab
	@$(as_root)
	$(bin)/pytest $(share) -m lab

torture: setup ## kill at every moment, disturb, fuzz, take each guard away: an hour
	@$(as_root)
	$(bin)/pytest -m torture

bench: setup ## measure speed, side by side with others
	@$(as_root)
	@$(bin)/python bench/run.py

golden: setup ## rewrite the golden files; review them with git diff
	$(bin)/pytest tests/golden --update-golden

clean: ## remove .venv, caches and build products
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find nsrun tests bench -name __pycache__ -prune -exec rm -rf {} +

install: ## put ttp on the PATH: PREFIX/lib/ttp, PREFIX/bin/ttp (PREFIX=/usr/local)
	@.ci/setup install $(PREFIX)

deb: setup ## build a Debian package: dist/ttp_VERSION_all.deb
	@.ci/package

setup:
	@.ci/setup

everyday:
	@.ci/setup everyday

docker:
	@.ci/setup docker

lint: setup
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/mypy

.PHONY: help demo test check stories lab torture bench golden clean install deb setup everyday docker lint
