"""The GUI world and its tasks, against cases worked by hand.

Why: the benchmark's verdict is only as good as its judge, the hard simulator, and its pairing:
every method meets the same instances.

    python -m pytest tests/test_planning_world.py
"""

import math
from functools import partial

import pytest
import torch

from planning import tasks, world
from planning.predictor import TokenPredictor, waves
from planning.world import BUTTON, ICON, LAMP, LIST, SLIDER, TOGGLE, Scenes

L = 250


def scene(*widgets):
    """One scene of (kind, x, y, half width, half height, value[, link]) widgets."""
    pos = torch.tensor([[w[1:3] for w in widgets]])
    half = torch.tensor([[w[3:5] for w in widgets]])
    low, high = pos.clone(), pos.clone()
    for i, w in enumerate(widgets):
        if w[0] == SLIDER:
            low[0, i, 0], high[0, i, 0] = 0.1, 0.9
        if w[0] == ICON:
            low[0, i], high[0, i] = half[0, i], 1 - half[0, i]
    value = torch.tensor([[float(w[5]) for w in widgets]])
    link = torch.tensor([[w[6] if len(w) > 6 else i for i, w in enumerate(widgets)]])
    kind = torch.tensor([[w[0] for w in widgets]])
    return Scenes(kind, pos, half, low, high, value, link)


def touch(*contacts):
    """One action (1, L, 3); a contact is (first, last, (x, y), (x, y))."""
    action = torch.zeros(1, L, 3)
    for first, last, begin, end in contacts:
        along = torch.linspace(0, 1, last - first + 1)[:, None]
        path = torch.tensor(begin) + along * (torch.tensor(end) - torch.tensor(begin))
        action[0, first : last + 1] = torch.cat([path, torch.ones(len(path), 1)], dim=1)
    return action


DESK = (
    (BUTTON, 0.2, 0.2, 0.06, 0.03, 0),
    (TOGGLE, 0.8, 0.2, 0.06, 0.03, 1),
    (SLIDER, 0.5, 0.4, 0.06, 0.03, 0),
    (LIST, 0.5, 0.7, 0.2, 0.1, 0.25),
    (ICON, 0.1, 0.9, 0.07, 0.04, 0),
)
TAP = (0.2, 0.2)

