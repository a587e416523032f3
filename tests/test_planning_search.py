"""The evaluation budget, the data format, gestures as knots, and the methods, by hand.

Why: methods are compared at equal budget, so what an evaluation is must be counted right; and a
world model knows gestures in the data format alone, so a cost of anything else says nothing.

    python -m pytest tests/test_planning_search.py
"""

import math

import numpy as np
import pytest
import torch

import train_diffusion_ddim as tdd
from planning import benchmark, goals, search, tasks
from planning.diffusion import DiffusionPrior, penalised_descent
from planning.methods import cost_methods, goal_methods, prior_methods
from planning.optimizers import shoot_then_refine

L = 250


def quadratic(actions):
    """Cost (I, K): squared distance of the first frame's x from 0.7."""
    return (actions[:, :, 0, 0] - 0.7) ** 2


def off_grey(actions):
    """Cost (I, K): squared distance of all numbers from 0.3; it has a gradient everywhere."""
    return ((actions - 0.3) ** 2).mean((2, 3))


def test_the_budget_by_hand():
    objective = search.Objective(quadratic, 1, 20, milestones=(2, 5, 20))
    candidates = torch.zeros(1, 4, L, 3)
    candidates[0, :, 0, 0], candidates[0, :, 0, 2] = torch.tensor([0.1, 0.5, 0.69, 0.2]), 1
    objective(candidates)
    assert objective.used == 4 and objective.left == 16
    assert objective.kept[2][0][0, 0, 0].item() == pytest.approx(0.5)  # best of the first two
    costs, gradient = objective.gradient(candidates[:, :2])
    assert costs.tolist() == [pytest.approx([0.36, 0.04])]
    assert gradient[0, :, 0, 0].tolist() == pytest.approx([-1.2, -0.4], abs=1e-6)
    assert objective.used == 4 + 2 * 3, "a gradient counts three"
    assert objective.kept[5][0][0, 0, 0].item() == pytest.approx(0.69)
    objective.finish()
    assert objective.kept[20][1].item() == pytest.approx(1e-4, rel=1e-3)
    with pytest.raises(AssertionError):
        objective(candidates.repeat(1, 3, 1, 1))


def told(method):
    """What a method is told beside the cost, of two screens."""
    goal = benchmark.goal_of(method, tasks.make_instances("drag", 2, 0))
    return goal | ({"second_cost": off_grey} if method.second else {})


@pytest.mark.parametrize(
    "name", ["shoot_true", "true_adam", "sobol_axes", "cem_ramp", "sobol_halving"]
)
def test_a_machine_that_takes_many_at_once(name):
    """At a width of 32 a budget of 20 is one of depth: more candidates, no more calls."""
    calls = []

    def cost_fn(actions):
        calls.append((actions.shape[1], actions.requires_grad))
        return off_grey(actions)

    method = cost_methods()[name]
    objective = search.Objective(cost_fn, 2, 20, milestones=(10, 20), width=32)
    method.run(objective, np.random.default_rng(0), **method.trials[0])
    depth = sum(math.ceil(K / 32) * (3 if graded else 1) for K, graded in calls)
    assert 16 <= objective.used == depth <= 20
    assert sum(K for K, _ in calls) > 60, "more than one after the other"
    assert objective.kept[10][1].isfinite().all()


def test_nan_costs_never_win():
    objective = search.Objective(lambda a: torch.tensor([[math.nan, 2.0]]), 1, 2)
    objective(torch.zeros(1, 2, L, 3))
    assert objective.best_cost.item() == 2.0


def test_time_ends_the_budget():
    assert search.Objective(quadratic, 1, 20, seconds=-1.0).room() == 0


def test_the_first_of_equals_is_kept():
    objective = search.Objective(lambda a: torch.zeros(1, a.shape[1]), 1, 9)
    candidates = torch.rand(1, 4, L, 3).round()
    objective(candidates)
    objective(candidates.flip(1))
    assert torch.equal(objective.best, tdd.to_gesture(candidates[:, 0]))


def test_calls_are_priced_by_what_was_measured():
    """By a line between sizes, alike below, in proportion beyond; a slow one counts at once."""
    prices = search.Prices()
    assert prices.upto(3).tolist() == [0, 0, 0]
    prices.add(2, 1.0)
    assert prices.upto(4).tolist() == [1, 1, 1.5, 2]
    prices.add(4, 3.0)
    assert prices.upto(8).tolist() == [1, 1, 2, 3, 3.75, 4.5, 5.25, 6]
    prices.add(4, 1.0)
    assert prices.upto(4)[-1] == 2.0
    prices.add(4, 5.0)
    assert prices.upto(4)[-1] == 5.0


