"""The planner API, argument by argument, and goals as a context of the denoiser.

Why: VJ2-GUI calls `Planner.plan` twice a second; what it returns must be an action, must cost what
it says, and must come in time.

    python -m pytest tests/test_planning_planner.py
"""

import io
import itertools
import math
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_gestures, python

import planning.planner
import train_diffusion_ddim as tdd
from planning import bank, goals, tasks, world
from planning.planner import Planner, with_goal
from planning.request import Request
from trainlib.checkpoint import save_checkpoint

L = 250
TARGET = torch.tensor([0.3, 0.6])


def begin_cost(actions):
    """Squared distance of the mean pressed position from TARGET; smooth everywhere; (B,)."""
    press = actions[..., 2]
    centre = (press[..., None] * actions[..., :2]).sum(1) / (press.sum(1)[:, None] + 1e-3)
    return ((centre - TARGET) ** 2).sum(-1) + (press.sum(1) < 1)


@pytest.fixture(scope="module")
def planner(untrained_run):
    return Planner.load(untrained_run)


@pytest.fixture
def few_steps(monkeypatch):
    """Let refinement end early, where how far it comes is not the question."""
    monkeypatch.setattr(planning.planner, "MOST_STEPS", 6)


def test_the_planner_stands_alone():
    """VJ2-GUI has an `augmentation` of its own: the planner must not touch ours."""
    code = (
        "import planning.planner, sys; assert not [m for m in sys.modules if m.startswith("
        "('evaluation', 'planning.tasks', 'planning.world', 'augmentation', 'matplotlib'))]"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_best_draws_are_refined(planner, monkeypatch):
    """The cheapest 16, best first, of those that touch a frame that is not known."""
    gestures, refined = make_gestures(40, L), []
    gestures[5] = 0
    stub(planner, monkeypatch, gestures)
    monkeypatch.setattr(planner, "_refine", lambda *args: refined.append(args[-1]))
    options = {"num_plans": 40, "budget_ms": math.inf}
    planner.plan(begin_cost, **options)
    order = begin_cost(gestures).argsort()
    assert 5 not in order[:16] and torch.equal(refined[0], gestures[order[:16]])
    planner.plan(begin_cost, known=gestures[0] * 0, known_mask=ALL, **options)
    assert len(refined[1]) == 0


def test_what_refinement_makes_worse_is_left(planner, monkeypatch):
    """The one draw is an arc and the cost the distance from it, so that every other is worse."""
    arc = touch(50, 150, torch.linspace(0, math.pi, 100).sin().abs(), 1)
    stub(planner, monkeypatch, arc[None])
    result = planner.plan(lambda a: (a - arc).abs().sum((1, 2)), num_plans=1, budget_ms=500)
    assert result.evaluations > 10 and result.cost == 0 and torch.equal(result.actions, arc)
    assert result.method == "draw"


class Follower(torch.nn.Module):
    """A denoiser that holds the first frame, which is known."""

    known_frames = True

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, known, known_mask):
        assert known_mask[:, 0].all() and not known_mask[:, 1:].any()
        return known[:, :1].expand_as(x_t)


def test_the_denoiser_is_given_the_known_frames():
    planner = Planner(Follower(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})
    known = torch.tensor([0.25, 0.75, 1]).expand(L, 3)
    result = planner.plan(known=known, known_mask=torch.arange(L) < 1)
    assert torch.allclose(result.actions, known, atol=1e-5)


