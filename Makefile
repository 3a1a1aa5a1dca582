# The commands of this project; `make` alone lists them. Everything here is a short form of `uv run ...`, which needs no
# make: on Windows use those.

PYTHON ?= $(shell command -v python3 2>/dev/null || command -v python 2>/dev/null || echo python3)
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := "$(UV)" run
# One more than two cores: some tests wait for other processes, signals or the disk.
WORKERS ?= 3
KILLS ?= 200
ARGS ?=

# Containers often set it. Every command would then compile its imports again, which takes longer than all the rest.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help environment uv venv lock quickstart train ddp-train tensorboard test test-slow chaos check lint types bench \
        gpu-report gpu-status kill-gpu gpu-hot clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

environment: venv ## Install everything: uv if it is missing, then the pinned dependencies into .venv
	@echo "Ready. Try: make quickstart"

uv: ## Get uv into .uv/ of this folder if it is not on the PATH
	@"$(PYTHON)" scripts/get_uv.py > /dev/null

venv: uv ## Bring .venv in line with the pins in pyproject.toml
	"$(UV)" sync

lock: uv ## Update the pins in pyproject.toml to the newest versions that fit, and requirements.txt with hashes
	@"$(UV)" run --no-project --python ">=3.11" python scripts/lock.py "$(UV)"

quickstart: venv ## Train a small mixture of experts on the built-in stories and read what it writes (minutes on 2 cores)
	$(RUN) python run_train.py --config configs/quickstart.yaml $(ARGS)

train: venv ## Train MoE-200M by model_config.yaml and train_config.yaml; more flags by ARGS="--train.max_tokens 1000000"
	$(RUN) python run_train.py $(ARGS)

ddp-train: venv ## The same on several GPUs of this machine: make ddp-train NGPUS=2
	@case "$(NGPUS)" in ''|*[!0-9]*|0) echo "error: say on how many GPUs: make ddp-train NGPUS=2" >&2; exit 1;; esac
	$(RUN) torchrun --standalone --nproc_per_node=$(NGPUS) run_train.py --devices=$(NGPUS) $(ARGS)

tensorboard: venv ## Show the curves of all runs under checkpoints/ in the browser (LOGDIR=... for another folder)
	$(RUN) tensorboard --logdir "$(or $(LOGDIR),checkpoints)"

test: venv ## Run the quick tests, WORKERS=3 at a time
	$(RUN) pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: venv ## Run the tests that take minutes each
	$(RUN) pytest -m slow $(ARGS)

chaos: venv ## Kill training and preparation KILLS=200 times, and compare with uninterrupted runs
	CHAOS_KILLS=$(KILLS) $(RUN) pytest tests/chaos -m slow -n $(WORKERS) --dist worksteal $(ARGS)

check: lint types test ## Run everything that must pass before a commit: lint, format, types, quick tests

lint: venv
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: venv
	$(RUN) mypy

# All measurements of a target run in one shell command: a failed one does not stop the others, only the exit code tells.
MEASURE := trap 'exit 130' INT; failed=; measure() { echo "$$*"; $(RUN) "$$@" || failed="$$failed\n  $$*"; }
QUICKSTART := test -d checkpoints/quickstart/final || measure python run_train.py --config configs/quickstart.yaml
REPORT := measure python benchmarks/report.py; \
          test -z "$$failed" || { printf "error: these failed:$$failed\n" >&2; exit 1; }

bench: venv ## Run the benchmarks that need no GPU (about an hour on 2 cores) and update the tables in the documents
	@$(MEASURE); \
	measure python benchmarks/train_step.py; \
	measure python benchmarks/step_profile.py; \
	measure python benchmarks/moe_layer.py --device cpu; \
	$(QUICKSTART); \
	measure python benchmarks/generation.py; \
	measure python benchmarks/data.py prepare --repeat 1; \
	measure python benchmarks/learning.py; \
	measure python benchmarks/ablations.py; \
	measure python benchmarks/memory.py; \
	$(REPORT)

gpu-report: venv ## Check and measure everything on this machine's GPU, the most important first: make gpu-report MINUTES=12
	@# A part that failed must not hide the tables of the others.
	$(RUN) python benchmarks/gpu_report.py --minutes "$(or $(MINUTES),12)" $(ARGS); code=$$?; \
	$(RUN) python benchmarks/report.py && exit $$code

gpu-status: venv ## Show the GPUs, what runs on them, and what PyTorch sees of them
	@$(RUN) python scripts/gpu.py status

kill-gpu: venv ## List your own training processes of this project, ask, and end them
	@$(RUN) python scripts/gpu.py kill

gpu-hot: venv ## Keep GPUs busy with matrix products until Ctrl-C: make gpu-hot GPUS=0,1 MINUTES=10
	@$(RUN) python scripts/gpu.py hot --gpus "$(or $(GPUS),all)" --minutes "$(or $(MINUTES),10)"

clean: ## Remove caches and build products, but never data, checkpoints, logs or the environment
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./.venv -prune -o -path ./.uv -prune -o -path ./data -prune -o -path ./checkpoints -prune \
	  -o -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "Kept: data/, checkpoints/, out/, wandb/ (what you made) and .venv, .uv, uv.lock (what 'make environment' made)."
	@echo "Remove those by hand where you are sure."