def test_prices_are_carried_to_the_next_search():
    """Times how much slower it is; a size that was not measured again gets cheaper, then is new.

    By hand: four should cost twice as much as two, 6; a fifth of the way from 18 there is 15.6.
    """
    prices = search.Prices()
    prices.add(2, 1.0)
    prices.add(4, 9.0)
    second = prices.carried(2.0)
    assert second.upto(4)[[1, 3]].tolist() == [2, 18]
    second.add(2, 3.0)
    third = second.carried(1.0)
    assert third.upto(4)[[1, 3]].tolist() == [3, pytest.approx(15.6)]
    third.add(4, 2.0)
    assert third.upto(4)[3] == 2, "it counts alone"


def test_a_price_fades_to_what_the_call_takes_and_no_further(monkeypatch):
    """A clock by hand: 0.2 s a call. A gradient takes 0.6 s, and once took 2; the budget is 0.5.

    Forty searches forget the 2 s, but not the 0.6: no gradient is begun that does not fit.
    """
    now, stall = [0.0], [1.4]
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])

    def cost_fn(actions):
        now[0] += 0.2
        if actions.requires_grad:
            now[0] += 0.4 + (stall.pop() if stall else 0.0)
        return quadratic(actions)

    each, z = search.FORWARD + search.BACKWARD, torch.rand(1, 2, L, 3)
    objective = search.Objective(cost_fn, 1, 99, seconds=9)
    objective(z)
    objective.gradient(z)
    assert objective.prices(2, each)[-1] == pytest.approx(2.0)
    for _ in range(40):
        objective = search.Objective(cost_fn, 1, 99, seconds=0.7, prices=objective.call_prices)
        objective(z)
        assert objective.room(each) == 0, "0.5 s left"
    assert objective.prices(2, each)[-1] == pytest.approx(0.6, rel=0.01)


def test_the_first_call_shows_how_slow_all_are(monkeypatch):
    """By hand: in the first search 32 cost as much as 2; the second machine is thrice as slow."""
    now, pace = [0.0], [1.0]
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])

    def cost_fn(actions):
        now[0] += pace[0]
        return quadratic(actions)

    first = search.Objective(cost_fn, 1, 1000, seconds=60)
    for num in (2, 32):
        first(torch.zeros(1, num, L, 3))
    pace[0] = 3.0
    second = search.Objective(cost_fn, 1, 1000, seconds=10, prices=first.call_prices)
    second(torch.zeros(1, 2, L, 3))
    assert second.prices(32)[-1] == 3 and second.room() == 32, "7 s left"
    second(torch.zeros(1, 2, L, 3))
    second(torch.zeros(1, 2, L, 3))
    assert second.room() == 0, "1 s left"


def test_no_call_is_begun_that_would_end_late(monkeypatch):
    """A clock by hand: a call takes 2 s, and a second for every candidate."""
    now = [0.0]
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])

    def cost_fn(actions):
        now[0] += 2 + actions.shape[1]
        return quadratic(actions)

    objective = search.Objective(cost_fn, 1, 1000, seconds=60)
    assert objective.room() == search.LARGEST, "nothing is known of it"
    objective(torch.zeros(1, 2, L, 3))
    assert objective.room() == 16, "56 s left, 2 s each as measured for two: 28 in time"
    assert objective.room(3) == 8, "a gradient counts three: 9 in time"
    objective(torch.zeros(1, 28, L, 3))
    assert now[0] == 34 and objective.room() == 16, "26 s left: 24 in time"
    assert objective.room(3) == 4, "8 s for six, thrice"


@pytest.mark.parametrize("name", cost_methods())
@pytest.mark.parametrize("budget", [250, 1000])
def test_methods_keep_to_their_budget(name, budget):
    method = cost_methods()[name]
    objective = search.Objective(off_grey, 2, budget, milestones=(10, 250))
    method.run(objective, np.random.default_rng(0), **method.trials[0], **told(method))
    objective.finish()
    least = 31 if name == "adam_zeros" else 0.9 * budget
    assert least <= objective.used <= budget
    assert objective.best.shape == (2, L, 3) and set(objective.kept) == {10, 250}


