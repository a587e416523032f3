# make train: install, run the main job and report on it.  make test: install and run the tests.
# make bench: install the programs to compare with, measure all, write docs/BENCHMARKS.md.
# make faults: kill, cut, fill and flip for ten minutes, and write docs/FAULTS.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test faults bench check fmt train-mini browser clean

train: .venv/runtime
	$(BIN)/python train_diffusion_ddim.py
	$(BIN)/python -m evaluation --quick --checkpoint "$$(ls -dt runs/*/ | head -n 1)"

train-mini: .venv/runtime
	$(BIN)/python train_diffusion_ddim.py --data_dir test_data_mini/train \
		--val_data_dir test_data_mini/val --batch_size 2 --num_epochs 3 --lr 1e-3 \
		--d_model 32 --num_layers 2 --nhead 2 --wandb_project ddim-test --device cpu

bench: .venv/bench
	$(BIN)/python -m benchmarks

test: .venv/development browser
	$(BIN)/python -m pytest -rs -n 2

faults: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# The tests of report.html click through it in Chromium; without one they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium, for the tests of report.html"; \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium \
			fonts-dejavu-core; } >/dev/null 2>&1 || \
		echo "note: chromium could not be installed: the tests in a browser are skipped"; \
	else \
		echo "note: no chromium: the tests in a browser are skipped; on Debian and Ubuntu" \
			"\"sudo apt-get install chromium\" brings it"; \
	fi

check: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: .venv/development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/runtime

.venv/bench: requirements-bench.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@ .venv/runtime

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