class Faithful(torch.nn.Module):
    """A denoiser that takes the noisy gesture for the clean one."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    known_frames = True

    def forward(self, x_t, t, known=None, known_mask=None):
        return x_t


def noise_planner():
    """A planner whose draws are noise with presses in it; an untrained denoiser draws none."""
    return Planner(Faithful(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})


@pytest.fixture(autouse=True)
def forget(planner):
    planner.reset()


def touch(first, stop, x, y):
    """A gesture (L, 3) that is pressed from frame `first` until `stop`, at x and y there."""
    gesture = torch.zeros(L, 3)
    gesture[first:stop, 2] = 1
    gesture[first:stop, 0], gesture[first:stop, 1] = x, y
    return gesture


def stub(planner, monkeypatch, gestures):
    """Let the planner draw from given gestures, (N, L, 3), in turn."""
    queue = list(gestures)

    def draw(request, kinds):
        drawn = [queue[i % len(queue)] for i in range(len(kinds))]
        queue.extend(queue[: len(kinds)])
        del queue[: len(kinds)]
        return request.paste(torch.stack(drawn) if drawn else gestures[:0])

    monkeypatch.setattr(planner, "_draw", draw)


def test_a_plan_is_an_action():
    result = noise_planner().plan()
    assert result.actions.shape == (L, 3) and result.actions.dtype == torch.float32
    press = result.actions[:, 2]
    assert set(press.tolist()) == {0.0, 1.0}
    assert (result.actions[press == 0] == 0).all()
    assert ((result.actions >= 0) & (result.actions <= 1)).all()
    assert math.isnan(result.cost) and result.evaluations == 0
    assert 0 < result.sampler_ms <= result.milliseconds


def test_the_cost_is_that_of_the_actions(planner, monkeypatch):
    stub(planner, monkeypatch, make_gestures(40, L))
    result = planner.plan(begin_cost, num_plans=8, budget_ms=2000)
    assert result.cost == pytest.approx(begin_cost(result.actions[None]).item(), abs=1e-6)
    drawn = begin_cost(make_gestures(40, L)[:8]).min().item()
    assert result.cost < 0.5 * drawn, "refinement improves on the draws"
    assert result.evaluations > 8


@pytest.mark.parametrize("has_gradient", [True, False])
def test_every_evaluation_is_counted(planner, monkeypatch, has_gradient):
    stub(planner, monkeypatch, make_gestures(40, L))
    count = {"forward": 0, "backward": 0}

    def cost_fn(actions):
        count["forward"] += len(actions)
        if actions.requires_grad:
            actions.register_hook(lambda g: count.update(backward=count["backward"] + len(g)))
        return begin_cost(actions if has_gradient else actions.detach())

    result = planner.plan(cost_fn, num_plans=4, budget_ms=300)
    assert (count["backward"] > 0) == has_gradient
    assert result.evaluations == count["forward"] + 2 * count["backward"]


WEIGHT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    "cost_fn",
    [
        lambda a: begin_cost(a.detach()),
        lambda a: begin_cost(a.detach()) * WEIGHT,  # a gradient, but not of the actions
        lambda a: begin_cost((50 * a).round() / 50),  # one of zeros
    ],
)
def test_a_cost_without_gradient_is_refined_too(planner, monkeypatch, cost_fn):
    stub(planner, monkeypatch, make_gestures(40, L))
    result = planner.plan(cost_fn, num_plans=4, budget_ms=2000)
    assert result.cost < 0.9 * cost_fn(make_gestures(40, L)[:4]).min().item()


def test_the_budget_holds(planner, monkeypatch):
    """A cost of 5 ms per action: at most one more call than fits."""
    stub(planner, monkeypatch, make_gestures(40, L))

    def slow(actions):
        time.sleep(0.005 * len(actions))
        return begin_cost(actions)

    few = planner.plan(slow, num_plans=64, budget_ms=150)
    planner.reset()
    many = planner.plan(slow, num_plans=64, budget_ms=1500)
    assert few.milliseconds < 450 and many.milliseconds < 2000
    assert few.evaluations < many.evaluations
    assert planner.plan(slow, num_plans=64, budget_ms=0.1).actions.shape == (L, 3)


def test_known_frames_are_in_the_plan(planner):
    known = make_gestures(1, L)[0]
    mask = torch.zeros(L, dtype=torch.bool)
    mask[:30] = True
    for cost_fn in (None, begin_cost):
        result = planner.plan(cost_fn, known=known, known_mask=mask, num_plans=4, budget_ms=300)
        assert torch.equal(result.actions[:30], known[:30])


def test_init_and_strength():
    """A small strength stays near init; with init the cost is never above that of init."""
    init = make_gestures(3, L)[2]
    planner = noise_planner()
    near = planner.plan(init=init, strength=0.02, seed=1).actions
    far = planner.plan(init=init, strength=1.0, seed=1).actions
    pure = planner.plan(init=None, seed=1).actions
    assert (near - init).abs().mean() < (far - init).abs().mean()
    assert torch.equal(far, pure), "strength 1 is pure noise"
    planned = planner.plan(begin_cost, init=init, strength=0.3, num_plans=2, budget_ms=200)
    assert planned.cost <= begin_cost(init[None]).item() + 1e-6


def test_the_last_plan_is_a_start_until_reset(planner, monkeypatch, few_steps):
    with monkeypatch.context() as patch:
        stub(planner, patch, make_gestures(40, L))
        first = planner.plan(begin_cost, num_plans=16, budget_ms=1500)
    second = planner.plan(begin_cost, num_plans=1, budget_ms=50)
    assert second.cost <= first.cost + 1e-6
    planner.reset()
    assert planner.last is None


def flat(actions):
    """A cost that prefers nothing and has no gradient."""
    return 0 * actions.detach().sum((1, 2))


def test_num_plans_and_steps(monkeypatch):
    """All are drawn if there is time: one alone, then as many as a call of the cost may hold."""
    drawn, planner = [], noise_planner()
    original = planner._draw

    def draw(request, kinds):
        drawn.append((request.num_inference_steps, len(kinds)))
        return original(request, kinds)

    monkeypatch.setattr(planner, "_draw", draw)
    monkeypatch.setattr(planner, "_refine", lambda *a: None)
    planner.plan(flat, num_plans=40, num_inference_steps=3, budget_ms=math.inf)
    assert drawn == [(3, 1), (3, 32), (3, 7)]
    planner.num_inference_steps = 7  # of the run
    planner.plan(flat, num_plans=1, budget_ms=math.inf)
    assert drawn[3] == (7, 1)


def test_a_planner_takes_as_many_steps_as_its_run():
    denoiser, scheduler = Faithful(), tdd.DDIMScheduler(prediction_type="x0")
    for steps in (1, 4):
        seen = []
        hook = denoiser.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))
        Planner(denoiser, scheduler, {"eta": 0.0, "num_inference_steps": steps}).plan(num_plans=1)
        hook.remove()
        assert len(seen) == steps


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [(lambda num: 0.05, 60, 60), (lambda num: 0.01 * num, 20, 51)]
)
def test_half_of_the_time_is_drawn_in(monkeypatch, seconds, least, most):
    """Half of 1 s: enough for 60 if a chunk costs as much as one, for 50 if each costs 10 ms."""
    planner = noise_planner()
    stub(planner, monkeypatch, make_gestures(40, L))
    quick, drawn = planner._draw, []

    def draw(request, kinds):
        time.sleep(seconds(len(kinds)))
        drawn.append(len(kinds))
        return quick(request, kinds)

    monkeypatch.setattr(planner, "_draw", draw)
    planner.plan(flat, num_plans=60, budget_ms=1000)
    assert least <= sum(drawn) <= most


def test_refinement_ends_without_a_deadline(planner, monkeypatch):
    """A hundred steps from each of four starts; or 360 evaluations of CEM."""
    stub(planner, monkeypatch, make_gestures(40, L))
    for cost_fn, most in ((begin_cost, 5 + 4 + 3 * 4 * 100), (flat, 5 + 4 + 360)):
        planner.reset()
        result = planner.plan(cost_fn, num_plans=4, budget_ms=math.inf)
        assert 0.9 * most < result.evaluations <= most + 1


def in_place(actions):
    """A cost that overwrites what it is given."""
    costs = begin_cost(actions)
    actions.zero_()
    return costs


@pytest.mark.parametrize(
    "cost_fn",
    [
        begin_cost,
        lambda a: begin_cost(a).double(),
        lambda a: begin_cost(a).half(),
        lambda a: (begin_cost(a) > 0.1).long(),
        in_place,
        lambda a: torch.where(begin_cost(a) > 0.1, math.nan, begin_cost(a)),
    ],
)
def test_costs_of_all_kinds(planner, monkeypatch, few_steps, cost_fn):
    stub(planner, monkeypatch, make_gestures(40, L))
    result = planner.plan(cost_fn, num_plans=16, budget_ms=2000)
    assert result.cost == pytest.approx(cost_fn(result.actions[None].clone()).item(), abs=1e-5)
    assert result.cost <= min(cost_fn(x[None].clone()).nan_to_num(9) for x in make_gestures(16, L))
    press = result.actions[:, 2:]
    assert ((press == 0) | (press == 1)).all() and (result.actions * (1 - press) == 0).all()
    assert ((result.actions >= 0) & (result.actions <= 1)).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_modes_of_the_caller(planner, monkeypatch, mode):
    """The gradient is taken in any of them, and the mode is left as it was."""
    stub(planner, monkeypatch, make_gestures(40, L))
    drawn = begin_cost(make_gestures(4, L)).min()
    with mode():
        result = planner.plan(begin_cost, num_plans=4, budget_ms=2000)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert result.method == "gradient" and result.reason == "" and result.cost < 0.5 * drawn
    assert not result.actions.requires_grad and not result.actions.is_inference()


def test_a_cost_made_of_inference_tensors_is_refined_by_cem_and_says_so(planner, monkeypatch):
    stub(planner, monkeypatch, make_gestures(40, L))
    with torch.inference_mode():
        target = TARGET + 0
        result = planner.plan(
            lambda a: ((a[:, :, :2] * target).sum(2) ** 2 + begin_cost(a)[:, None]).mean(1),
            num_plans=4, budget_ms=500,
        )  # fmt: skip
    assert result.method == "CEM"
    assert re.match("refined by CEM, not by the gradient.*[Ii]nference tensors", result.reason)


def test_a_plan_touches_nothing_else(planner):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    numbers = np.random.get_state()[1].copy()
    init = make_gestures(1, L)[0].requires_grad_()
    result = planner.plan(begin_cost, init=init, strength=0.5, num_plans=2, budget_ms=200)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == numbers).all() and init.grad is None
    result.actions.mul_(1000)
    assert planner.last.max() <= 1, "the plan that is remembered is its own"


ALL = torch.ones(L, dtype=torch.bool)


def with_nan(x):
    x = x.clone()
    x[100] = math.nan
    return x


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_plans": 0}, "num_plans must be at least 1, got 0"),
        ({"num_plans": 1.5}, "num_plans must be an integer, got float"),
        ({"num_plans": "8"}, "num_plans must be an integer"),
        ({"num_plans": True}, "num_plans must be an integer, got bool"),
        ({"num_plans": np.True_}, "num_plans must be an integer, got bool"),
        ({"num_plans": 2**63}, r"num_plans must be below 2\*\*63, got one of 64 bits"),
        ({"num_plans": None}, "num_plans must be an integer, got NoneType"),
        ({"budget_ms": 0}, "budget_ms must be above 0"),
        ({"budget_ms": math.nan}, "budget_ms must be above 0"),
        ({"budget_ms": np.float16(math.nan)}, "budget_ms must be above 0"),
        ({"budget_ms": "500"}, "budget_ms must be a number"),
        ({"budget_ms": True}, "budget_ms must be a number, got bool"),
        ({"budget_ms": None}, "budget_ms must be a number"),
        ({"budget_ms": torch.tensor(500.0)}, "budget_ms must be a number"),
        ({"strength": 0, "init": torch.zeros(L, 3)}, "strength must be in"),
        ({"strength": 1.5}, "strength must be in"),
        ({"strength": 10**400}, "strength must be in"),
        ({"strength": 0.5}, "needs an init"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": -(10**5000)}, "seed must be at least 0, got one of 16610 bits"),
        ({"seed": False}, "seed must be an integer"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"num_inference_steps": 2.0}, "num_inference_steps must be an integer"),
        ({"known": torch.zeros(L, 3)}, "given together"),
        ({"known_mask": torch.zeros(L).bool()}, "given together"),
        (
            {"init": [[0.0, 0.0, 0.0]] * L},
            "init must be a real, dense tensor or array .250, 3., got list",
        ),
        ({"init": with_nan(torch.zeros(L, 3))}, "init must be in .0, 1., got nan"),
        ({"init": with_nan(torch.zeros(L, 3)).numpy()}, "init must be in .0, 1., got nan"),
        ({"init": np.full((L, 3), 1e300)}, "init must be in .0, 1., got inf"),
        ({"init": torch.full((L, 3), -0.5)}, "got -0.5 to -0.5"),
        ({"init": torch.zeros(L)}, "init must be"),
        ({"init": torch.zeros(L, 3, dtype=torch.complex64)}, "init must be .* got torch.complex64"),
        ({"init": torch.zeros(L, 3).to_sparse()}, "init must be a real, dense tensor or array"),
        ({"init": torch.zeros(L, 3, device="meta")}, "init must be a real, dense tensor or array"),
        (
            {"init": np.zeros((L, 3), object)},
            "init must be a real, dense tensor or array .* got object",
        ),
        ({"init": np.ma.zeros((L, 3))}, "init must be a real, dense tensor or array"),
        ({"known": torch.zeros(9, 3), "known_mask": torch.zeros(9).bool()}, "known must be"),
        ({"known": np.zeros((3, L)).T[1:], "known_mask": ALL}, "known must be .* got float64 .249"),
        ({"known": torch.zeros(L, 3), "known_mask": torch.zeros(L)}, "known_mask must be bool"),
        ({"known": np.zeros((L, 3)), "known_mask": np.zeros(L)}, "known_mask must be bool"),
        ({"known": torch.zeros(L, 3), "known_mask": ALL[:9]}, "known_mask must be a real"),
        ({"known": with_nan(torch.zeros(L, 3)), "known_mask": ALL}, "known frames must have"),
        ({"known": torch.full((L, 3), math.inf), "known_mask": ALL}, "known frames must have"),
        ({"known": torch.full((L, 3), 0.7), "known_mask": ALL}, "press 0 or 1"),
        ({"cost_fn": 3}, "cost_fn must be a function"),
        ({"cost_fn": lambda a: a}, "one cost per action"),
        ({"cost_fn": lambda a: a.mean()}, "one cost per action"),
        ({"cost_fn": lambda a: 0.5}, "one cost per action, got float"),
        ({"cost_fn": lambda a: flat(a).numpy()}, "one cost per action, got float32 .2."),
        ({"cost_fn": lambda a: flat(a) + 1j}, "one cost per action, got torch.complex64"),
        ({"cost_fn": lambda a: flat(a) + math.inf}, "finite"),
        ({"cost_fn": lambda a: flat(a) * math.nan}, "finite costs, got none in"),
        ({"cost_fn": lambda a: flat(a).double() + 1e300}, "finite"),
    ],
)
def test_a_users_mistakes(planner, options, words):
    with pytest.raises(tdd.UserError, match=words):
        planner.plan(**options)


def test_unknown_frames_may_be_nan(planner):
    known = torch.full((L, 3), math.nan)
    known[:10] = 0
    result = planner.plan(known=known, known_mask=torch.arange(L) < 10)
    assert result.actions.isfinite().all() and (result.actions[:10] == 0).all()


def strided(x):
    """The same numbers, every second one of a larger array."""
    wide = torch.full((len(x), 2 * x.shape[1]), math.nan)
    wide[:, ::2] = x
    return wide[:, ::2]


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x + 0


# the same action as another kind of array; float16 holds its numbers exactly
KINDS = {
    "numpy": lambda x: x.numpy(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "numpy float64, other byte order": lambda x: x.numpy().astype(">f8"),
    "numpy float16, read-only": lambda x: np.broadcast_to(x.numpy().astype("f2"), x.shape),
    "transposed": lambda x: x.T.contiguous().T,
    "strided": strided,
    "numpy, reversed strides": lambda x: x.numpy()[::-1].copy()[::-1],
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "inference": made_in_inference_mode,
}


def exact_gesture():
    """A gesture whose numbers are eighths."""
    x = torch.zeros(L, 3)
    x[100:140] = torch.tensor([0.25, 0.625, 1])
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_array_plans_alike(kind, few_steps):
    """The same plan as for plain copies, and what was given is as it was."""
    of, gesture = KINDS[kind], exact_gesture()
    planner, mask = noise_planner(), torch.arange(L) < 120
    options = {"num_plans": 2, "budget_ms": math.inf, "num_inference_steps": 2, "seed": 0}
    plain = planner.plan(
        begin_cost, init=gesture, strength=0.5, known=gesture, known_mask=mask, **options
    )
    given = {"init": of(gesture), "known": of(gesture)}
    masks = {"strided": torch.stack([mask, ~mask], 1)[:, 0], "numpy": mask.numpy()}
    planner.reset()
    again = planner.plan(
        begin_cost, strength=0.5, known_mask=masks.get(kind, mask), **given, **options
    )
    assert torch.equal(again.actions, plain.actions) and again.cost == plain.cost
    assert again.evaluations == plain.evaluations, "refined the same way"
    for x in given.values():
        assert torch.equal(torch.as_tensor(np.array(x.tolist())).float(), gesture)
        assert getattr(x, "grad", None) is None


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "transposed"])
def test_every_kind_of_goal_plans_alike(kind):
    planner = Planner(Headed(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})
    goal = torch.tensor([0.5, -0.25])
    given = KINDS[kind](goal[:, None])[:, 0] if kind == "strided" else KINDS[kind](goal)
    assert torch.equal(planner.plan(goal=given).actions, planner.plan(goal=goal).actions)


@pytest.mark.parametrize("number", [np.int8, np.uint64, np.int64])
def test_numbers_of_numpy_are_numbers(planner, number):
    options = {"num_plans": 2, "num_inference_steps": 3, "seed": 1, "budget_ms": 60000}
    plain = planner.plan(flat, **options)
    planner.reset()
    same = {name: number(options[name]) for name in ("num_plans", "num_inference_steps", "seed")}
    same["budget_ms"] = np.float32(60000)
    assert torch.equal(planner.plan(flat, **same).actions, plain.actions)


def test_a_budget_of_any_size(planner):
    assert planner.plan(flat, num_plans=2**63 - 1, budget_ms=1).evaluations > 0
    assert planner.plan(flat, num_plans=1, budget_ms=10**400).evaluations > 0


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_of_the_process(untrained_run, monkeypatch, few_steps, default):
    """Loaded or called under another one, the planner plans in float32 as ever."""
    gestures = make_gestures(8, L)
    options = {"num_plans": 8, "budget_ms": math.inf}
    plain = Planner.load(untrained_run)
    drawn = plain.plan(seed=3).actions
    stub(plain, monkeypatch, gestures)
    expected = plain.plan(begin_cost, **options)
    torch.set_default_dtype(default)
    try:
        under = Planner.load(untrained_run)
        assert torch.allclose(under.plan(seed=3).actions, drawn, atol=1e-3)
        assert next(under.model.parameters()).dtype == torch.float32
        stub(under, monkeypatch, gestures)
        result = under.plan(begin_cost, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.actions.dtype == torch.float32
    assert torch.equal(result.actions, expected.actions) and result.cost == expected.cost


class Diverged(Faithful):
    """A denoiser whose weights have become too large: inf - inf in its sums."""

    def forward(self, x_t, t):
        return x_t * math.inf - math.inf


class LateNaN(Faithful):
    """One that fails at one frame alone."""

    def forward(self, x_t, t):
        x = x_t.clone()
        x[:, 7, 2] = math.nan
        return x


@pytest.mark.parametrize("model", [Diverged, LateNaN])
@pytest.mark.parametrize("cost_fn", [None, begin_cost])
@pytest.mark.parametrize("init", [None, exact_gesture()])
def test_a_diverged_denoiser_gives_no_plan(model, cost_fn, init):
    planner = Planner(model(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})
    with pytest.raises(FloatingPointError, match="not finite"):
        planner.plan(cost_fn, init=init, num_plans=4)
    assert planner.last is None


def test_a_diverged_checkpoint_cannot_be_loaded(untrained_run, tmp_path):
    content = torch.load(next(untrained_run.glob("*.pth")), weights_only=True)
    model, _, _ = tdd.load_model(untrained_run)
    names = {name for name, _ in model.named_parameters()}

    def spoil(x):
        for key, value in x.items():
            if isinstance(value, dict):
                spoil(value)
            elif key in names and "output_projection" in key:
                value.fill_(3e38)

    spoil(content)
    save_checkpoint(tmp_path / "diffusion_checkpoint_epoch_0.pth", content)
    with pytest.raises(FloatingPointError, match="not finite"):
        Planner.load(tmp_path)


def test_a_gradient_that_is_nan_stops_one_candidate_alone(planner, monkeypatch):
    """The square root at 0 has an infinite slope: the cost of one draw, but not of the others."""
    gestures, seen = make_gestures(3, L), []
    stub(planner, monkeypatch, gestures)
    best = begin_cost(gestures).argmin()

    def cost_fn(actions):
        seen.append(actions.isfinite().all())
        return begin_cost(actions) + 0 * (actions[:, 0, 0] - actions[:, 0, 0].detach()).sqrt()

    result = planner.plan(cost_fn, num_plans=3, budget_ms=math.inf)
    assert all(seen) and result.cost <= begin_cost(gestures)[best]


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", "meta", None, 5, 1.5, b"cpu", "cuda:99"])
def test_a_device_that_is_none_is_refused(untrained_run, device):
    with pytest.raises(tdd.UserError, match="device") as error:
        Planner.load(untrained_run, device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("checkpoint", [None, 5, b"runs", ["runs"]])
def test_a_checkpoint_is_a_path(checkpoint):
    with pytest.raises(tdd.UserError, match="checkpoint must be a path, got"):
        Planner.load(checkpoint)


def test_the_mistake_of_another_is_his(planner):
    def fails(actions):
        raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens"):
        planner.plan(fails)


def test_a_checkpoint_of_other_gestures_is_refused(straight_run):
    with pytest.raises(tdd.UserError, match="250 frames, got 20"):
        Planner.load(straight_run)
    with pytest.raises(tdd.UserError, match="device 'gpu' cannot be used"):
        Planner.load(straight_run, "gpu")


# ---- do nothing, noise, banks ----------------------------------------------------------


def test_doing_nothing_wins_ties(planner, monkeypatch):
    """Of a goal that is reached, or a cost that prefers nothing; and only ties."""
    stub(planner, monkeypatch, make_gestures(40, L))
    for cost_fn in (flat, lambda a: flat(a) + 0.25, lambda a: a[..., 2].mean(1)):
        planner.reset()
        result = planner.plan(cost_fn, num_plans=8, budget_ms=200)
        assert result.method == "nothing" and not result.actions.any()
        assert result.cost == cost_fn(torch.zeros(1, L, 3)).item()
    rounding = planner.plan(lambda a: flat(a) + 1 - 1e-7 * (a[..., 2] > 0).any(1), budget_ms=200)
    assert rounding.method == "nothing", "less than a float can tell"
    pressed = planner.plan(lambda a: flat(a) + 1 - 1e-5 * (a[..., 2] > 0).any(1), budget_ms=200)
    assert pressed.actions.any()


def test_nothing_keeps_to_the_known_frames(planner):
    known = touch(0, 30, 0.5, 0.5)
    result = planner.plan(flat, known=known, known_mask=torch.arange(L) < 30, budget_ms=100)
    assert result.method == "nothing" and torch.equal(result.actions, known)


def prefers_presses(actions):
    """A cost without ties: what is near to a random place at random frames; no gradient."""
    weight = torch.rand(L, 3, generator=torch.Generator().manual_seed(0))
    return -(actions.detach() * weight).mean((1, 2))


def test_noise_advances_by_itself(monkeypatch):
    """Calls are different tries; alike in two planners of one seed, other with another seed."""
    options = {"num_plans": 4, "num_inference_steps": 2, "budget_ms": math.inf}
    plans = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        scheduler = tdd.DDIMScheduler(prediction_type="x0")
        planner = Planner(Faithful(), scheduler, {"eta": 0.0}, seed=seed)
        monkeypatch.setattr(planner, "_refine", lambda *a: None)
        plans[name] = []
        for _ in range(3):
            planner.reset()
            plans[name].append(planner.plan(prefers_presses, **options).actions)
        again = [planner.plan(seed=5).actions for _ in range(2)]
        assert torch.equal(*again), "a call with a seed of its own"
    for one, two, other in zip(*plans.values(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, other)
    assert len({plan.numpy().tobytes() for plan in plans["one"]}) == 3


def test_history_is_part_of_the_plan(monkeypatch):
    """After the same calls the same plan: the last plan too is what it was."""
    options = {"num_plans": 12, "num_inference_steps": 2, "budget_ms": math.inf}
    seen = []
    for _ in range(2):
        planner = noise_planner()
        results = [planner.plan(prefers_presses, **options) for _ in range(2)]
        seen.append([(r.actions.tolist(), r.cost, r.evaluations, r.method) for r in results])
    assert seen[0] == seen[1] and seen[0][0] != seen[0][1]


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_draws_do_not_depend_on_how_many_are_drawn_at_a_time(batch):
    planner = noise_planner()
    drawn = []
    for size in (batch, 12):
        request = Request(None, None, exact_gesture(), 0.5, None, 1, 12, 2, math.inf, (3,))
        request.varied = 4
        kinds = [request.next_kinds(min(size, 12 - i)) for i in range(0, 12, size)]
        drawn.append(torch.cat([planner._draw(request, k) for k in kinds]))
    assert torch.allclose(*drawn, atol=1e-5)
    assert kinds == [["draw", "draw", "draw", "variation"] * 3]


@pytest.fixture
def run_with_bank(untrained_run, tmp_path):
    """A copy of a run, to keep a bank in."""
    return shutil.copytree(untrained_run, tmp_path / "run")


def test_a_bank_is_drawn_once_per_checkpoint(run_with_bank, capsys, monkeypatch):
    """Kept beside the checkpoint; drawn again for another one, or if the file is damaged."""
    first = Planner.load(run_with_bank, bank=20)
    (path,) = run_with_bank.glob("bank_20_*.npy")
    assert "drawing 20 gestures, once" in capsys.readouterr().out
    fresh = tdd.generate(first.model, first.scheduler, (20, L, 3), seed=0, **first.sampling)
    assert torch.equal(first.bank, tdd.to_gesture(fresh))
    assert torch.equal(Planner.load(run_with_bank, bank=20).bank, first.bank)
    assert capsys.readouterr().out == "", "kept"
    good = path.read_bytes()
    quote, archive, names = good.replace(b"'descr'", b"'descr(", 1), io.BytesIO(), io.BytesIO()
    np.savez(archive, bank=first.bank.numpy())
    np.save(names, np.array(["bank"]))
    kinds = (archive.getvalue(), archive.getvalue()[:100], names.getvalue(), quote)
    last = good[:128] + b"\xff" * (len(good) - 128)
    for damaged in (good[:-100], b"", b"hello", last, *kinds):
        path.write_bytes(damaged)
        assert torch.equal(Planner.load(run_with_bank, bank=20).bank, first.bank)
        assert path.read_bytes() == good
    content = torch.load(run_with_bank / "diffusion_checkpoint_epoch_0.pth", weights_only=True)
    content["ema_state_dict"]["output_projection.frames.bias"] += 1
    save_checkpoint(run_with_bank / "diffusion_checkpoint_epoch_0.pth", content)
    assert not torch.equal(Planner.load(run_with_bank, bank=20).bank, first.bank)
    assert path.read_bytes() == good and len(list(run_with_bank.glob("bank_*"))) == 2
    monkeypatch.setattr(bank, "write_whole", lambda *a: fail_to_write())
    assert len(Planner.load(run_with_bank, bank=10).bank) == 10
    assert capsys.readouterr().err == "warning: these gestures are not kept: no room\n"


def test_a_bank_belongs_to_the_weights_that_drew_it(run_with_bank, monkeypatch):
    """While it is drawn a training may write a newer checkpoint into the folder."""
    content = torch.load(run_with_bank / "diffusion_checkpoint_epoch_0.pth", weights_only=True)
    content["ema_state_dict"]["output_projection.frames.bias"] += 1
    content["epoch"] = 1
    load_model = planning.planner.load_model

    def load(*given):
        loaded = load_model(*given)
        save_checkpoint(run_with_bank / "diffusion_checkpoint_epoch_1.pth", content)
        return loaded

    monkeypatch.setattr(planning.planner, "load_model", load)
    first = Planner.load(run_with_bank, bank=20)
    monkeypatch.setattr(planning.planner, "load_model", load_model)
    newer = Planner.load(run_with_bank, bank=20)
    drawn = tdd.generate(newer.model, newer.scheduler, (20, L, 3), seed=0, **newer.sampling)
    assert torch.equal(newer.bank, tdd.to_gesture(drawn))
    assert not torch.equal(newer.bank, first.bank)


@pytest.mark.parametrize("kind", [torch.Tensor.double, torch.Tensor.numpy, lambda x: 0.9 * x])
def test_a_bank_of_ones_own(kind):
    """Any real array; it is rounded to the data format."""
    gestures = make_gestures(5, L)
    scheduler = tdd.DDIMScheduler(prediction_type="x0")
    planner = Planner(Faithful(), scheduler, {"eta": 0.0}, bank=kind(gestures))
    expected = tdd.to_gesture(torch.as_tensor(kind(gestures)).float())
    assert torch.equal(planner.bank, expected) and planner.plan().actions.shape == (L, 3)
    for wrong in (gestures[:, :9], gestures[0], "bank", 3):
        with pytest.raises(tdd.UserError, match="bank must be a real, dense tensor"):
            Planner(Faithful(), scheduler, {"eta": 0.0}, bank=wrong)


def test_what_the_denoiser_cannot_do_is_refused_with_a_bank_too():
    """And at once: not by the call that has a last plan to vary."""
    scheduler = tdd.DDIMScheduler(50, prediction_type="x0")
    bank = make_gestures(5, L)
    planner = Planner(Faithful(), scheduler, {"eta": 0.0}, bank=bank)
    with pytest.raises(tdd.UserError, match=r"num_inference_steps must be in .1, 50., got 51"):
        planner.plan(num_inference_steps=51)
    planner = Planner(Headed(), scheduler, {"eta": 0.0}, bank=bank)
    with pytest.raises(tdd.UserError, match="takes no known frames"):
        planner.plan(known=torch.zeros(L, 3), known_mask=torch.arange(L) < 1)


def fail_to_write():
    raise OSError("no room")


def test_draws_come_from_the_bank_where_any_gesture_will_do():
    """Not with known frames, nor for variations, nor for goals, which the denoiser draws."""
    gestures, planner = make_gestures(50, L), noise_planner()
    planner.bank = gestures
    of_bank = lambda a: (a[None] == gestures).all((1, 2)).any().item()  # noqa: E731
    assert of_bank(planner.plan().actions)
    seen = []

    def cost_fn(actions):
        seen.extend(actions.clone())
        return prefers_presses(actions)

    options = {"num_plans": 12, "num_inference_steps": 2, "budget_ms": math.inf}
    planner._refine = lambda *a: None
    planner.plan(cost_fn, **options)
    assert len(seen) == 14 and sum(map(of_bank, seen[2:])) == 9, "every fourth varies the last plan"
    planner.reset()
    known, mask = touch(0, 30, 0.5, 0.5), torch.arange(L) < 30
    result = planner.plan(known=known, known_mask=mask)
    assert torch.equal(result.actions[:30], known[:30]) and not of_bank(result.actions)
    planner = Planner(
        Headed(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0}, bank=gestures
    )
    assert planner.plan(goal=torch.ones(2)).actions[:, 0].tolist() == [1.0] * L


def test_a_bank_buys_many_draws(planner, monkeypatch):
    """With a cost that takes a batch in 5 ms, all are evaluated in half of 300 ms."""
    monkeypatch.setattr(planner, "bank", make_gestures(200, L))
    planner.plan(lambda a: (time.sleep(0.005), flat(a))[1], num_plans=128, budget_ms=300)
    assert planner.plan(seed=1).milliseconds < 20


def test_one_slow_draw_is_forgotten(monkeypatch):
    """A stall of a second: the bank costs nothing, and variations are tried again."""
    planner, stall, seen = noise_planner(), [], []
    planner.bank = make_gestures(50, L)
    original = planner._draw

    def draw(request, kinds):
        time.sleep(stall.pop() if stall and "variation" in kinds else 0)
        seen.append(kinds)
        return original(request, kinds)

    monkeypatch.setattr(planner, "_draw", draw)
    monkeypatch.setattr(planner, "_refine", lambda *a: None)
    options = {"num_plans": 20, "num_inference_steps": 2, "budget_ms": 600}
    planner.plan(prefers_presses, **options)
    stall.append(1.0)
    planner.plan(prefers_presses, **options)
    seen.clear()
    assert planner.plan(prefers_presses, **options).evaluations == 22
    assert "variation" not in seen[-1]
    for _ in range(8):
        assert planner.plan(prefers_presses, **options).evaluations == 22
    assert "variation" in seen[-1]


# ---- faults of the cost ----------------------------------------------------------------


def failing(number, error, cost_fn=begin_cost):
    """A cost that raises at its n-th call."""
    calls = []

    def fails(actions):
        calls.append(len(actions))
        if len(calls) == number:
            raise error
        return cost_fn(actions)

    return fails


ERRORS = [
    ValueError("bad\nscreen"), RuntimeError("CUDA error"), MemoryError(), tdd.UserError("mine"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), AssertionError("a"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_a_cost_that_fails_leaves_the_best_plan_so_far(planner, monkeypatch, error):
    """At the first call its own exception; while drawing the plan in hand; later CEM goes on."""
    stub(planner, monkeypatch, make_gestures(80, L))
    options = {"num_plans": 70, "budget_ms": math.inf}
    with pytest.raises(type(error)):
        planner.plan(failing(1, error), **options)
    name = type(error).__name__
    for number in (2, 3):
        planner.reset()
        stub(planner, monkeypatch, make_gestures(80, L))
        result = planner.plan(failing(number, error), **options)
        assert result.reason.startswith(f"cost_fn failed in its call {number}: {name}")
        assert result.method == "draw" and "\n" not in result.reason
        drawn = begin_cost(make_gestures(80, L)[: 1 + 32 * (number - 2)]).min()
        assert result.cost == pytest.approx(drawn.item())
    planner.reset()
    result = planner.plan(failing(6, error), **options)  # the third gradient
    assert "refined by CEM, not by the gradient of the cost: it has no gradient" in result.reason
    assert name in result.reason and result.evaluations > 300


class Unforeseen(torch.autograd.Function):
    """What it is given; going back it raises `error`."""

    error = Exception()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Unforeseen.error


@pytest.mark.parametrize("error", ERRORS)
def test_a_backward_pass_that_fails_leaves_cem(planner, monkeypatch, few_steps, error):
    """Of whatever kind: a backward pass may be the user's own. Warming up says nothing of it."""
    stub(planner, monkeypatch, make_gestures(8, L))
    monkeypatch.setattr(planning.planner, "EVALUATIONS", 20)
    monkeypatch.setattr(Unforeseen, "error", error)

    def cost_fn(actions):
        return Unforeseen.apply(begin_cost(actions))

    result = planner.plan(cost_fn, num_plans=8, budget_ms=math.inf)
    assert f"it has no gradient ({type(error).__name__}: " in result.reason
    assert "\n" not in result.reason and result.evaluations == 9 + 8 + 20
    assert result.cost <= begin_cost(make_gestures(8, L)).min()
    planner.warm_up(cost_fn)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_ends_while_drawing_leaves_the_best_plan_so_far(planner, monkeypatch, error):
    """The denoiser shares it with the world model; its other faults are its own."""
    gestures = make_gestures(80, L)

    def draw(request, kinds):
        if len(kinds) > 1:
            raise error
        return gestures[: len(kinds)]

    monkeypatch.setattr(planner, "_draw", draw)
    result = planner.plan(begin_cost, num_plans=70, budget_ms=math.inf)
    assert result.reason == f"ended where memory did: {type(error).__name__}: " + (
        str(error) or "MemoryError"
    )
    assert result.method == "draw" and torch.equal(result.actions, gestures[0])
    error = FloatingPointError("diverged")
    with pytest.raises(FloatingPointError):
        planner.plan(begin_cost, num_plans=70, budget_ms=math.inf)