@pytest.mark.parametrize("name", ["adam_raw", "adam_ramp", "cem_ramp", "true_adam", "true_cem"])
def test_methods_find_an_easy_minimum(name):
    """The cost depends on where the contact begins, everywhere with a gradient."""

    def cost_fn(actions):
        press = actions[..., 2]
        begin = (press[..., None] * actions[..., :2]).sum(-2) / (press.sum(-1)[..., None] + 1e-3)
        return ((begin - torch.tensor([0.3, 0.6])) ** 2).sum(-1)

    objective = search.Objective(cost_fn, 3, 250)
    cost_methods()[name].run(objective, np.random.default_rng(1))
    assert objective.best_cost.max() < 5e-3


# ---- the data format -------------------------------------------------------------------


class Drawer(torch.nn.Module):
    """A denoiser whose gestures are its noise, smoothed: contacts, gaps and all."""

    def forward(self, x_t, t, *_, context=None):
        shift = 0 if context is None else 0.1 * context[:, None, :1]
        smooth = torch.nn.functional.avg_pool1d(x_t.mT, 31, stride=1, padding=15).mT
        return (5 * smooth + shift).clamp(-1, 1)


def all_methods():
    """Every method of the benchmark, with a denoiser and regressions that nobody trained."""
    torch.manual_seed(0)
    scheduler, sampling = tdd.DDIMScheduler(prediction_type="x0"), {"num_inference_steps": 2}
    pairs = torch.randn(20, goals.CONTEXT_DIM), tasks.draw_true(1, 20, np.random.default_rng(2))[0]
    nets = goals.make_regression(3 * L), goals.make_regression(goals.ENDS)
    prior = DiffusionPrior(Drawer(), scheduler, sampling)
    policy = goals.GoalPolicy(Drawer(), scheduler, sampling, *nets, *pairs)
    return cost_methods() | prior_methods(prior) | goal_methods(policy)


@pytest.mark.parametrize("name", all_methods())
def test_costs_see_gestures_in_the_data_format(name):
    """Every method, every call, gradients and guidance too: exactly what a file could hold."""
    method, seen = all_methods()[name], []

    def cost_fn(actions):
        assert torch.equal(actions, tdd.to_gesture(actions))
        seen.append((actions[..., 2] > 0).any().item())
        return off_grey(actions)

    objective = search.Objective(cost_fn, 2, 250)
    method.run(objective, np.random.default_rng(0), **method.trials[0], **told(method))
    assert any(seen) or name in ("adam_zeros", "regress_gesture"), "not only idle ones"
    assert torch.equal(objective.best, tdd.to_gesture(objective.best))


@pytest.mark.parametrize("name", all_methods())
def test_every_method_keeps_a_budget_of_calls_that_take_many(name):
    """A call of one candidate costs as much as of 32; guidance takes as many as there may be."""
    method = all_methods()[name]
    objective = search.Objective(off_grey, 2, 100, width=32)
    method.run(objective, np.random.default_rng(0), **method.trials[0], **told(method))
    assert objective.used <= 100
    assert objective.used > 60 or "guided" not in name


@pytest.mark.parametrize(("weight", "moves"), [(0.0, True), (1e6, False)])
def test_what_the_denoiser_finds_odd_is_not_taken(monkeypatch, weight, moves):
    """To this one every gesture should begin at (0.5, 0.5): with much weight no step is better."""
    prior = DiffusionPrior(None, tdd.DDIMScheduler(), {})
    monkeypatch.setattr(prior, "mutate", lambda x, *_: torch.full_like(x, 0.5) * x[..., 2:])
    seen = []

    def cost_fn(actions):
        seen.append(actions.requires_grad)
        return off_grey(actions)

    found = {}
    for method in (penalised_descent, shoot_then_refine):
        objective = search.Objective(cost_fn, 2, 250)
        given = {"prior": prior, "weight": weight} if method is penalised_descent else {}
        draw, options = tasks.draw_true, {"share": 0.4, "lr": 0.02}
        method(objective, np.random.default_rng(0), draw=draw, **options, **given)
        found[method], used = objective.best, objective.used
    assert objective.cost_fn is cost_fn and any(seen) and used <= 250
    refined, plain = found[shoot_then_refine], found[penalised_descent]
    assert torch.equal(refined, plain) == moves
    if not moves:
        rows = np.random.default_rng(0)
        drawn = torch.cat([tasks.draw_true(2, K, rows) for K in (50, 50)], dim=1)
        best = drawn[torch.arange(2), off_grey(drawn).argmin(dim=1)]
        assert torch.equal(plain, tdd.to_gesture(best)), "the best draw"


