"""Muon is torch's, and its step the polar factor of the gradient.

Why: an optimizer that is slightly wrong trains slightly worse, and nobody sees it. So it is
compared with torch.optim.Muon and with the singular value decomposition.

    python -m pytest tests/test_muon.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_diffusion_ddim as tdd
from trainlib.muon import Muon, make_optimizers


def test_muon_takes_the_matrices_of_blocks_and_curves_and_adamw_the_rest(tiny_config):
    model = tdd.build_model(tiny_config(contacts=True, prediction_type="x0"))
    optimizers = make_optimizers(model, 1e-3, 0.0, muon=True)
    adamw, muon = ([p for g in o.param_groups for p in g["params"]] for o in optimizers)
    named = dict(model.named_parameters())
    assert {id(p) for p in adamw + muon} == {id(p) for p in named.values()}
    assert len(adamw) + len(muon) == len(named)
    kinds = {name.split(".", 2)[2] for name, p in named.items() if any(p is q for q in muon)}
    layers = ["attention.qkv", "attention.out", "up", "down"]
    layers += ["from_x_t", "hidden.0", "hidden.1", "out"]  # not what reads tokens
    assert kinds == {f"{layer}.weight" for layer in layers}
    (all_of_them,) = make_optimizers(model, 1e-3, 0.0, muon=False)
    assert len(all_of_them.param_groups[0]["params"]) == len(named)


def test_a_step_is_the_polar_factor_of_the_gradient():
    """Singular values all near lr·0.2·sqrt(max(m, n)), the same singular vectors."""
    torch.manual_seed(0)
    weight, lr = nn.Parameter(torch.randn(64, 16)), 3e-3
    muon = Muon([weight], lr, weight_decay=0.0)
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    U, _, Vh = torch.linalg.svd(weight.grad, full_matrices=False)
    muon.step()
    step = (before - weight.detach()) / (lr * 0.2 * max(weight.shape) ** 0.5)
    assert (torch.linalg.svdvals(step) - 1).abs().max() < 0.4  # after five Newton-Schulz steps
    assert F.cosine_similarity(step.flatten(), (U @ Vh).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch(monkeypatch, weight_decay):
    """Kept in float32. Tall, wide, square, a zero gradient and none; then a step from its state."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (16, 16), (48, 16), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs, lr = copy.deepcopy(ours), 0.1
    muon = Muon(ours, lr, weight_decay)
    options = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, lr, **options)
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) * 10.0**-i
            p.grad = [p.grad, 0 * p.grad, None][max(0, i - 2)]
            q.grad = copy.deepcopy(p.grad)
        if step == 3:
            muon.load_state_dict(copy.deepcopy(reference.state_dict()))
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4 * lr)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(*(o.state[x] for o, x in ((muon, p), (reference, q))))
