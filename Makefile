PYTHON ?= python3
IMAGES ?=
LIKE ?=

.PHONY: demo test test-all lint types bench clean

demo: .venv/demo.done
	.venv/bin/python -m demo "$(IMAGES)" "$(LIKE)"

test: .venv/dev.done
	.venv/bin/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: .venv/dev.done
	.venv/bin/python -m pytest -n 2 --dist loadgroup

lint: .venv/dev.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/dev.done
	.venv/bin/mypy

bench: .venv/dev.done
	.venv/bin/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" && exit 1)
	$(PYTHON) -m venv .venv

.venv/%.done: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
