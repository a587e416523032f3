"""World models as costs, and the planner with the real client: twice a second, for a minute.

Why: what VJ2-GUI brings is a predictor of tokens with a GRU over the frames and FiLM, in bf16,
compiled, called under inference mode. The planner must take it as it is, be in time every time,
and not grow.

    python -m pytest tests/test_planning_predictor.py
    python -m pytest tests/test_planning_predictor.py -m slow     # the minute
"""

import math
import os
import threading
import time

import pytest
import torch
from conftest import make_gestures

import planning.planner
import train_diffusion_ddim as tdd
from planning.planner import Planner, token_cost

L = 250


@pytest.fixture
def planner():
    """A planner with a bank of straight gestures; its denoiser only varies the last plan."""
    return Planner(
        Blur(), tdd.DDIMScheduler(prediction_type="x0"), {"eta": 0.0}, bank=make_gestures(500, L)
    )


@pytest.fixture
def few_steps(monkeypatch):
    """Let refinement end early where there is no deadline."""
    monkeypatch.setattr(planning.planner, "MOST_STEPS", 6)


class Blur(torch.nn.Module):
    """A denoiser that takes the noisy gesture, smoothed, for the clean one."""

    def forward(self, x_t, t):
        return torch.nn.functional.avg_pool1d(x_t.mT, 9, stride=1, padding=4).mT


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x + 0


