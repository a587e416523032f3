"""What public functions take as tensors: converted alike, or refused by the argument's name.

Why: arrays come as views, in other dtypes and on other devices, with a batch of one in place of
many. Broadcast in silence, each is another answer; and NaN in is NaN out, in files and in plans.

    python -m pytest tests/test_tensors.py
"""

import math

import numpy as np
import pytest
import torch
from conftest import L, make_gestures
from torch import nn

import train_diffusion_ddim as tdd
from trainlib import tensors
from trainlib.errors import UserError
from trainlib.tensors import cost_gradient, draw_eps, eval_mode, in_batches, model_diagnostics

X_0 = make_gestures(4)
EDGES = tdd.press_edges(X_0)
SHAPE = tuple(X_0.shape)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"d_model": 16, "nhead": 2, "num_layers": 1, "dim_feedforward": 32}
    network = tdd.MinimalDiffusionTransformer(3, L, **options, known_frames=True)
    return network.eval().requires_grad_(False)


SCHEDULER = tdd.DDIMScheduler(50)
VIEWS = {  # of one array
    "a list": lambda x: x.tolist(),
    "NumPy": lambda x: x.numpy(),
    "reversed twice": lambda x: x.numpy()[::-1].copy()[::-1],
    "another byte order": lambda x: x.numpy().astype(">f4"),
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "columns first": lambda x: np.asfortranarray(x.numpy()),
    "double": lambda x: x.double(),
    "of a wider one": lambda x: torch.stack([x, 1 - x], dim=-1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with a gradient": lambda x: x.clone().requires_grad_(),
}


def as_view(name, x):
    """`x` as the view of that name; a mask stays of bool."""
    if x.dtype != torch.bool:
        return VIEWS[name](x)
    if name in ("a list", "NumPy", "reversed twice", "read-only", "columns first"):
        return VIEWS[name](x)
    return torch.stack([x, ~x], dim=-1)[..., 0]


@pytest.mark.parametrize("name", VIEWS)
def test_metrics_of_a_view_are_those_of_a_copy(name):
    other = make_gestures(4, seed=5)
    functions = (
        tdd.compute_reconstruction_metrics,
        tdd.compute_spatial_accuracy,
        tdd.compute_gesture_type_accuracy,
    )
    for function in functions:
        assert function(VIEWS[name](X_0), VIEWS[name](other)) == function(X_0, other)
    press = X_0[..., 2], other[..., 2]
    expected = tdd.compute_temporal_iou(*press)
    assert tdd.compute_temporal_iou(*map(VIEWS[name], press)) == expected


BAD_PAIRS = {
    "one for many": (X_0[:1], X_0),
    "many for one": (X_0, X_0[:1]),
    "no batch": (X_0[0], X_0[0]),
    "none at all": (X_0[:0], X_0[:0]),
    "other lengths": (X_0, X_0[:, :10]),
    "flattened": (X_0.reshape(-1, 3), X_0.reshape(-1, 3)),
    "two channels": (X_0[..., :2], X_0[..., :2]),
    "a batch of batches": (X_0[None], X_0[None]),
    "NaN": (X_0, X_0 * math.nan),
    "infinite": (X_0 + math.inf, X_0),
    "text": ("a", "b"),
    "None": (None, X_0),
    "complex": (X_0 + 0j, X_0),
    "masked": (np.ma.masked_array(X_0.numpy()), X_0),
    "objects": (X_0.numpy().astype(object), X_0),
    "sparse": (X_0, X_0.to_sparse()),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_pairs_that_do_not_match_are_refused(name):
    functions = (
        tdd.compute_reconstruction_metrics,
        tdd.compute_spatial_accuracy,
        tdd.compute_gesture_type_accuracy,
    )
    for function in functions:
        with pytest.raises(UserError, match="original and reconstructed must"):
            function(*BAD_PAIRS[name])


@pytest.mark.parametrize("name", ["one for many", "none at all", "NaN", "text", "None"])
def test_presses_that_do_not_match_are_refused(name):
    pair = (x[..., 2] if isinstance(x, torch.Tensor) else x for x in BAD_PAIRS[name])
    with pytest.raises(UserError, match="original and reconstructed must"):
        tdd.compute_temporal_iou(*pair)
    with pytest.raises(UserError, match=r"must be \[B, L\]"):
        tdd.compute_temporal_iou(X_0, X_0)


# ---- the sampler -----------------------------------------------------------------------


def drawn(model, **given):
    generator = torch.Generator().manual_seed(3)
    return SCHEDULER.sample(model, SHAPE, "cpu", 4, 1.0, generator=generator, **given)


@pytest.mark.parametrize("name", VIEWS)
def test_samples_from_a_view_are_those_from_a_copy(model, name):
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    given = {"x_T": x_T, "known": X_0, "known_mask": EDGES}
    views = {key: as_view(name, x) for key, x in given.items()}
    assert torch.equal(drawn(model, **views), drawn(model, **given))
    assert torch.equal(given["x_T"], x_T)  # nothing is written into


@pytest.mark.parametrize("shape", [[4, L, 3], torch.Size(SHAPE), tuple(map(np.int64, SHAPE))])
def test_a_shape_may_be_any_sequence_of_integers(model, shape):
    x = SCHEDULER.sample(model, shape, "cpu", 2, generator=torch.Generator().manual_seed(0))
    y = SCHEDULER.sample(model, SHAPE, "cpu", 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, y)


BAD_SAMPLES = {
    # name: (arguments, words of the message)
    "a shape of two": ({"shape": (4, L)}, "shape"),
    "no shape": ({"shape": None}, "shape"),
    "a number for a shape": ({"shape": 4}, "shape"),
    "a shape of numbers": ({"shape": (4.0, L, 3)}, "shape"),
    "other lengths": ({"shape": (4, L + 1, 3)}, f"{L} frames"),
    "other channels": ({"shape": (4, L, 4)}, r"x_t must be \[B, L, 3\]"),
    "no device of ours": ({"device": "gpu"}, "device 'gpu'"),
    "a device that is not there": ({"device": "cuda:77"}, "device 'cuda:77'"),
    "steps as text": ({"num_inference_steps": "5"}, "num_inference_steps"),
    "steps as a number": ({"num_inference_steps": 5.0}, "num_inference_steps"),
    "steps as None": ({"num_inference_steps": None}, "num_inference_steps"),
    "eta as text": ({"eta": "1"}, "eta"),
    "eta as None": ({"eta": None}, "eta"),
    "start_t as a number": ({"start_t": 7.0}, "start_t"),
    "a seed for a generator": ({"generator": 3}, "generator"),
    "x_T of one": ({"x_T": torch.zeros(1, L, 3)}, "x_T must be"),
    "x_T that is NaN": ({"x_T": torch.full(SHAPE, math.nan)}, "x_T must be finite"),
    "known of one": ({"known": X_0[:1], "known_mask": EDGES}, "known must be"),
    "known that is NaN": ({"known": X_0 * math.nan, "known_mask": EDGES}, "known must be finite"),
    "known that is infinite": ({"known": X_0 / 0, "known_mask": EDGES}, "known must be finite"),
    "a mask of one": ({"known": X_0, "known_mask": EDGES[:1]}, "known_mask must be"),
    "a mask per channel": ({"known": X_0, "known_mask": X_0 > 0}, "known_mask must be"),
    "a mask of numbers": ({"known": X_0, "known_mask": EDGES.float()}, "known_mask must hold"),
    "a mask of integers": ({"known": X_0, "known_mask": EDGES.long()}, "known_mask must hold"),
    "a mask for known": ({"known": EDGES, "known_mask": X_0}, "must"),
    "a negative shape": ({"shape": (-1, L, 3)}, "shape"),
    "a shape beyond counting": ({"shape": (10**30, L, 3)}, "shape"),
    "no device": ({"device": None}, "device None"),
    "steps as a switch": ({"num_inference_steps": True}, "num_inference_steps"),
    "x_T that is complex": ({"x_T": torch.zeros(SHAPE) + 0j}, "x_T must be a dense array of real"),
    "x_T that is masked": ({"x_T": np.ma.zeros(SHAPE)}, "x_T must be a dense array of real"),
    "x_T that is sparse": ({"x_T": torch.zeros(SHAPE).to_sparse()}, "x_T must be a dense array"),
    "x_T as text": ({"x_T": "noise"}, "x_T must be a dense array"),
    "a cost that is no function": ({"cost_fn": 3}, "cost_fn must be a function"),
    "one cost for all": ({"cost_fn": lambda x: x.mean()}, "one cost per action"),
    "a column of costs": ({"cost_fn": lambda x: x.sum((1, 2))[:, None]}, "one cost per action"),
    "a cost that is None": ({"cost_fn": lambda x: None}, "cost_fn"),
    "a cost without its input": ({"cost_fn": lambda x: torch.zeros(4)}, "cost_fn"),
    "a detached cost": ({"cost_fn": lambda x: x.detach().sum((1, 2))}, "cost_fn"),
    "a cost of NumPy": ({"cost_fn": lambda x: x.detach().numpy().sum()}, "cost_fn"),
    "guidance as text": (
        {"cost_fn": lambda x: x.sum((1, 2)), "guidance_scale": "1"}, "guidance_scale",
    ),
    "guidance that is NaN": (
        {"cost_fn": lambda x: x.sum((1, 2)), "guidance_scale": math.nan}, "guidance_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_what_a_sample_cannot_be_is_refused_by_name(model, name):
    given, words = BAD_SAMPLES[name]
    arguments = {"shape": SHAPE, "device": "cpu", "num_inference_steps": 3, **given}
    with pytest.raises(UserError, match=words) as error:
        SCHEDULER.sample(model, **arguments)
    assert "\n" not in str(error.value)


def test_known_frames_may_be_nan_where_they_are_not_given(model):
    hidden = X_0.where(EDGES[..., None], torch.full((), math.nan))
    given = drawn(model, known=X_0, known_mask=EDGES)
    assert torch.equal(drawn(model, known=hidden, known_mask=EDGES), given)


ENDS_IN_NAN = {
    "a cost": {"cost_fn": lambda x: (x * math.nan).sum((1, 2))},
    "a root of nothing": {"cost_fn": lambda x: (x - x).sum((1, 2)).sqrt()},
    "a logarithm of less": {"cost_fn": lambda x: (x.sum((1, 2)) - 1e9).log()},
}


@pytest.mark.parametrize("name", ENDS_IN_NAN)
def test_a_cost_that_is_not_finite_ends_the_sample(model, name):
    with pytest.raises(FloatingPointError, match="not finite"):
        drawn(model, **ENDS_IN_NAN[name])


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e38])
def test_weights_that_diverged_end_every_protocol(model, weight):
    diverged = tdd.MinimalDiffusionTransformer(3, L, 16, 2, 1, 32, known_frames=True).eval()
    for p in diverged.parameters():
        nn.init.constant_(p, weight)
    free = tdd.DDIMScheduler(50, clip_sample=False)
    for call in (
        lambda: free.sample(diverged, SHAPE, "cpu", 3),
        lambda: tdd.generate(diverged, free, SHAPE, 3),
        lambda: tdd.recreate(diverged, free, X_0, 3),
        lambda: tdd.denoise_one_shot(diverged, free, X_0, 0.4),
        lambda: free.invert(diverged, X_0, 3),
        lambda: tdd.validation_loss(diverged, free, X_0),
    ):
        with pytest.raises(FloatingPointError, match="diverge"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaln", [False, True])
def test_a_model_samples_in_its_own_type(dtype, adaln):
    torch.manual_seed(0)
    options = {"adaln": adaln, "rotary": adaln, "contacts": adaln, "known_frames": True}
    network = tdd.MinimalDiffusionTransformer(3, L, 16, 2, 1, 32, **options).eval()
    for p in network.output_projection.parameters():
        nn.init.normal_(p, std=0.2)
    scheduler = tdd.DDIMScheduler(50, prediction_type="x0")
    given = {"known": X_0, "known_mask": EDGES}

    def sample():
        generator = torch.Generator().manual_seed(0)
        return scheduler.sample(network, SHAPE, "cpu", 3, generator=generator, **given)

    expected = sample()
    network.to(dtype)
    x = sample()
    assert x.dtype == dtype
    tolerance = {torch.float64: 5e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=tolerance)


def test_the_default_dtype_changes_no_sample(model):
    expected = drawn(model, known=X_0, known_mask=EDGES)
    torch.set_default_dtype(torch.float64)
    try:
        given = drawn(model, known=X_0, known_mask=EDGES)
        recreated = tdd.recreate(model, SCHEDULER, X_0, 3)
        built = tdd.DDIMScheduler(50)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(given, expected)
    assert torch.equal(recreated, tdd.recreate(model, SCHEDULER, X_0, 3))
    assert torch.equal(built.alphas_cumprod, SCHEDULER.alphas_cumprod)


def test_a_compiled_model_samples_as_it_is(model):
    compiled = torch.compile(model, backend="eager")
    given = {"known": X_0, "known_mask": EDGES}
    assert torch.equal(drawn(compiled, **given), drawn(model, **given))
    recreated = tdd.recreate(compiled, SCHEDULER, X_0, 3)
    assert torch.equal(recreated, tdd.recreate(model, SCHEDULER, X_0, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: x[:1],
        lambda x, t: x[..., :1],
        lambda x, t: x.mean(),
        lambda x, t: (x, t),
        lambda x, t: x.numpy(),
        lambda x, t: None,
    ],
)
def test_what_a_model_answers_is_never_broadcast(function):
    with pytest.raises(UserError, match="the model must return a tensor"):
        SCHEDULER.sample(function, SHAPE, "cpu", 2)
    with pytest.raises(UserError, match="the model must return a tensor"):
        tdd.denoise_one_shot(function, SCHEDULER, X_0, 0.4)


PROTOCOLS = {
    "recreate": lambda model, x: tdd.recreate(model, SCHEDULER, x, 2),
    "denoise": lambda model, x: tdd.denoise_one_shot(model, SCHEDULER, x, 0.4),
    "invert": lambda model, x: SCHEDULER.invert(model, x, 2),
    "loss": lambda model, x: torch.tensor(tdd.validation_loss(model, SCHEDULER, x)),
    "validate": lambda model, x: tdd.validate(model, SCHEDULER, x, {"num_inference_steps": 2})[1],
    "generation": lambda _, x: torch.tensor([*tdd.generation_metrics(x).values()]),
    "rows": lambda _, x: torch.tensor([r["spatial_accuracy"] for r in recreated_rows(x)]),
    "gesture metrics": lambda _, x: torch.tensor([*tdd.gesture_metrics(x, X_0).values()]),
}


def recreated_rows(x):
    return tdd.recreation_rows(X_0, x, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_take_any_view(model, protocol):
    call = PROTOCOLS[protocol]
    for name, of in VIEWS.items():
        assert torch.equal(call(model, of(X_0)), call(model, X_0)), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_refuse_what_is_no_gestures(model, protocol):
    for name, pair in BAD_PAIRS.items():
        if name not in ("one for many", "many for one", "other lengths", "infinite"):
            bad = pair[name in ("NaN", "sparse")]
            with pytest.raises(UserError, match="must be"):
                pytest.fail(f"{name}: {PROTOCOLS[protocol](model, bad)}")


# ---- what the loop trains --------------------------------------------------------------


def denoiser():
    return tdd.MinimalDiffusionTransformer(3, L, 16, 2, 1, 32)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_what_is_wrapped_is_trained(wrapped):
    inside = tensors.to_train(wrapped(denoiser()), "cpu")
    assert type(inside) is tdd.MinimalDiffusionTransformer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda m: m.half(), "float32"),
        (lambda m: m.double(), "float32"),
        (lambda m: m.to("meta"), "float32"),
        (lambda m: m.requires_grad_(False), "whose weights learn"),
        (lambda m: nn.Linear(3, 3), "must be a denoiser"),
        (lambda m: m.forward, "must be a denoiser"),
        (lambda m: "model", "must be a denoiser"),
        (lambda m: None, "must be a denoiser"),
    ],
)
def test_what_cannot_learn_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        tensors.to_train(given(denoiser()), "cpu")


# ---- what protocols share --------------------------------------------------------------


def test_noise_of_the_cpus_generator_is_the_same_for_every_device():
    here = draw_eps((3, 4), "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(here, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    there = draw_eps((3, 4), "meta", torch.Generator().manual_seed(0), torch.float64)
    assert there.is_meta and there.dtype == torch.float64


def test_in_batches_is_the_function():
    x, y = torch.randn(7, 2), torch.randn(7, 2)
    sizes = []

    def add(a, b):
        sizes.append(len(a))
        return a + b

    assert torch.equal(in_batches(add, x, y, batch_size=3), x + y) and sizes == [3, 3, 1]


def test_eval_mode_is_restored_even_after_a_fault(model):
    model.train()
    with pytest.raises(KeyError), eval_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()
    model.eval()
    with eval_mode(model), eval_mode(lambda x: x):
        pass
    assert not model.training


def test_the_gradient_of_a_cost_is_that_of_its_formula():
    x = torch.rand(SHAPE)
    torch.testing.assert_close(cost_gradient(lambda x: (x**3).sum((1, 2)), x), 3 * x**2)


def test_without_numbers_they_are_taken_to_be_finite():
    assert tensors.is_finite(torch.empty(3, device="meta"))
    assert not tensors.is_finite(torch.tensor([0.0, math.inf]))


def test_model_diagnostics_by_hand(tiny_config):
    torch.manual_seed(0)
    model, x_0 = tdd.build_model(tiny_config()), make_gestures(5)
    scores = model_diagnostics(model, x_0)
    total = sum((p.detach().double() ** 2).sum().item() for p in model.parameters())
    assert scores["model/weight_norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    model.forward = lambda x_t, t: model.output_projection(torch.full((5, 4, 16), -0.5))
    assert model_diagnostics(model, x_0)["model/activation_stats"] == pytest.approx(0.5)
    assert model.training and not model.output_projection._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exponential_that_underflows_is_a_normal_float(dtype):
    """Smaller ones take a CPU fifty times as long, and nothing here can tell them from 0."""
    x = torch.tensor([-1e6, -800.0, -95.0, -3.0, 0.0, 5.0], dtype=dtype)
    y, expected = tensors.exp_below_0(x), x.clamp(max=0).exp()
    assert (y >= torch.finfo(dtype).tiny).all() and (y - expected).abs().max() < 1e-37
