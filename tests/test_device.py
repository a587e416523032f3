"""Part of what a GPU would show, without one: all stays on its device, a step waits for it once.

Tensors of torch's meta device have shapes and no values. An operation that mixes them with the
CPU's fails here as on a GPU; what Python makes the host wait for is counted: a value that it asks
for, and a copy to the device that is not told to go on without it. Not seen: what waits inside a
kernel, and AdamW and autocast, which do not know this device and are left out.

    python -m pytest tests/test_device.py
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, L
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_diffusion_ddim as tdd
from trainlib.state import TrainState

CPU, META = torch.device("cpu"), torch.device("meta")
DEFAULT = {"prediction_type": "x0", "contacts": True}  # in place of what TINY has


class Watch(TorchDispatchMode):
    """Count the waits for the device; every value asked for is true. Refuse a mix of devices."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return True
        tensors = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        assert len({x.device for x in tensors if x.ndim}) < 2, func
        result = func(*args, **kwargs)
        if [x.device for x in tensors] == [CPU] and result.device == META:
            self.waits += not kwargs.get("non_blocking", False)
        return result


@pytest.fixture
def on_meta(monkeypatch):
    """Return a function that builds a run there."""
    real = torch.tensor  # it copies to a device where no dispatch mode sees it

    def tensor(data, device=CPU, **options):
        return real(data, **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr))

    def build(**options):
        config = tdd.TrainConfig(**TINY | DEFAULT | options)
        model, scheduler = tdd.build_model(config).to(META), tdd.build_scheduler(config).to(META)
        return TrainState(model, scheduler, config, total_steps=100, num_tasks=tdd.NUM_TASKS)

    return build


@pytest.mark.parametrize("balance_loss", [False, True])
@pytest.mark.parametrize("options", [{}, {"context_dim": 2, "augment": False}])
def test_a_training_step_waits_once(on_meta, options, balance_loss):
    """To keep a loss that is not finite from the weights."""
    state = on_meta(balance_loss=balance_loss, **options)
    x_0 = torch.empty(4, L, 3, device=META)
    context = torch.empty(4, 2, device=META) if options else None
    with Watch() as watch:
        for _ in range(3):
            scalars = tdd.train_step(state, x_0, context)
    assert state.step == 3 and watch.waits == 3
    assert all(v.device == META for v in scalars.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("sampler", tdd.SAMPLERS)
@pytest.mark.parametrize("prediction_type", tdd.PREDICTION_TYPES)
def test_a_sample_never_waits(on_meta, sampler, prediction_type):
    state = on_meta(prediction_type=prediction_type, contacts=False)
    x_0 = torch.empty(2, L, 3, device=META)
    given = {"known": x_0, "known_mask": torch.empty(2, L, dtype=torch.bool, device=META)}
    with Watch() as watch:
        for options in (
            {},
            given,
            {"x_T": x_0, "start_t": 20},
            {"cost_fn": lambda x: x.sum((1, 2))},
        ):
            x = state.scheduler.sample(
                state.model, (2, L, 3), META, 5, eta=1.0, sampler=sampler, **options
            )
            assert x.device == META and x.shape == (2, L, 3)
        assert state.scheduler.invert(state.model, x_0, 5).device == META
    assert watch.waits == 0


@pytest.mark.parametrize("name", tdd.KNOWN_STRATEGIES)
def test_masks_of_known_frames_are_drawn_where_the_gestures_are(name):
    strategy, _ = tdd.KNOWN_STRATEGIES[name]
    with Watch() as watch:
        mask = strategy(torch.empty(2, L, 3, device=META))
    assert mask.device == META and watch.waits == 0


def test_the_protocols_sample_on_the_device(on_meta):
    state = on_meta()
    model, scheduler, x_0 = state.model, state.scheduler, torch.empty(3, L, 3, device=META)
    with Watch() as watch:
        recreated = tdd.recreate(model, scheduler, x_0, **state.config.sampling)
        generated = tdd.generate(model, scheduler, x_0.shape, **state.config.sampling)
        denoised = tdd.denoise_one_shot(model, scheduler, x_0, sigma=0.4)
        rounded = tdd.to_gesture(recreated)
    for x in (recreated, generated, denoised, rounded):
        assert x.device == META and x.shape == x_0.shape
    N = state.config.num_inference_steps
    assert watch.waits == 3 + 2 * N  # noise of the CPU: a start each, z at each step of two samples