def test_rounding_lets_gradients_pass():
    """By hand: x and y where it is pressed and inside the screen, the press everywhere."""
    x = torch.tensor([[0.2, 1.5, 0.9], [0.2, 0.4, 0.3]], requires_grad=True)
    gesture = search.as_gesture(x)
    assert gesture.tolist() == [[pytest.approx(0.2), 1, 1], [0, 0, 0]]
    gesture.sum().backward()
    assert x.grad.tolist() == [[1, 0, 1], [0, 0, 1]]


# ---- gestures as knots -----------------------------------------------------------------


def test_the_ramp_and_its_reading():
    z = torch.tensor([[0.2, 0.3, 0.25, 0.8, 0.5, 0.75]])
    action = search.ramp(z)
    frames = torch.arange(L)[action[0, :, 2] > 0.5]
    assert frames[0] == round(0.25 * 249) and frames[-1] == round(0.75 * 249)
    assert action[0, 125, :2].tolist() == pytest.approx([0.501, 0.4], abs=2e-3)
    assert (action[0, :60] == 0).all(), "zero while idle"
    assert torch.allclose(search.to_ramp(action), z, atol=6e-3)
    swapped = z[:, [0, 1, 5, 3, 4, 2]]
    assert torch.equal(search.ramp(swapped), action), "times in the wrong order mean the same"
    true = tasks.draw_true(1, 50, np.random.default_rng(0))[0]
    assert torch.allclose(search.ramp(search.to_ramp(true)), true, atol=1e-5)


def test_a_ramp_of_more_knots_turns():
    """Right, then down, then a rest; by hand at the middle of each piece."""
    knots = [[0.2, 0.1, 0.2], [0.8, 0.1, 0.4], [0.8, 0.5, 0.6], [0.8, 0.5, 0.9]]
    action = search.ramp(torch.tensor(knots).flatten()[None])[0]
    for frame, place in ((75, [0.5, 0.1]), (125, [0.8, 0.3]), (187, [0.8, 0.5])):
        assert action[frame].tolist() == pytest.approx([*place, 1], abs=7e-3)
    assert action[:49].sum() == 0 and action[226:].sum() == 0


def many_gestures():
    """Gestures (9, L, 3): straight ones, an arc, a double tap, one throughout, one of one frame."""
    gestures = tasks.draw_true(1, 9, np.random.default_rng(3))[0]
    gestures[:4] = 0
    gestures[0, 50:200, 2] = gestures[1, 100:110, 2] = gestures[1, 130:140, 2] = 1
    angle = torch.linspace(0, 3, 150)
    gestures[0, 50:200, :2] = 0.5 + 0.4 * torch.stack([angle.sin(), angle.cos()], -1)
    gestures[1, :, :2] = 0.6 * gestures[1, :, 2:]
    gestures[2] = torch.tensor([0.9, 0.1, 1.0])
    gestures[3, 77] = torch.tensor([0.9, 0.1, 1.0])
    return gestures[(gestures[..., 2] > 0).any(dim=1)]


@pytest.mark.parametrize("num", [2, 3, 4, 6])
def test_unmoved_knots_leave_a_gesture_as_it_is(num):
    gestures = many_gestures()
    bend = search.Bend(gestures, num)
    assert bend.z.shape == (len(gestures), num, 3)
    assert torch.allclose(bend(bend.z), gestures, atol=1e-5)


def test_bending_moves_place_and_time():
    """A shift of all knots shifts the gesture, with its arc; a later end makes it last longer."""
    gestures = many_gestures()[:2]
    bend = search.Bend(gestures, 4)
    ends = torch.tensor([1.0, 0, 0, 1]).view(4, 1)  # they take the others along
    frames = torch.arange(L)
    moved = bend(bend.z + ends * torch.tensor([-0.1, 0.05, 10 / 249]))
    for before, after in zip(gestures, moved, strict=True):
        pressed = before[:, 2] > 0
        assert torch.equal(frames[after[:, 2] > 0], frames[pressed] + 10)
        shifted = (before[pressed, :2] + torch.tensor([-0.1, 0.05])).clamp(0, 1)
        assert torch.allclose(after[after[:, 2] > 0, :2], shifted, atol=1e-4)
    longer = bend.z.clone()
    longer[:, -1, 2] += 20 / 249
    assert frames[bend(longer)[0, :, 2] > 0].tolist() == list(range(50, 220))


