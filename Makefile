# One word per chore; CI calls these and nothing else. PYTHON=... chooses the interpreter, WORKERS=... how many processes test.
PYTHON ?= python
WORKERS ?= auto
PYTEST = $(PYTHON) -m pytest -n $(WORKERS)
RUNTIME_TESTS = $(wildcard tests/engines tests/hyperrt) $(wildcard tests/test_*.py)
INSTALLED = .mypy_cache/installed
MEASUREMENTS = coldstart parity fused_step switch fidelity

.PHONY: check test test-fast test-runtime bench wheel clean

check:  ## style and types
	$(PYTHON) -m ruff check .
	rm -rf $(INSTALLED) && mkdir -p $(INSTALLED)/hyperrt
	ln -s $(CURDIR)/hyperrt/* $(CURDIR)/engines $(INSTALLED)/hyperrt/
	cd $(INSTALLED) && $(PYTHON) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

test:  ## everything; needs .[dev]
	$(PYTEST)

test-fast:  ## everything that is not marked slow; needs .[dev]
	$(PYTEST) -m "not slow"

test-runtime:  ## what an install without torch must pass; needs .[cpu,test]
	$(PYTEST) $(RUNTIME_TESTS)

bench:  ## the quick figures; docs/measurements.md names the commands of the others
	@for name in $(MEASUREMENTS); do $(PYTHON) "bench/$$name.py" || exit 1; done

wheel:  ## the wheel, in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:  ## what the other words leave behind
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