def test_a_cost_that_fails_under_cem_too(planner, monkeypatch):
    stub(planner, monkeypatch, make_gestures(8, L))

    def cost_fn(actions):
        cost_fn.calls += 1
        if cost_fn.calls > 4:
            raise ValueError("gone")
        return begin_cost(actions.detach())

    cost_fn.calls = 0
    result = planner.plan(cost_fn, num_plans=8, budget_ms=math.inf)
    assert "refined by CEM" in result.reason and "failed in its call 5: ValueError: gone" in (
        result.reason
    )
    assert result.cost <= begin_cost(make_gestures(8, L)).min()


def test_an_interrupt_is_none_of_them(planner):
    with pytest.raises(KeyboardInterrupt):
        planner.plan(failing(2, KeyboardInterrupt()))


def test_costs_that_are_nan_are_counted(planner, monkeypatch):
    stub(planner, monkeypatch, make_gestures(8, L))
    monkeypatch.setattr(planner, "_refine", lambda *a: None)

    def cost_fn(actions):
        return torch.where(actions[..., 2].any(1), math.nan, begin_cost(actions))

    result = planner.plan(cost_fn, num_plans=8, budget_ms=math.inf)
    assert result.method == "nothing" and result.reason == "8 costs were not finite"


# ---- time ------------------------------------------------------------------------------