class Predictor(torch.nn.Module):
    """What the client has: a GRU over the frames, FiLM into the tokens; [B, T, N, D] as given."""

    def __init__(self, features=4, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.gru = torch.nn.GRU(channels, 8, batch_first=True)
        self.film = torch.nn.Linear(8, 2 * features)
        self.channels, self.seen = channels, []

    def forward(self, z, actions):
        B, T = z.shape[:2]
        assert actions.shape == (B, T, L, self.channels) and actions.dtype == z.dtype
        self.seen.append((B, z.dtype, torch.backends.cudnn.enabled))
        _, h = self.gru(actions.flatten(0, 1))
        scale, shift = self.film(h[-1]).view(B, T, 1, -1).chunk(2, -1)
        return z * (1 + scale) + shift


def screens(features=4, num=16):
    """Tokens now and as wanted, (N, D)."""
    return torch.randn(2, num, features, generator=torch.Generator().manual_seed(1))


def test_the_energy_by_hand():
    """L1 between normalised tokens of the user's own predictor, action by action."""
    predictor, (tokens, goal) = Predictor(), screens()
    actions = make_gestures(5, L)
    costs = token_cost(predictor, tokens, goal)(actions)

    def norm(x):
        spread = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread

    for cost, action in zip(costs, actions, strict=True):
        then = predictor(tokens[None, None], action[None, None])[0, 0]
        assert cost.item() == pytest.approx((norm(then) - norm(goal)).abs().mean().item(), rel=1e-4)


def test_batches_keep_to_the_limit():
    predictor, (tokens, goal) = Predictor(), screens()
    actions = make_gestures(20, L)
    whole = token_cost(predictor, tokens, goal)(actions)
    predictor.seen.clear()
    parts = token_cost(predictor, tokens, goal, batch_size=8)(actions)
    assert [seen[0] for seen in predictor.seen] == [8, 8, 4] and torch.allclose(whole, parts)


@pytest.mark.parametrize(
    ("dtype", "kind"),  # what is given is made a tensor first, of the predictor's dtype then
    [
        (torch.float64, lambda x: x),
        (torch.bfloat16, lambda x: x),
        (torch.bfloat16, lambda x: x.numpy()),
        (torch.bfloat16, made_in_inference_mode),
    ],
)
def test_tokens_and_actions_take_the_predictors_dtype(planner, dtype, kind, few_steps):
    """The costs are float32 and near to those of float32."""
    predictor, (tokens, goal) = Predictor(), screens()
    actions = make_gestures(5, L)
    expected = token_cost(predictor, tokens, goal)(actions)
    cost_fn = token_cost(predictor.to(dtype), kind(tokens), kind(goal))
    costs = cost_fn(actions)
    assert costs.dtype == torch.float32 and predictor.seen[-1][1] == dtype
    assert torch.allclose(costs, expected, atol=2e-2)
    planned = planner.plan(cost_fn, num_plans=4, budget_ms=math.inf)
    assert planned.reason == "" and planned.evaluations > 80, "refined by the gradient"


def test_a_predictor_of_x_and_y_alone(planner, few_steps):
    tokens, goal = screens()
    cost_fn = token_cost(Predictor(channels=2), tokens, goal, channels=2)
    planned = planner.plan(cost_fn, num_plans=4, budget_ms=math.inf)
    assert planned.reason == "" and planned.evaluations > 80, "refined by the gradient"


def test_recurrent_layers_have_a_gradient_in_eval_mode():
    """cuDNN's have none: it is off in a call whose gradient is wanted, and only there."""
    predictor, (tokens, goal) = Predictor().eval(), screens()
    cost_fn = token_cost(predictor, tokens, goal)
    before = torch.backends.cudnn.enabled
    cost_fn(make_gestures(2, L))
    cost_fn(make_gestures(2, L).requires_grad_())
    assert [seen[2] for seen in predictor.seen] == [before, False]
    assert torch.backends.cudnn.enabled == before


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_compiled_predictor_in_inference_mode_and_bf16(planner, dynamic, few_steps):
    """As on CUDA, here with the compiler's front end alone; the gradient is taken all the same."""
    predictor, (tokens, goal) = Predictor().bfloat16().eval().requires_grad_(False), screens()
    compiled = torch.compile(predictor, backend="aot_eager", dynamic=dynamic)
    with torch.inference_mode():
        cost_fn = token_cost(compiled, tokens.bfloat16(), goal.bfloat16())
        result = planner.plan(cost_fn, num_plans=4, budget_ms=math.inf)
    assert result.reason == "" and result.evaluations > 80, "refined by the gradient"
    plain = token_cost(predictor, tokens, goal)(result.actions[None])
    assert result.cost == pytest.approx(plain.item(), abs=1e-2)
    assert {seen[1] for seen in predictor.seen} == {torch.bfloat16}


def test_world_models_that_do_not_fit_are_named():
    tokens, goal = screens()
    for now, wanted in ((tokens, goal[:1]), (tokens[None], goal[None]), (tokens, goal[:, :2])):
        with pytest.raises(tdd.UserError, match=r"goal_tokens must be like tokens, .N, D."):
            token_cost(Predictor(), now, wanted)
    with pytest.raises(tdd.UserError, match=r"predictor must return .2, 1, 16, 4., got torch.fl"):
        token_cost(lambda z, a: z[:, 0], tokens, goal)(torch.rand(2, L, 3))
    with pytest.raises(tdd.UserError, match="batch_size must be at least 1, got 0"):
        token_cost(Predictor(), tokens, goal, batch_size=0)
    with pytest.raises(tdd.UserError, match="goal_tokens must be a dense array"):
        token_cost(Predictor(), tokens, "goal")
    with pytest.raises(tdd.UserError, match=r"predictor must return .* got torch.complex64"):
        token_cost(lambda z, a: z + 0j, tokens, goal)(torch.rand(2, L, 3))
    with pytest.raises(tdd.UserError, match="channels must be at most 3, got 4"):
        token_cost(Predictor(), tokens, goal, channels=4)
    with pytest.raises(tdd.UserError, match="predictor must be a function, got str"):
        token_cost("predictor", tokens, goal)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_what_a_predictor_is_given_is_its_own(planner, few_steps, batch_size, channels):
    """It may view it in any shape and change it in place: the next call is given the same."""
    tokens, goal = screens()
    actions = make_gestures(5, L)

    def predictor(z, actions):
        rows = z.view(-1, z.shape[-1])
        rows += actions.view(len(z), -1).mean(1).repeat_interleave(len(rows) // len(z))[:, None]
        rows[:, 0] *= 2
        actions.mul_(0)
        return rows.view(z.shape)

    cost_fn = token_cost(predictor, tokens, goal, batch_size=batch_size, channels=channels)
    first = cost_fn(actions)
    assert torch.equal(cost_fn(actions), first) and torch.equal(actions, make_gestures(5, L))
    planned = planner.plan(cost_fn, num_plans=4, budget_ms=math.inf)
    assert planned.reason == "" and planned.evaluations > 80, "refined by the gradient"


def test_two_threads_switch_cudnn_back(monkeypatch):
    """The switch is the process's: off while either is inside, afterwards as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    tokens, goal = screens()
    inside, seen = threading.Barrier(2), []

    class Waiting(Predictor):
        def forward(self, z, actions):
            inside.wait(10)  # until the other one is inside, too
            if actions[0, 0, 0, 0] > 0:  # the second of them leaves later
                time.sleep(0.1)
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(z, actions)

    cost_fn = token_cost(Waiting().eval(), tokens, goal)
    given = [torch.full((1, L, 3), i).requires_grad_() for i in (0.0, 1.0)]
    threads = [threading.Thread(target=cost_fn, args=(actions,)) for actions in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False, False] and torch.backends.cudnn.enabled


def test_plans_learn_what_a_model_takes_at_once(planner):
    """A call takes 60 ms, however many actions it holds: the second plan asks for 32 at a time."""
    sizes = []

    def cost_fn(actions):
        sizes.append(len(actions))
        time.sleep(0.06)
        return actions.detach()[..., 0].mean(1) + (actions.detach()[..., 2].sum(1) < 1)

    planner.plan(cost_fn, budget_ms=500)
    assert sizes[1] < 32
    sizes.clear()
    planner.plan(cost_fn, budget_ms=500)
    assert sizes[:2] == [2, 32]


def test_warming_up_meets_every_size_and_gradient(planner):
    """So that what a compiled predictor prepares for is prepared; faults of the cost come out."""
    sizes = {2**i for i in range(6)}
    predictor, (tokens, goal), graded = Predictor(), screens(), set()
    cost_fn = token_cost(predictor, tokens, goal)
    planner.warm_up(lambda a: (graded.add(len(a)) if a.requires_grad else 0, cost_fn(a))[1])
    assert {seen[0] for seen in predictor.seen} == sizes and graded == sizes - {32}
    planner.warm_up(lambda a: cost_fn(a).detach())
    with pytest.raises(ZeroDivisionError):
        planner.warm_up(lambda a: 1 / 0)
    for wrong in (None, 3):
        with pytest.raises(tdd.UserError, match="cost_fn must be a function"):
            planner.warm_up(wrong)
    assert planner.last is None and planner.calls == 0


# ---- the client ------------------------------------------------------------------------


class SlowPredictor(torch.nn.Module):
    """The client's kind at a small width: a GRU over the frames, FiLM into a block of tokens.

    A call takes `seconds` more than its own time.
    """

    def __init__(self, seconds, features=64):
        super().__init__()
        torch.manual_seed(0)
        self.gru = torch.nn.GRU(3, 32, batch_first=True)
        self.film = torch.nn.Linear(32, 2 * features)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(features, features),
            torch.nn.GELU(),
            torch.nn.Linear(features, features),
        )
        self.seconds, self.longest = seconds, 0.0

    def forward(self, z, actions):
        began = time.perf_counter()
        time.sleep(self.seconds)
        _, h = self.gru(actions.flatten(0, 1))
        scale, shift = self.film(h[-1])[:, None, None].chunk(2, -1)
        then = z + self.mlp(z * (1 + scale) + shift)
        self.longest = max(self.longest, time.perf_counter() - began)
        return then


def resident_mb():
    """What this process holds in memory, MB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux to see memory")
@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_the_client_twice_a_second(planner, seconds):
    """Under inference mode, in bf16, a screen that changes and a goal that sometimes does."""
    predictor = SlowPredictor(0.005).bfloat16().eval()
    screen, late, evaluations = torch.randn(256, 64), [], []
    with torch.inference_mode():
        cost_fn = token_cost(predictor, screen, screen + 1)
        planner.warm_up(cost_fn)
        for _ in range(2):
            planner.plan(cost_fn, budget_ms=350)
        before, began = resident_mb(), time.perf_counter()
        for tick in range(2 * seconds):
            if tick % 6 == 0:
                goal = torch.randn(256, 64)
                planner.reset()
            cost_fn = token_cost(predictor, screen.bfloat16(), goal.bfloat16())
            result = planner.plan(cost_fn, budget_ms=350)
            assert result.reason == "" or result.reason.startswith("not refined")
            evaluations.append(result.evaluations)
            late.append(result.milliseconds - 350 - 1000 * 3 * predictor.longest)
            screen = predictor(screen.bfloat16()[None, None], result.actions.bfloat16()[None, None])
            screen = screen[0, 0].float() + 0.1 * torch.randn(256, 64)
            time.sleep(max(0, began + (tick + 1) / 2 - time.perf_counter()))
    assert sorted(evaluations)[seconds] > 32, "of half of the plans"
    assert max(late) < 0, "never later than by a call and its gradient"
    assert time.perf_counter() - began < seconds + 0.5, "every plan was in time for the next"
    assert resident_mb() - before < 5