# action, and what it changes on DESK: widget → (x, y, value)
CASES = {
    "a tap presses a button": ([(10, 40, TAP, (0.21, 0.2))], {0: (0.2, 0.2, 1)}),
    "a tap beside it does nothing": ([(10, 40, (0.2, 0.235), (0.2, 0.235))], {}),
    "a long press does nothing": ([(10, 209, TAP, TAP)], {}),
    "one frame less is a tap": ([(10, 208, TAP, TAP)], {0: (0.2, 0.2, 1)}),
    "a stroke over a button does nothing": ([(10, 40, TAP, (0.3, 0.2))], {}),
    "a tap flips a toggle": ([(0, 9, (0.8, 0.2), (0.8, 0.2))], {1: (0.8, 0.2, 0)}),
    "two taps flip it back": (
        [(0, 9, (0.8, 0.2), (0.8, 0.2)), (20, 29, (0.8, 0.2), (0.8, 0.2))],
        {},
    ),
    "a slider moves along x alone": ([(5, 60, (0.5, 0.4), (0.7, 0.5))], {2: (0.7, 0.4, 0)}),
    "a slider stops at its end": ([(5, 60, (0.52, 0.4), (1.0, 0.4))], {2: (0.9, 0.4, 0)}),
    "a list scrolls by y": ([(5, 60, (0.5, 0.7), (0.9, 0.4))], {3: (0.5, 0.7, -0.05)}),
    "an icon follows the finger": ([(5, 60, (0.12, 0.9), (0.42, 0.5))], {4: (0.4, 0.5, 0)}),
    "the first contact owns the drag": ([(5, 60, (0.12, 0.9), TAP)], {4: (0.18, 0.2, 0)}),
    "a contact at the end counts": ([(240, 249, TAP, TAP)], {0: (0.2, 0.2, 1)}),
    "nothing does nothing": ([], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_hard_world_by_hand(name):
    contacts, changes = CASES[name]
    desk = scene(*DESK)
    after = world.hard_world(desk, touch(*contacts))
    expected = torch.cat([desk.pos, desk.value[..., None]], dim=-1)
    for widget, values in changes.items():
        expected[0, widget] = torch.tensor(values)
    assert torch.allclose(torch.cat([after.pos, after.value[..., None]], -1), expected, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if "long" not in n and "two" not in n])
def test_soft_world_tends_to_the_hard_one(name):
    """At a small temperature both agree, away from edges; but for what the soft one cannot know."""
    contacts, _ = CASES[name]
    desk, action = scene(*DESK), touch(*contacts)
    soft = world.soft_world(desk, action, temperature=5e-4)
    hard = world.hard_world(desk, action)
    assert torch.allclose(soft.pos, hard.pos, atol=2e-3)
    assert torch.allclose(soft.value, hard.value, atol=2e-3)


def test_soft_world_by_its_formula():
    """A click half a temperature beyond a button's edge, one beyond its core: 2·σ(-1)·1·σ(4)."""
    desk = scene((BUTTON, 0.2, 0.2, 0.06, 0.03, 0))
    value = world.soft_world(desk, touch((10, 40, (0.27, 0.2), (0.27, 0.2))), 0.02).value
    near, tap = (1 / (1 + math.exp(-z)) for z in (-1.0, (0.04 - 1e-4) / 0.01))
    assert value.item() == pytest.approx(2 * near * tap, rel=1e-4)


def test_the_gradient_reaches_as_far_as_the_temperature():
    desk = scene((BUTTON, 0.2, 0.2, 0.06, 0.03, 0))
    reach = []
    for temperature in (0.005, 0.1):
        action = touch((10, 40, (0.4, 0.2), (0.4, 0.2))).requires_grad_()
        world.soft_world(desk, action, temperature).value.sum().backward()
        reach.append(action.grad[..., 0].abs().max().item())
    assert reach[0] < 1e-9 and reach[1] > 1e-2


def test_a_lamp_is_lit_by_either_button():
    room = scene(
        (LAMP, 0.5, 0.5, 0.05, 0.05, 0),
        (BUTTON, 0.2, 0.2, 0.06, 0.03, 0, 0),
        (BUTTON, 0.8, 0.8, 0.06, 0.03, 0, 0),
    )
    for place in ((0.2, 0.2), (0.8, 0.8)):
        for model in (world.hard_world, partial(world.soft_world, temperature=1e-3)):
            after = model(room, touch((5, 30, place, place)))
            assert torch.allclose(after.value, torch.tensor([[1.0, 0.0, 0.0]]), atol=1e-3)
    centre = world.hard_world(room, touch((5, 30, (0.5, 0.5), (0.5, 0.5))))
    assert torch.equal(centre.value, room.value)


def test_tokens_are_normalised_and_local():
    desk = scene(*DESK)
    tokens = world.observe(desk, desk.state)
    assert tokens.shape == (1, 256, 16)
    assert torch.allclose(tokens.mean(-1), torch.zeros(1, 256), atol=1e-5)
    assert torch.allclose(tokens.var(-1, correction=0), torch.ones(1, 256), atol=1e-2)
    pressed = world.hard_world(desk, touch((10, 40, TAP, TAP)))
    change = (world.observe(desk, pressed) - tokens).abs().sum(-1).view(16, 16)
    row, column = divmod(int(change.argmax()), 16)
    assert (row, column) == (3, 3)  # 0.2 lies in the fourth of sixteen cells
    assert change[8:].max() < 1e-3 * change.max()


# ----------------------------------------------------------------------------------------
# TASKS
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.TASKS)
def test_instances_are_whole(task):
    instances = tasks.make_instances(task, 40, seed=3)
    scenes = instances.scenes
    assert scenes.kind.shape == (40, tasks.NUM_WIDGETS)
    assert not tasks.is_solved(instances, scenes.state).any(), "doing nothing solves it"
    assert tasks.is_solved(instances, instances.goal).all()
    box_low, box_high = scenes.pos - scenes.half, scenes.pos + scenes.half
    assert box_low.min() >= -0.06 and box_high.max() <= 1.06  # a handle overhangs its track
    apart = (box_low[:, :, None] >= box_high[:, None]) | (box_high[:, :, None] <= box_low[:, None])
    apart = apart.any(-1) | torch.eye(tasks.NUM_WIDGETS, dtype=torch.bool)
    assert apart.all(), "two widgets overlap"
    fewer = tasks.make_instances(task, 10, seed=3)
    assert torch.equal(fewer.scenes.pos, scenes.pos[:10])
    assert not torch.equal(tasks.make_instances(task, 10, seed=4).scenes.pos, fewer.scenes.pos)