@pytest.fixture
def busy_machine():
    """Two processes that do nothing but compute."""
    code = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("ms", [2, 20, 150, 300])
def test_late_by_one_call_at_most(planner, monkeypatch, busy_machine, ms, serial):
    """On a busy machine, a call or a candidate taking as long; a gradient takes thrice that."""
    monkeypatch.setattr(planner, "bank", make_gestures(200, L))
    monkeypatch.setattr(planner, "_cost_prices", None)  # not those of another test's cost
    calls = []

    def cost_fn(actions):
        began = time.perf_counter()
        seconds = ms / 1000 * (len(actions) if serial else 1)
        time.sleep(seconds)
        calls.append(time.perf_counter() - began)
        if actions.requires_grad:  # the backward pass takes twice as long
            actions.register_hook(lambda g: time.sleep(2 * seconds))
            calls[-1] *= 3
        return begin_cost(actions)

    late = []
    while sum(beyond < 60 for beyond in late) < 2:  # of three, so that the median is
        assert len(late) < 3, f"{late} ms: a gradient, or our own steps on the busy machine"
        calls.clear()
        result = planner.plan(cost_fn, budget_ms=500)
        late.append(result.milliseconds - 500 - 1000 * max(calls))
        assert result.evaluations >= 2
        assert ms < 150 or result.reason.startswith("not refined: a gradient takes")


