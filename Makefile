# make train: install and run the main job.  make test: install and run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check fmt train-mini clean

train: .venv/runtime
	$(BIN)/python train_diffusion_ddim.py

train-mini: .venv/runtime
	$(BIN)/python train_diffusion_ddim.py --data_dir test_data_mini/train \
		--val_data_dir test_data_mini/val --batch_size 2 --num_epochs 3 --lr 1e-3 \
		--d_model 32 --num_layers 2 --nhead 2 --wandb_project ddim-test --device cpu

test: .venv/development
	$(BIN)/python -m pytest

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

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
