"""What public functions take as tensors: converted alike, or refused by the argument's name.

Why: arrays come as views, in other dtypes and on other devices, with a batch of one in place of
many. Broadcast in silence, each is another answer.

    python -m pytest tests/test_tensors.py
"""

import math

import pytest
import torch
from conftest import make_gestures

import train_diffusion_ddim as tdd
from trainlib.tensors import in_batches, model_diagnostics


def test_in_batches_is_the_function():
    x, y = torch.randn(7, 2), torch.randn(7, 2)
    sizes = []

    def add(a, b):
        sizes.append(len(a))
        return a + b

    assert torch.equal(in_batches(add, x, y, batch_size=3), x + y) and sizes == [3, 3, 1]


def test_model_diagnostics_by_hand(tiny_config):
    torch.manual_seed(0)
    model, x_0 = tdd.build_model(tiny_config()), make_gestures(5)
    scores = model_diagnostics(model, x_0)
    total = sum((p.detach().double() ** 2).sum().item() for p in model.parameters())
    assert scores["model/weight_norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    model.forward = lambda x_t, t: model.output_projection(torch.full((5, 4, 16), -0.5))
    assert model_diagnostics(model, x_0)["model/activation_stats"] == pytest.approx(0.5)
    assert model.training and not model.output_projection._forward_pre_hooks