def test_a_cost_that_becomes_slow_is_late_by_that_call(planner, monkeypatch):
    monkeypatch.setattr(planner, "bank", make_gestures(200, L))

    def cost_fn(actions):
        cost_fn.calls += 1
        time.sleep(0.4 if cost_fn.calls == 6 else 0.002)
        return begin_cost(actions)

    cost_fn.calls = 0
    assert planner.plan(cost_fn, budget_ms=300).milliseconds < 300 + 400 + 30


class Timed:
    """A cost whose calls take `seconds` each, by the clock that it is; nothing else takes time."""

    def __init__(self, seconds, cost_fn=begin_cost):
        self.seconds, self.cost_fn, self.now, self.seen, self.begun = seconds, cost_fn, 0.0, [], []

    def clock(self):
        return self.now

    def __call__(self, actions):
        self.seen.append(actions.clone())
        self.begun.append(self.now)
        self.now += self.seconds
        return self.cost_fn(actions)

    def planner(self):
        scheduler = tdd.DDIMScheduler(prediction_type="x0")
        bank = make_gestures(200, L)
        return Planner(Faithful(), scheduler, {"eta": 0.0}, bank=bank, clock=self.clock)


@pytest.mark.parametrize("seconds", [0.3, 0.9])
def test_every_call_is_a_try_however_slow_the_cost(seconds):
    """Where one call fits, of two actions, the second is a draw, and not the last plan again."""
    cost = Timed(seconds)
    planner = cost.planner()
    methods = [planner.plan(cost, budget_ms=500).method for _ in range(4)]
    assert methods == ["draw"] * 4 and [len(x) for x in cost.seen] == [2] * 4
    assert not any(x[0].any() for x in cost.seen), "doing nothing remains a candidate"
    assert len({x[1].numpy().tobytes() for x in cost.seen}) >= 3, "but for chance"
    init = make_gestures(1, L)[0]
    planner.plan(cost, init=init, budget_ms=500)
    assert torch.equal(cost.seen[-1][1], init), "an init that was asked for does not give way"


