# `make` alone lists what there is.  Packages go into .venv and .venvs here, never
# into the machine's own Python; a file `ready` in each says that it is complete.

# The pytest that is there, else the one in .venv.
pytest  = PATH="$$PWD/.venv/bin:$$PATH" python3 -m pytest
# A Python of each version from 3.8 on, newest first, if it can make environments.
pythons = for v in 15 14 13 12 11 10 9 8; do \
	    for p in python3.$$v "$$HOME"/.pyenv/versions/3.$$v.*/bin/python python3; do \
	      "$$p" -c "import sys, ssl, ensurepip; sys.exit(sys.version_info[1] != $$v)" \
	        2>/dev/null && echo "$$p" && break; done; done
# $(call install,FOLDER,PYTHON,PACKAGES) makes an environment, unless it is ready.
install = { test -e $(1)/ready || { rm -rf $(1); $(2) -m venv $(1) && \
	    $(1)/bin/python -m pip -q --disable-pip-version-check install \
	      --only-binary :all: $(3) && touch $(1)/ready; }; }
sdks    = openai-0.28.1 openai-1.0.0 openai-1 openai requests jsonschema
others  = $(sdks:%=.venvs/%/ready) .venvs/node/ready

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

run: ## serve the echo backend on http://127.0.0.1:8000/v1
	python3 openai_compat.py

test: pytest ## the tests, with the pytest that is there or one in .venv
	$(pytest)

test-all: ## the tests on every Python from 3.8 on that is found
	@found=`$(pythons)`; failed=; for python in $$found; do \
	  version=`$$python -c 'import platform; print(platform.python_version())'`; \
	  echo "== Python $$version, $$python"; \
	  $(call install,.venvs/$$version,$$python,pytest) && \
	  .venvs/$$version/bin/python -m pytest -q || failed="$$failed $$version"; done; \
	echo "== found:" $${found:-no Python that can make environments}; \
	echo "== failed:$${failed:- none}"; test -n "$$found" && test -z "$$failed"

interop: pytest $(others) ## the tests with the SDKs of others, of four generations
	$(pytest) -m interop

system: pytest ## the tests with nginx, Chromium and openssl, which must be there
	$(pytest) -m system

stress: pytest ## the tests that take long: many clients, many fixtures, much load
	$(pytest) -m stress

plain: pytest ## the tests with every device for speed switched off (FAST = False)
	@rm -rf .plain && mkdir .plain && cp -R Makefile README.md .github .application \
	  client.py test_openai_compat.py .pytest.ini .plain/ && \
	  sed 's/^FAST = True$$/FAST = False/' openai_compat.py > .plain/openai_compat.py && \
	  cd .plain && PATH="$$PWD/../.venv/bin:$$PATH" python3 -m pytest

screenshot: ## the picture of the page in the README, with Chromium
	.ci/screenshot

mutants: pytest ## plant faults into copies of the modules; list what no test sees
	PATH="$$PWD/.venv/bin:$$PATH" python3 .ci/mutants.py

bench: ## how many requests and events a second, as client.py sees it
	python3 openai_compat.py --quiet -- python3 client.py bench --requests 2000

clean: ## remove the environments and whatever the tests left behind
	rm -rf .venv .venvs .plain .pytest_cache __pycache__

pytest:
	@$(pytest) --version >/dev/null 2>&1 || { rm -f .venv/ready; \
	  $(call install,.venv,python3,pytest) >/dev/null 2>&1; } || { rm -rf .venv; echo >&2 \
	  "no pytest here: install it, or a python3 with venv, and a package index in reach"; \
	  exit 1; }

.venvs/openai-0.28.1/ready: packages = openai==0.28.1
.venvs/openai-1.0.0/ready:  packages = openai==1.0.0 'httpx<0.28'
.venvs/openai-1/ready:      packages = 'openai>=1,<2'
.venvs/openai/ready:        packages = openai pytest pytest-xdist
.venvs/requests/ready:      packages = requests
.venvs/jsonschema/ready:    packages = jsonschema pydantic
$(sdks:%=.venvs/%/ready): # on the newest Python on which it installs and imports
	@for python in `$(pythons)`; do \
	  echo "$(@D): $(packages) on $$python"; \
	  $(call install,$(@D),$$python,$(packages)) && \
	  $(@D)/bin/python -c "import $(firstword $(subst -, ,$(notdir $(@D))))" && exit 0; \
	  rm -rf $(@D); done; echo "$(@D): cannot be made" >&2; exit 1

.venvs/node/ready:
	npm install --loglevel=error --no-audit --no-fund --no-save --prefix $(@D) openai
	touch $@

.PHONY: help run test test-all interop system stress plain mutants screenshot bench clean pytest