def solve_by_hand(instances, i):
    """The obvious gesture for an instance."""
    scenes, task = instances.scenes, instances.task
    place = scenes.pos[i, 1 if task == "decoy" else 0]
    move = instances.goal.pos[i, 0] - scenes.pos[i, 0]
    if task == "scroll":
        offset = float(instances.goal.value[i, 0])
        place = place - torch.tensor([0.0, offset / 2])
        move = torch.tensor([0.0, offset])
    return touch((50, 80, tuple(place.tolist()), tuple((place + move).tolist())))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_instance_can_be_solved_and_the_model_agrees(task):
    instances = tasks.make_instances(task, 30, seed=5)
    actions = torch.cat([solve_by_hand(instances, i) for i in range(30)])
    assert tasks.judge(instances, actions).float().mean() >= 0.96  # a scroll may leave the screen
    cost_fn = tasks.model_cost(instances)
    costs = cost_fn(torch.stack([torch.zeros_like(actions), actions], dim=1))
    # the soft model also drags an icon that lies beside a slider's handle
    assert (costs[:, 1] < 0.5 * costs[:, 0]).float().mean() >= 0.85


def test_side_effects_are_failures():
    instances = tasks.make_instances("tap_48dp", 30, seed=5)
    instances = instances.rows(instances.scenes.kind[:, 1] == TOGGLE)
    button, toggle = (tuple(instances.scenes.pos[0, w].tolist()) for w in (0, 1))
    one = touch((10, 30, button, button))
    both = touch((10, 30, button, button), (60, 80, toggle, toggle))
    first = instances.rows(slice(0, 1))
    assert tasks.judge(first, one).all() and not tasks.judge(first, both).any()


@pytest.mark.parametrize(
    ("task", "percent"), [("tap_large", 0.70), ("tap_48dp", 0.18), ("scroll", 2.2), ("decoy", 0.36)]
)
def test_base_rates(task, percent):
    """A random click in a w x h button: about w·h·(a quarter, and swipes shorter than the slop).

    Expected values: 400,000 gestures by a separate program; twice 2 h w here.
    """
    n = 40_000
    rate = tasks.base_rate(task, n)
    error = math.sqrt(percent / 100 / n)
    assert rate == pytest.approx(percent / 100, abs=4 * error + 0.002 * (task == "scroll"))


def test_a_token_under_the_finger_attends_to_it_from_the_start():
    """Before any training: of all tokens that one has the sharpest eye for where the finger was."""
    torch.manual_seed(0)
    model = TokenPredictor()
    x = torch.zeros(1, L, 3)
    x[0, 100:150] = torch.tensor([0.3, 0.6, 1.0])
    read = torch.cat([x, x[..., 2:] * waves(x[..., :2])], dim=-1)
    moments = model._moments(read, model.gru(read)[0])
    assert moments.pressed[0].tolist() == [0.0] * 10 + [1.0] * 5 + [0.0] * 10
    look = model.blocks[0].look
    q = look.q(torch.nn.functional.layer_norm(model.at(model.places), (64,)))
    logits = q @ look.k(moments.places[0, 12])
    assert logits.argmax() == 9 * 16 + 4, "the token of row 9, column 4 holds (0.3, 0.6)"
    assert logits.max() > 3 * logits.std(), "and it stands out"