def test_a_slow_cost_that_is_known_to_take_many_at_once_is_given_many():
    cost = Timed(0.3)
    planner = cost.planner()
    planner.warm_up(cost)
    cost.seen.clear()
    for _ in range(3):
        assert planner.plan(cost, budget_ms=500).milliseconds == pytest.approx(300)
    assert [len(x) for x in cost.seen] == [32] * 3
    assert all((x[2:, :, 2] > 0).any(dim=1).all() for x in cost.seen), "all others are draws"
    assert torch.equal(cost.seen[1][1], cost.seen[0][begin_cost(cost.seen[0]).argmin()])


def test_a_plan_to_do_nothing_is_no_start():
    """With a goal that is reached; the next one is planned for as after a reset."""
    plans = []
    for reset in (False, True):
        cost = Timed(0.01, lambda a: a[..., 2].mean(1))
        planner = cost.planner()
        assert planner.plan(cost, budget_ms=500).method == "nothing" and planner.last is None
        cost.cost_fn = begin_cost
        if reset:
            planner.reset()
        plans.append(planner.plan(cost, budget_ms=500).actions)
    assert torch.equal(*plans)


def test_a_reset_while_planning_is_not_lost(planner, monkeypatch):
    """From another thread or from the cost: what is being planned is not remembered."""
    stub(planner, monkeypatch, make_gestures(40, L))

    def cost_fn(actions):
        planner.reset()
        return begin_cost(actions)

    assert planner.plan(cost_fn, num_plans=4, refine=False).method == "draw"
    assert planner.last is None
    planner.plan(begin_cost, num_plans=4, refine=False)
    assert planner.last is not None


