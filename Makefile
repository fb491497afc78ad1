# Each target makes the environment it needs first. VENV=PATH puts that elsewhere, PYTHON=python3.12 chooses another one.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-gpu

demo: $(VENV)/demo-installed
	$(BIN)/mambavision classify --samples

test: $(VENV)/dev-installed
	$(BIN)/python -m pytest

lint: $(VENV)/dev-installed
	PATH="$(abspath $(BIN)):$$PATH" .ci/lint

# What the tables in README.md and docs/ are made of; DATA=PATH is where get_cifar10.py wrote. An hour or two. To be
# run by itself, on a GPU, is ablation.py, which trains a network for each choice and seed.
DATA ?= data/cifar10
bench: $(VENV)/dev-installed
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/cifar10.py --data $(DATA)
	$(BIN)/python benchmarks/float8_error.py $(DATA)/val.npz
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/cpu_formats.py
	$(BIN)/python benchmarks/formats.py $(DATA)
	$(BIN)/python benchmarks/formats.py $(DATA) --model mamba_vision_T
	$(BIN)/python benchmarks/onnx_variants.py
	$(BIN)/python benchmarks/huggingface_trainer.py $(DATA) --pictures 10000
	$(BIN)/python benchmarks/readme_tables.py

# The same on a machine with a CUDA GPU, behind the tests that need one. onnx_gpu.py needs onnxruntime-gpu in place of the
# onnxruntime that the dev extra brings; without it that script says so and leaves its table out.
bench-gpu: $(VENV)/dev-installed
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m "gpu and slow"
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/gpu_inference.py
	$(BIN)/python benchmarks/first_result.py
	$(BIN)/python benchmarks/gpu_training.py
	$(BIN)/python benchmarks/gpu_accuracy.py $(DATA)/val.npz
	$(BIN)/python benchmarks/precision.py $(DATA)
	$(BIN)/python benchmarks/onnx_gpu.py $(DATA)
	$(BIN)/python benchmarks/front.py
	$(BIN)/python benchmarks/readme_tables.py

$(VENV)/demo-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e .
	touch $@

$(VENV)/dev-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"
	touch $@
