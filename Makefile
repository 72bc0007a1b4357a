# Everything runs in a virtual environment in .venv, made on first use. Needs Python 3.11 or newer, and PyPI.
#
#   make demo    quantize the bundled model and compare it with the original
#   make test    run the tests
#   make check   lint, types, import layers, generated documentation
#   make docs    write the generated documentation
#   make bench   run the benchmarks
#   make clean   remove what was built (not .venv)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/
# The folders that the package is made of, as pyproject.toml maps them: "llmopt.cli" = "cli".
FOLDERS := $(shell sed -n 's/^"llmopt\.[a-z]*" = "\(.*\)"$$/\1/p' pyproject.toml)
SITE := .build/site

.PHONY: demo test check docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN)llmopt demo --force

test: $(VENV)/.installed-dev
	@# One thread a process, one process a core: small models gain nothing from threads.
	OMP_NUM_THREADS=1 $(RUN)python -m pytest -n logical --dist worksteal

check: $(VENV)/.installed-dev
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright
	@# An editable install maps folders by an import hook, which import-linter cannot see: show it the package as a tree.
	rm -rf $(SITE) && mkdir -p $(SITE) && cp -R llmopt $(SITE)/ && cp -R $(FOLDERS) $(SITE)/llmopt/
	cd $(SITE) && "$(CURDIR)/$(RUN)lint-imports" --config "$(CURDIR)/pyproject.toml" --no-cache --no-logo
	$(RUN)python -m llmopt.cli.docs --check

docs: $(VENV)/.installed-dev
	$(RUN)python -m llmopt.cli.docs --write

bench: $(VENV)/.installed
	set -e; for script in benchmarks/*.py; do test ! -f "$$script" || $(RUN)python "$$script"; done

clean:
	rm -rf .build build dist demo-output *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(FOLDERS) llmopt tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml when what it asks for is installed.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmopt needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN)python -m pip install --disable-pip-version-check --editable '.[dev]'
	touch $@