def test_after_a_draw_that_stalls_no_call_is_begun_too_late(monkeypatch):
    cost = Timed(0.05)
    planner = cost.planner()
    draw, began = planner._draw, []

    def stalling(request, kinds):
        began.append(cost.now)
        if len(began) == 3:
            cost.now += 1.0
        return draw(request, kinds)

    monkeypatch.setattr(planner, "_draw", stalling)
    result = planner.plan(cost, budget_ms=500, refine=False)
    assert len(began) == 3 and max(cost.begun) + cost.seconds < 0.5
    assert result.milliseconds == pytest.approx(1000 * (began[-1] + 1.0))


def test_threads_take_turns(planner, monkeypatch):
    """Two threads, one planner: no call of the cost is made while the other plans."""
    stub(planner, monkeypatch, make_gestures(40, L))
    inside, results, order = threading.Lock(), [], []

    def plan(name):
        def cost_fn(actions):
            order.append(name)
            assert inside.acquire(blocking=False), "another one is planning"
            time.sleep(0.002)
            inside.release()
            return begin_cost(actions)

        results.append(planner.plan(cost_fn, budget_ms=150))

    threads = [threading.Thread(target=plan, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and all(r.milliseconds < 300 for r in results)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == 1, "one after the other"


def test_the_examples_of_the_documents_run(untrained_run, capsys):
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/PLANNING.md")]
    examples = [block for x in texts for block in re.findall(r"```python\n(.*?)```", x, re.DOTALL)]
    examples = [block for block in examples if "goals.load_policy" not in block]
    assert len(examples) == 2
    exec("".join(examples).replace("runs/RUN", str(untrained_run)), {})
    assert re.match(r"(True|False) [\d.]+ \d+ [\d.]+\n", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------
# GOALS
# ----------------------------------------------------------------------------------------


def tiny_model(context_dim=6, **options):
    torch.manual_seed(0)
    options = {"seq_len": 20, "d_model": 16, "nhead": 2, "num_layers": 1, "dropout": 0, **options}
    return tdd.MinimalDiffusionTransformer(context_dim=context_dim, **options).eval()


def test_a_model_without_goals_says_so():
    with pytest.raises(tdd.UserError, match="takes no context"):
        tiny_model(0)(torch.randn(1, 20, 3), torch.tensor([1]), context=torch.ones(1, 6))


class Headed(torch.nn.Module):
    """A denoiser that presses for ever, at its goal or, without one, in the corner."""

    def forward(self, x_t, t, context=None):
        corner = torch.full((len(x_t), 2), -1.0)
        place = corner if context is None else context
        return torch.cat([place, torch.ones(len(x_t), 1)], dim=1)[:, None].expand_as(x_t)


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_the_planner_heads_for_its_goal(guidance):
    """In model units the draw is (1 - w)·(-1) + w·goal, by the formula of guidance."""
    planner = Planner(Headed(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})
    result = planner.plan(goal=torch.tensor([0.5, -0.25]), guidance=guidance)
    expected = tdd.to_data_units((guidance - 1) + guidance * torch.tensor([0.5, -0.25]))
    assert torch.allclose(result.actions[:, :2], expected.expand(L, 2), atol=1e-5)


def test_goals_that_cannot_be_are_refused():
    planner = Planner(Headed(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0})
    huge = torch.tensor([1e300, 0], dtype=torch.float64)
    for goal in (torch.ones(1, 2), [0.5, 0.5], torch.tensor([math.nan, 0]), huge, torch.zeros(2)):
        with pytest.raises(tdd.UserError, match="goal must"):
            planner.plan(goal=goal)
    for guidance in (math.nan, math.inf, 1e9, 10**400, "2"):
        with pytest.raises(tdd.UserError, match="guidance must be"):
            planner.plan(goal=torch.ones(2), guidance=guidance)
    with pytest.raises(tdd.UserError, match="guidance needs a goal"):
        planner.plan(guidance=2.0)


@pytest.mark.parametrize("adaln", [True, False])
def test_a_goal_changes_nothing_until_it_is_learnt(adaln):
    model = tiny_model(adaln=adaln)
    torch.nn.init.normal_(model.output_projection.weight)
    x, t, goal = torch.randn(3, 20, 3), torch.tensor([1, 2, 3]), torch.randn(3, 6)
    assert torch.equal(model(x, t, context=goal), model(x, t))
    torch.nn.init.normal_(model.context_mlp[-1].weight)
    if adaln:
        torch.nn.init.normal_(model.blocks[0].modulation.weight)
    headed = model(x, t, context=goal)
    assert not torch.allclose(headed, model(x, t))
    goal[1] = 0
    mixed = model(x, t, context=goal)
    assert torch.allclose(mixed[1], model(x, t)[1], atol=1e-6), "a row of zeros is no goal"
    assert torch.allclose(mixed[0], headed[0], atol=1e-6)
    with pytest.raises(tdd.UserError, match="context must be"):
        model(x, t, context=goal[:, :5])


def test_classifier_free_guidance_by_its_formula():
    """One step from x_T: x_0 = (1 - w)·x_0(no goal) + w·x_0(goal)."""
    scheduler = tdd.DDIMScheduler(50, prediction_type="x0", clip_sample=False)
    goal = torch.full((2, 6), 0.25)

    def model(x, t, context=None):
        return torch.zeros_like(x) + (0.0 if context is None else context[:, :1, None])

    for w in (1.0, 0.0, 2.5):
        x_0 = scheduler.sample(with_goal(model, goal, w), (2, 20, 3), "cpu", 1)
        assert torch.allclose(x_0, torch.full_like(x_0, (1 + 0.25 * w) / 2))


def test_training_with_goals_uses_them(no_figures, tmp_path, tiny_config):
    """Two goals, two gestures: after a short run the goal says which, and dropping it works."""
    gestures = make_gestures(2, 20).repeat(160, 1, 1)
    context = torch.eye(2)[torch.arange(320) % 2]
    config = tiny_config(
        context_dim=2, augment=False, num_epochs=20, batch_size=16, dropout=0.0,
        save_dir=str(tmp_path), wandb_mode="disabled", prediction_type="x0", known_share=0.0,
        save_every=20, log_interval=20, allow_overlap=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
    ema = tdd.train_loop(model, scheduler, gestures, gestures[:2], config, context=context)
    drawn = scheduler.sample(with_goal(ema, torch.eye(2)), (2, 20, 3), "cpu", 3)
    error = (drawn[:, None] - gestures[None, :2]).square().mean((2, 3))
    assert error.argmin(dim=1).tolist() == [0, 1]
    again, _, loaded = tdd.load_model(tmp_path)
    assert loaded.context_dim == 2 and again.options["context_dim"] == 2


def test_training_with_goals_needs_their_files(tmp_path, tiny_flags, refused):
    flags = tiny_flags(context_dim=3, save_dir=tmp_path / "run")
    assert "--no-augment" in refused(*flags, "--augment")
    assert "_context.npy" in refused(*flags)


def test_hindsight_pairs_reach_their_goals():
    """Every gesture of a pair did change something, and equal states give a zero change."""
    context, gestures = goals.hindsight_pairs(40, seed=3)
    half = goals.CONTEXT_DIM // 2
    assert context.shape == (40, goals.CONTEXT_DIM) and gestures.shape == (40, L, 3)
    assert (context[:, half:].abs().amax(dim=1) > 0.1).all()
    instances = tasks.make_instances("drag", 3, 0)
    tokens = world.observe(instances.scenes, instances.scenes.state)
    assert (goals.goal_context(tokens, tokens)[:, half:] == 0).all()


def test_regression_to_the_ends_recovers_a_map():
    torch.manual_seed(0)
    context = torch.randn(400, goals.CONTEXT_DIM)
    target = torch.sigmoid(context[:, :4])
    net = goals.train_regression(context, target, steps=150)
    assert (net(context) - target).square().mean() < 0.5 * target.var()
    z = goals.at_fixed_time(target)
    assert z.shape == (400, 6) and torch.equal(z[:, [0, 1, 3, 4]], target)


def test_where_known_frames_are_idle_the_bank_is_asked(monkeypatch):
    """Its gestures that are idle there; with a known contact the denoiser draws."""
    planner, seen = noise_planner(), []
    early, late = touch(0, 20, 0.2, 0.2), touch(100, 150, 0.8, 0.8)
    planner.bank = torch.stack([early, late])

    def cost_fn(actions):
        seen.append(actions)
        return 1 + actions.sum((1, 2))

    options = {"known_mask": torch.arange(L) < 30, "num_plans": 9, "budget_ms": math.inf}
    planner.plan(cost_fn, known=0 * late, **options)
    assert all(torch.equal(action, late) for action in torch.cat(seen[:2])[1:10])
    seen.clear()
    planner.reset()
    planner.plan(cost_fn, known=early, **options)
    drawn = torch.cat(seen[:2])[1:10]
    assert torch.equal(drawn[:, :30], early[:30].expand(9, 30, 3))
    assert not any(torch.equal(action[30:], x[30:]) for action in drawn for x in (early, late))


def test_a_bank_that_never_agrees_is_left(planner):
    planner.bank = touch(0, 20, 0.2, 0.2)[None]
    try:
        result = planner.plan(known=torch.zeros(L, 3), known_mask=torch.arange(L) < 30)
        assert not result.actions[:30].any()
    finally:
        planner.bank = None


def test_without_refinement_all_time_is_for_draws(planner, monkeypatch):
    """Of 40 draws, all are evaluated once, none is moved: no gradient, no CEM, no reason."""
    gestures = make_gestures(40, L)
    stub(planner, monkeypatch, gestures)
    result = planner.plan(begin_cost, num_plans=40, refine=False, budget_ms=math.inf)
    assert result.evaluations == 41 and result.method == "draw" and result.reason == ""
    assert torch.equal(result.actions, gestures[begin_cost(gestures).argmin()])
    with pytest.raises(tdd.UserError, match="refine must be True or False"):
        planner.plan(begin_cost, refine=1)