def test_a_contact_that_comes_from_known_frames_is_held_there():
    """However its knots move, it leaves them without a jump; known frames have no say otherwise."""
    gesture, free = many_gestures()[:1], torch.arange(L) >= 120
    bend = search.Bend(gesture, 4, free)
    assert torch.allclose(bend(bend.z)[:, 119:], gesture[:, 119:], atol=1e-5)
    torch.manual_seed(0)
    z = (bend.z + 0.3 * torch.randn(30, 4, 3)).clamp(0, 1).requires_grad_()
    moved = bend(z[:, None])[:, 0]
    assert torch.allclose(moved[:, 119], gesture[:, 119], atol=1e-5)
    moved.sum().backward()
    assert (z.grad[:, 0] == 0).all() and (z.grad[:, -1] != 0).any()


def curves():
    """Gestures that no straight line is near to, by name."""
    t, shapes = torch.arange(L), torch.zeros(4, L, 3)
    for shape, (first, stop) in zip(
        shapes, [(50, 200), (60, 180), (5, 245), (40, 210)], strict=True
    ):
        shape[first:stop, 2] = 1
    angle = (t - 50) / 149 * math.pi
    shapes[0, :, :2] = torch.stack([0.5 + 0.3 * angle.cos(), 0.4 + 0.3 * angle.sin()], -1)
    shapes[1, :, 0] = (0.2 + (t - 60) / 100).clamp(0.2, 0.8)
    shapes[1, :, 1] = (0.2 + (t - 120) / 100).clamp(0.2, 0.8)
    shapes[2, :, :2] = torch.tensor([0.7, 0.3])
    shapes[3, :, 0], shapes[3, :, 1] = (0.2 + (t - 40) / 80).clamp(0.2, 0.7), 0.5
    return dict(zip(("arc", "L", "long press", "rest"), shapes * shapes[..., 2:], strict=True))


@pytest.mark.parametrize("name", curves())
def test_curved_long_and_resting_gestures_can_be_reached(name):
    """From straight draws, by Adam along four knots: a twentieth of what the best draw is off."""
    target = curves()[name]
    draws = tasks.draw_true(1, 12, np.random.default_rng(0))
    draws = draws[:, (draws[0, ..., 2] > 0).any(dim=1)]

    def cost_fn(actions):
        return (actions - target).abs().mean((2, 3))

    bend = search.Bend(draws, 4)
    objective = search.Objective(cost_fn, 1, 10**6)
    assert search.descend(objective, bend.z, bend, 0.05, 40, scale_dim=-2) is not None
    assert objective.best_cost < 0.05 * cost_fn(draws).min()


def test_a_cost_without_a_way_down_is_not_descended():
    objective = search.Objective(lambda a: 0 * a.sum((2, 3)), 1, 1000)
    bend = search.Bend(many_gestures()[None], 4)
    assert not search.descend(objective, bend.z, bend, 0.05, 40, scale_dim=-2)
    assert objective.used == 3 * len(many_gestures())


def test_one_scale_takes_no_rounding_for_a_direction():
    """Gradients of 1 and of 1e-7: alone each moves by lr, together the small one stays."""

    def cost_fn(actions):
        return actions[..., 100, 0] + 1e-7 * actions[..., 200, 0]

    start, ends = torch.full((1, 1, L, 3), 0.6), []
    for scale_dim in (None, -2):
        objective = search.Objective(cost_fn, 1, 4)
        search.descend(objective, start, lambda z: ends.append(z) or z, 0.1, 1, scale_dim=scale_dim)
        assert ends[-1][0, 0, 100, 0].item() == pytest.approx(0.5, abs=1e-3)
    assert ends[1][0, 0, 200, 0] < 0.52 and ends[-1][0, 0, 200, 0] > 0.599


def test_adam_is_torchs():
    """Three steps on a quadratic, against torch.optim.Adam."""
    start = torch.rand(1, 3, L, 3) * 0.4 + 0.55
    objective, ends = search.Objective(lambda a: (a[..., :2] ** 2).sum((2, 3)), 1, 100), []
    search.descend(objective, start, lambda z: ends.append(z.detach()) or z, 0.01, 3)
    z = start.clone()
    optimizer = torch.optim.Adam([z], lr=0.01)
    for _ in range(3):
        z.grad = torch.cat([2 * z[..., :2], torch.zeros_like(z[..., 2:])], -1)
        optimizer.step()
    assert torch.allclose(ends[-1], z, atol=1e-6)
