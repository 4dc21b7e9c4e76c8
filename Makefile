# Two commands do everything on a fresh machine with Python 3.10+: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# what training needs; what the tests, the checks and the documentation need beside that
INSTALLED := .venv/installed
DEVELOP := .venv/installed-dev
# two processes with one thread each; what a file shares is made once
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
# of the checks for GPUs: `cpu` runs the same scripts without one
DEVICE ?= cuda

.PHONY: demo test test-slow test-faults test-recipes test-browser test-gpu gpu study study-gpu first-run pictures docs zoo performance lint

demo: $(INSTALLED)  ## install, then train a small ViT with MaskSub on handwritten digits
	$(BIN)/python tools/train_net.py --config configs/digits_vit.yaml --resume
	@echo 'For more: source .venv/bin/activate'

test: $(DEVELOP)  ## install, then run the tests: at most five minutes on two cores
	$(PYTEST)

test-slow: $(DEVELOP)  ## every class of timm, a step of every full-size recipe, torch.compile …
	$(PYTEST) -m slow $(TESTS)

test-faults: $(DEVELOP)  ## real faults in real runs
	$(PYTEST) -m faults

test-browser: $(DEVELOP)  ## reports and the documentation in Chromium (apt install chromium, or playwright install chromium)
	$(PYTEST) -m browser

test-gpu: $(DEVELOP)  ## what only a GPU can show, in minutes; without one a line that says so
	$(BIN)/python -m pytest -q -m gpu tests/gpu --device $(DEVICE)

gpu: $(DEVELOP)  ## test-gpu, then the benchmark, in at most nine minutes; results in runs/gpu
	$(BIN)/python tools/gpu.py --device $(DEVICE)

study-gpu: $(DEVELOP)  ## on with the studies of CIFAR-10 (cifar10/train, cifar10/test) for eight minutes on a GPU
	$(BIN)/python tools/gpu.py --only study_vit study_resnet study_swin

test-recipes: $(DEVELOP)  ## every recipe against its published numbers
	$(PYTEST) tests/recipes

study: demo $(DEVELOP)  ## write docs/study_*.md: an hour and a half on two cores
	for study in families digits cheap_swin cheap_resnet methods; do \
		$(BIN)/python tools/compare_runs.py --study configs/studies/$$study.yaml || exit; done

first-run: $(DEVELOP)  ## repeat docs/first_run.md: what its commands print, and their pictures
	rm -rf runs/digits_vit
	$(BIN)/python docs/refresh.py docs/first_run.md
	mkdir -p docs/first_run
	cp runs/plan_digits_vit.png docs/first_run/plan.png
	cp runs/digits_vit/curves.png runs/digits_vit/evaluation/*.png docs/first_run/
	$(BIN)/python docs/screenshot.py runs/digits_vit/report.html docs/first_run/report.png

VIT := $(BIN)/python tools/visualize_augsub.py --model vit_small_patch16_224
pictures: $(DEVELOP)  ## what sub-models see, for the documentation
	$(BIN)/python tools/visualize_augsub.py --output docs/what_the_sub_model_sees.png
	$(VIT) --augsub masking --ratio 0.25 0.5 0.75 --output docs/augmentations/masking.png
	$(VIT) --augsub masking '{name: masking, strategy: block}' '{name: masking, strategy: grid}' \
		--output docs/augmentations/masking_strategies.png
	$(VIT) --augsub drop_path --ratio 0.1 0.2 0.4 --output docs/augmentations/drop_path.png
	$(VIT) --augsub dropout --ratio 0.1 0.2 0.4 --output docs/augmentations/dropout.png
	$(BIN)/python tools/visualize_augsub.py --model resnet50 --augsub random_crop --ratio 0.25 0.5 0.75 \
		--output docs/augmentations/random_crop.png
	$(BIN)/python tools/visualize_augsub.py --model resnet50 --augsub downscale --ratio 0.25 0.5 0.75 \
		--output docs/augmentations/downscale.png

docs: $(DEVELOP)  ## refresh computed tables, then the documentation as a site in site/; a warning is an error
	$(BIN)/python docs/refresh.py docs/configuration.md docs/recipes.md docs/reliability.md docs/scaling.md
	$(BIN)/python docs/site.py
	$(BIN)/zensical build --clean --strict

zoo: $(DEVELOP)  ## follow the installed timm: its classes in docs/model_support.md, which the tests take from there
	$(BIN)/python docs/refresh.py docs/model_support.md

performance: $(DEVELOP)  ## measure this machine for docs/performance.md: minutes, with nothing else running
	$(BIN)/python tools/benchmark.py --quick --parts steps memory --json docs/performance/cpu_quick.json
	$(BIN)/python docs/refresh.py docs/performance.md

lint: $(DEVELOP)  ## ruff, and mypy --strict of augsub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): setup.py augsub/__init__.py
	$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('Python 3.10 or newer is needed: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[train]'
	touch $@

$(DEVELOP): $(INSTALLED)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@
