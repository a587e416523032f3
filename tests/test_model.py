"""The denoiser: the plan's network to the number, and what each option promises.

Why: the plan's constructor must build the plan's transformer, so it is compared with torch's own
nn.TransformerEncoder built as in the plan, with the same weights; known frames must reach the
network and nothing else of x_0 may; and a network that cannot overfit eight gestures cannot learn.

    python -m pytest tests/test_model.py
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import L, make_gestures
from torch import nn
from torch.nn import functional as F

import train_diffusion_ddim as tdd
from train_diffusion_ddim import (
    MinimalDiffusionTransformer,
    PositionalEncoding,
    SelfAttention,
    TimestepEmbedding,
    meet_known,
    nearest_known,
)
from trainlib.contact_chain import contact_chain, press_evidence
from trainlib.errors import UserError
from trainlib.state import TrainState

OPTIONS = [
    {},
    {"patch_size": 5},
    {"adaln": True},
    {"rotary": True},
    {"known_frames": True},
    {"patch_size": 4, "adaln": True, "rotary": True, "known_frames": True},
    {"contacts": True},
    {"contacts": True, "patch_size": 5, "known_frames": True},
    {"action_dim": 5},
    {"max_timesteps": 100, "dropout": 0.0},
]


def build(**options):
    torch.manual_seed(0)
    sizes = {"seq_len": L, "d_model": 16, "nhead": 2, "num_layers": 2, "dim_feedforward": 32}
    return MinimalDiffusionTransformer(**{**sizes, **options}).eval()


def awake(model):
    """Give random values to what adaLN-zero starts at zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3, channels=3):
    torch.manual_seed(2)
    return torch.randn(batch, L, channels), torch.randint(0, 1000, (batch,))


class PlanTransformer(nn.Module):
    """The plan's MinimalDiffusionTransformer, of torch's own layers."""

    def __init__(self, seq_len, d_model, nhead, num_layers, dim_feedforward):
        super().__init__()
        self.d_model = d_model
        self.action_embedding = nn.Linear(3, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, nhead, dim_feedforward, 0.0, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers)
        self.output_projection = nn.Linear(d_model, 3)
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(self, x_t, t):
        x = self.action_embedding(x_t) + plan_positions(x_t.shape[1], self.d_model)
        x = self.layer_norm(x + plan_timesteps(t, self.d_model)[:, None])
        return self.output_projection(self.transformer(x))


def plan_positions(length, d_model):
    position = torch.arange(length)[:, None].float()
    div_term = torch.exp(torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model))
    pe = torch.zeros(length, d_model)
    pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
    return pe


def plan_timesteps(t, dim):
    half = dim // 2
    angle = t[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


def copy_weights(ours, plan):
    names = {
        "self_attn.in_proj_weight": "attention.qkv.weight",
        "self_attn.in_proj_bias": "attention.qkv.bias",
        "self_attn.out_proj": "attention.out",
        "linear1": "up",
        "linear2": "down",
        "norm1": "norm_1",
        "norm2": "norm_2",
    }
    state = {}
    for name, value in plan.state_dict().items():
        new = name.replace("transformer.layers", "blocks")
        for theirs, our in names.items():
            new = new.replace(theirs, our)
        state[new] = value
    ours.load_state_dict(state)  # strict: every weight has its counterpart


def test_the_plans_size():
    model = MinimalDiffusionTransformer(d_model=32, num_layers=2, nhead=2)
    assert sum(p.numel() for p in model.parameters()) == 42_339
    plan = PlanTransformer(250, 32, 2, 2, 256)
    assert sum(p.numel() for p in plan.parameters()) == 42_339
    assert (model.action_dim, model.seq_len, model.d_model) == (3, 250, 32)


@pytest.mark.parametrize(("d_model", "nhead", "num_layers"), [(32, 2, 2), (16, 4, 1)])
def test_equals_torchs_encoder(d_model, nhead, num_layers):
    torch.manual_seed(3)
    plan = PlanTransformer(250, d_model, nhead, num_layers, 256).eval()
    for parameter in plan.parameters():  # biases and norms start trivial
        nn.init.normal_(parameter, std=0.2)
    ours = MinimalDiffusionTransformer(
        d_model=d_model, nhead=nhead, num_layers=num_layers, dropout=0.0
    ).eval()
    copy_weights(ours, plan)
    x_t, t = torch.randn(4, 250, 3), torch.tensor([0, 1, 500, 999])
    torch.testing.assert_close(ours(x_t, t), plan(x_t, t), rtol=0, atol=1e-5)


def test_positions_are_the_plans_and_defined_for_odd_widths():
    expected = plan_positions(50, 16)
    zeros = torch.zeros(2, 40, 16)
    torch.testing.assert_close(PositionalEncoding(16, 50)(zeros)[1], expected[:40])
    assert PositionalEncoding(16).pe.shape == (1, 300, 16)
    for width in (1, 2, 3, 7):
        pe = PositionalEncoding(width, 50)(torch.zeros(1, 50, width))
        assert pe.isfinite().all() and pe.shape == (1, 50, width)
        angle = torch.arange(50)
        torch.testing.assert_close(pe[0, :, 0], torch.sin(angle.float()))


def test_rotary_attention_turns_queries_and_keys_as_complex_numbers():
    torch.manual_seed(0)
    attention, x = SelfAttention(24, 3, rotary_tokens=10), torch.randn(2, 10, 24)
    q, k, v = attention.qkv(x).reshape(2, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
    # of the eight numbers of a head, the i-th and the (4 + i)-th are one complex number
    frequency = torch.tensor([1, 10 ** (-1 / 3), 10 ** (-2 / 3), 0.1])
    turn = torch.exp(1j * torch.arange(10)[:, None] * frequency)
    q, k = (torch.complex(a[..., :4], a[..., 4:]) * turn for a in (q, k))
    score = torch.einsum("bhid,bhjd->bhij", q, k.conj()).real / 8**0.5
    mixed = (score.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 10, 24)
    torch.testing.assert_close(attention(x), attention.out(mixed))


def test_rotary_attention_sees_distances_alone():
    torch.manual_seed(0)
    attention, x = SelfAttention(16, 2, rotary_tokens=30), torch.randn(1, 3, 16)
    nn.init.zeros_(attention.qkv.bias)  # so that a token of zeros is silent
    early, late = torch.zeros(1, 30, 16), torch.zeros(1, 30, 16)
    early[:, 2:5], late[:, 20:23] = x, x
    torch.testing.assert_close(attention(early)[:, 2:5], attention(late)[:, 20:23])
    assert not torch.allclose(attention(early)[:, 2:5], attention(early.flip(1))[:, 25:28].flip(1))


def test_bf16_attention_on_a_cpu_is_the_same_function(monkeypatch):
    """There it is written out: the backward pass of torch's kernel is several times slower."""
    torch.manual_seed(0)
    attention, x = SelfAttention(16, 2, rotary_tokens=10), torch.randn(2, 10, 16)
    nn.init.normal_(attention.qkv.weight, std=0.5)  # attention far from uniform
    exact = attention(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("rotary", "frames", "fits"),
    [(r, L, L == 20 or (L == 18 and not r)) for r in (True, False) for L in (18, 19, 20, 22)],
)
def test_frames_that_do_not_fit_are_named(rotary, frames, fits):
    """Sinusoids serve shorter gestures too, whole tokens at a time; rotary tables do not."""
    model = build(seq_len=20, patch_size=2, rotary=rotary)
    with nullcontext() if fits else pytest.raises(UserError, match=f"20 frames, got {frames}"):
        model(torch.randn(1, frames, 3), torch.tensor([1]))


def test_rotary_attention_needs_pairs():
    with pytest.raises(UserError, match="2 \\* nhead, with rotary positions, must divide d_model"):
        build(rotary=True, d_model=15, nhead=3)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 33, 64])
def test_timestep_embedding(dim):
    t = torch.tensor([0, 1, 17, 999])
    embedding = TimestepEmbedding(dim)(t)
    assert embedding.shape == (4, dim) and embedding.dtype == torch.float32
    assert embedding.isfinite().all()
    if dim >= 4:
        even = dim - dim % 2
        torch.testing.assert_close(embedding[:, :even], plan_timesteps(t, even), rtol=0, atol=1e-4)
        assert len(embedding.unique(dim=0)) == 4
    if dim % 2:
        assert not embedding[:, -1].any()
    assert TimestepEmbedding(dim).to("meta").frequency.device.type == "meta"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shapes(options):
    model = build(**options)
    channels = options.get("action_dim", 3)
    for batch in (1, 3):
        x_t, t = inputs(batch, channels)
        output = model(x_t, t)
        assert output.shape == (batch, L, channels) and output.isfinite().all()
    if model.known_frames:
        mask = torch.rand(3, L) < 0.5
        assert model(x_t, t, x_t, mask).shape == x_t.shape


@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_output_depends_on_t_on_order_and_on_every_frame(options):
    model = awake(build(**options))
    x_t, t = inputs()
    output = model(x_t, t)
    assert (model(x_t, (t + 100) % 1000) - output).abs().max() > 1e-3
    flipped = model(x_t.flip(1), t).flip(1)
    assert (flipped - output).abs().max() > 1e-3
    x_t[:, -1] += 1
    assert ((model(x_t, t) - output).abs().amax(dim=(0, 2)) > 1e-6).all()  # bidirectional


@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_gestures_of_a_batch_do_not_mix(options):
    model, (x_t, t) = awake(build(**options)), inputs()
    output = model(x_t, t)
    for i in range(3):
        torch.testing.assert_close(output[i : i + 1], model(x_t[i : i + 1], t[i : i + 1]))


def test_adaln_starts_as_zero_and_every_block_as_the_identity():
    model, (x_t, t) = build(adaln=True), inputs()
    assert not model(x_t, t).any()
    x, t_emb = torch.randn(3, L, 16), torch.randn(3, 16)
    for block in model.blocks:
        assert torch.equal(block(x, t_emb), x)
    model(x_t, t).sum().backward()
    assert model.output_projection.weight.grad.any()  # and it can leave zero


ALPHA_BAR = tdd.DDIMScheduler(beta_schedule="cosine").alphas_cumprod


def contact_head(gates, length=L, smaller=-30.0, **options):
    """A head that reads nothing of the tokens; gates by degree, no correction, std at most STD."""
    options |= {"contacts": True, "patch_size": 5, "beta_schedule": "cosine"}
    model = build(seq_len=length, **options)
    head = model.output_projection
    for layer in (head.frames, head.curves.out):
        nn.init.zeros_(layer.bias)
    head.curves.out.bias.data[:16] = torch.tensor(gates).repeat(2)
    head.curves.out.bias.data[16:32] = smaller
    return head


def draw_contacts(head, x_t, t=0, known=None, known_mask=None):
    tokens, t = torch.zeros(len(x_t), x_t.shape[1] // 5, 16), torch.full((len(x_t),), t)
    with torch.no_grad():
        return head(tokens, x_t, t, known, known_mask)


def curves(*contacts, length=L):
    """x_0, model units, (1, L, 3): for each (first, polynomial of x, of y, frames) a contact."""
    x_0 = -torch.ones(1, length, 3)
    for first, x, y, n in contacts:
        s = torch.linspace(-1, 1, n, dtype=torch.float64)
        xy = [sum(c * s**k for k, c in enumerate(poly)) for poly in (x, y)]
        x_0[0, first : first + n] = torch.stack([*xy, torch.ones(n)], dim=-1).float()
    return x_0


@pytest.mark.parametrize("smaller", [-1e4, 0.0, 60.0, 1e4])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_std_of_any_size_has_a_finite_gradient(smaller, t):
    """Below 1e-23 its square is 0 in float32, where a root has no derivative."""
    head = contact_head([0.0] * 8, smaller=smaller)
    x_0 = curves((1, [0.1, -0.3], [0.5], 11))
    output, decisions = head(torch.ones(1, L // 5, 16), x_0, torch.tensor([t]), None, None)
    (output.square().sum() + decisions.gates.sum()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_contact_is_the_polynomial_through_its_frames():
    """Gates open: what is a polynomial of degree 7 comes back, two contacts in a window too."""
    x_0 = curves(
        (1, [0.1, -0.3, 0.2, 0.1, -0.2, 0.1, 0.1, 0.2], [0.5, 0.1], 11),
        (13, [-0.4], [0, 0, 0.7], 6),
    )
    output, decisions = draw_contacts(contact_head([30.0] * 8), ALPHA_BAR[0] ** 0.5 * x_0)
    torch.testing.assert_close(output, x_0, atol=1e-3, rtol=0)
    assert torch.equal(decisions.log_odds > 0, x_0[..., 2] > 0)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_window_holds_no_more_contacts_than_it_may(most):
    """Of three in x_t, without any noise; those that are one frame apart are the first to merge."""
    x_0 = curves(*((first, [0.2], [-0.1], 4) for first in (1, 6, 12)))
    head = contact_head([30.0] * 8, max_contacts=most)
    _, decisions = draw_contacts(head, ALPHA_BAR[0] ** 0.5 * x_0)
    pressed = F.pad(decisions.log_odds > 0, (1, 0)).int()
    assert (pressed.diff(dim=1) == 1).sum() == most == decisions.member.shape[2]


@pytest.mark.parametrize("decisive", [False, True])
def test_a_head_practises_the_curves_of_x_0_and_a_decisive_one_does_not(decisive):
    """A contact of 14 frames whose mean is (0.2, -0.1), on a line of slope 0.3 in x."""
    torch.manual_seed(6)
    head, x_0 = contact_head([0.0] * 8, decisive=decisive), curves((3, [0.2, 0.3], [-0.1], 14))
    eps, t = torch.randn(1, L, 3), torch.tensor([70])
    given = torch.zeros(1, L // 5, 16), x_0, t, None, None
    practice = head(*given, (x_0, eps))[1].practice
    s = torch.linspace(-1, 1, 14)
    c_0 = torch.zeros(1, 3, 16)
    c_0[0, 0, :2] = torch.tensor([0.2, 0.3 * s.square().mean().sqrt()])  # mean square 1
    c_0[0, 0, 8] = -0.1
    n = torch.tensor([14.0, 0, 0])[None, :, None]
    expected = head.curves.practise(c_0, n, eps[..., :2], t, head.log_snr, head.certain)
    torch.testing.assert_close(practice, expected * (not decisive), rtol=1e-3, atol=0)
    assert not head(*given)[1].practice.any()


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_closed_gates_leave_the_least_squares_fit(degree):
    """Of noise on a press, what is left is numpy's polyfit of that degree, one per contact."""
    torch.manual_seed(5)
    x_t = curves((3, [0.2, 0.3], [-0.1], 14)) + 0.01 * torch.randn(1, L, 3)
    gates = [30.0 if k <= degree else -1000.0 for k in range(8)]
    output, _ = draw_contacts(contact_head(gates), x_t)
    frames, noisy = np.arange(14), x_t[0, 3:17].double().numpy()
    for axis in range(2):
        fit = np.polyval(np.polyfit(frames, noisy[:, axis], degree), frames)
        np.testing.assert_allclose(output[0, 3:17, axis], fit, atol=2e-3)
        assert np.abs(np.diff(output[0, 3:17, axis], degree + 1)).max() < 1e-6  # nothing shakes


@pytest.mark.parametrize("std", [0.6, 0.06])
def test_the_shrinkage_is_that_of_a_gaussian_prior(std):
    """Open gates, no correction: E[c | c_t] of c ~ N(0, std²) in noise of variance (1 - ᾱ)/n."""
    t, n = 300, 10
    smaller = 3 + math.log(0.6 / std - 1 + 1e-9)  # std = STD·exp(-softplus(smaller - 3))
    x_t = curves((0, [0.4], [-0.2], n))
    x_t[..., 2] *= 100  # pressed beyond doubt
    output, _ = draw_contacts(contact_head([30.0] * 8, smaller=smaller), x_t, t)
    a, variance = ALPHA_BAR[t].item(), std**2
    gain = a**0.5 * variance / (a * variance + (1 - a) / n)
    expected = torch.tensor([0.4, -0.2]) * gain
    torch.testing.assert_close(output[0, :n, :2], expected.expand(n, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [100, 400, 700])
def test_what_a_frame_testifies_is_its_likelihood_ratio(t):
    x_t, place, a = torch.randn(2, L, 3), torch.randn(2, L, 2), ALPHA_BAR[t]
    means = torch.cat([place, torch.ones(2, L, 1)], dim=-1), -torch.ones(2, L, 3)
    noise = (torch.distributions.Normal(a**0.5 * mean, (1 - a) ** 0.5) for mean in means)
    pressed, idle = (n.log_prob(x_t).sum(dim=-1) for n in noise)
    evidence = press_evidence(x_t, place, a.expand(2, 1, 1))
    torch.testing.assert_close(evidence, pressed - idle, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", [1, 990])
def test_the_chain_weighs_what_frames_and_tokens_say(t):
    head, x_t = contact_head([0.0] * 8), torch.randn(2, L, 3)
    head.frames.bias.data[::3] = 0.7  # what the tokens say
    log_odds, a = draw_contacts(head, x_t, t)[1].log_odds, ALPHA_BAR[t]
    flat = torch.zeros(2, L)
    evidence = press_evidence(x_t, torch.zeros(2, L, 2), a.expand(2, 1, 1))
    own = 0.7 + evidence.clamp(-30, 30)  # as sure as of a known frame
    expected = contact_chain(own, flat, flat, torch.zeros(2, 4), torch.zeros(L + 1))
    torch.testing.assert_close(log_odds, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("sigma", "share"), [(0.009, 1.0), (0.011, 0.6)])
def test_at_the_end_it_is_decided_what_moves(sigma, share):
    scheduler = tdd.DDIMScheduler(beta_schedule="cosine")
    t = scheduler.timestep_at(sigma)
    x_0 = curves((3, [0.1, 0.5], [-0.2, 0.3], 14))
    logit = math.log(0.6 / 0.4)
    output, _ = draw_contacts(
        contact_head([30.0, logit] + [-30.0] * 6), ALPHA_BAR[t] ** 0.5 * x_0, t
    )
    moved = output[0, 16, :2] - output[0, 3, :2]
    torch.testing.assert_close(moved, share * torch.tensor([1.0, 0.6]), atol=2e-3, rtol=0)


def test_contacts_beyond_the_slots_are_not_drawn():
    """A window holds at most three contacts: of five the least likely are idle."""
    x_0 = curves(*((8 * i, [0.5], [-0.5], 2 + i) for i in range(5)), length=40)
    output, _ = draw_contacts(contact_head([30.0] * 8, length=40), x_0, 60)
    starts = (output[0, 1:, 2] > 0) & (output[0, :-1, 2] <= 0)
    assert starts.sum() + (output[0, 0, 2] > 0) == 3 and (output[0, 32:38, 2] > 0).all()


def test_curves_meet_the_known_frames():
    """Given two points of a contact the shift between them is linear, beyond them it is held."""
    torch.manual_seed(6)
    xy, known = torch.randn(2, L, 2), torch.randn(2, L, 3)
    known[..., 2] = 1
    mask = torch.zeros(2, L, dtype=torch.bool)
    mask[0, [4, 12]] = mask[1, 7] = True
    known[:, 0, 2], mask[:, 0] = -1, True  # known to be idle: nothing to pass through
    shift = meet_known(xy, known, mask) - xy
    at = known[..., :2] - xy
    torch.testing.assert_close(
        shift[0, 4:13], torch.lerp(at[0, 4], at[0, 12], torch.linspace(0, 1, 9)[:, None])
    )
    torch.testing.assert_close(shift[0, :4], at[0, 4].expand(4, 2))
    torch.testing.assert_close(shift[1], at[1, 7].expand(L, 2))
    nothing = torch.zeros_like(mask)
    assert torch.equal(meet_known(xy, known, nothing), xy)


def test_dropout_acts_in_training_only():
    model, (x_t, t) = build(dropout=0.5), inputs()
    assert torch.equal(model(x_t, t), model(x_t, t))
    model.train()
    assert not torch.equal(model(x_t, t), model(x_t, t))


def test_state_dict_round_trip():
    options = OPTIONS[5]
    a, b = awake(build(**options)), awake(build(**options))
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1)
    x_t, t = inputs()
    assert not torch.equal(a(x_t, t), b(x_t, t))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x_t, t), b(x_t, t))


def plain_nearest(known, mask):
    """nearest_known as a loop over frames."""
    rows = []
    for x, m in zip(known.tolist(), mask.tolist(), strict=True):
        for i in range(len(m)):
            before = [j for j in range(i + 1) if m[j]]
            after = [j for j in range(i, len(m)) if m[j]]
            values = x[before[-1]] if before else [0.0] * len(x[0])
            values = values + (x[after[0]] if after else [0.0] * len(x[0]))
            along = 0.0
            if before and after and after[0] > before[-1]:
                along = (i - before[-1]) / (after[0] - before[-1])
            rows.append([*values, along, float(bool(before)), float(bool(after))])
    return torch.tensor(rows).reshape(*mask.shape, -1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_nearest_known_is_the_loop(share):
    torch.manual_seed(4)
    known, mask = torch.randn(6, L, 3), torch.rand(6, L) < share
    mask[0] = False
    mask[1] = torch.arange(L) == 0
    mask[2] = torch.arange(L) == L - 1
    features = nearest_known(known, mask)
    assert features.shape == (6, L, 9)
    torch.testing.assert_close(features, plain_nearest(known, mask))


def test_only_known_frames_are_read():
    model, (x_t, t) = awake(build(known_frames=True)), inputs()
    known, mask = torch.randn(3, L, 3), torch.rand(3, L) < 0.3
    output = model(x_t, t, known, mask)
    other = known.where(mask[..., None], torch.nan)
    assert torch.equal(model(x_t, t, other, mask), output)
    seen = known + mask[..., None] * 0.5
    assert (model(x_t, t, seen, mask) - output).abs().max() > 1e-3


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[5]], ids=str)
def test_an_empty_mask_is_no_mask(options):
    model, (x_t, t) = awake(build(**options)), inputs()
    empty = torch.zeros(3, L, dtype=torch.bool)
    assert torch.equal(model(x_t, t, torch.randn(3, L, 3), empty), model(x_t, t))


def test_the_mask_itself_is_seen():
    model, (x_t, t) = awake(build(known_frames=True)), inputs()
    zeros, one = torch.zeros(3, L, 3), torch.zeros(3, L, dtype=torch.bool)
    one[:, 7] = True
    assert (model(x_t, t, zeros, one) - model(x_t, t)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nhead": 3}, "nhead.*16.*3"),
        ({"nhead": 0}, "nhead.*0"),
        ({"patch_size": 3}, "patch_size.*20.*3"),
        ({"patch_size": 0}, "patch_size.*0"),
    ],
)
def test_impossible_sizes_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        build(**options)


def test_known_frames_for_a_model_without_them_are_refused():
    x_t, t = inputs()
    with pytest.raises(UserError, match="known_frames=True"):
        build()(x_t, t, x_t, torch.ones(3, L, dtype=torch.bool))


def test_overfits_eight_gestures(tiny_config):
    # Recreating them from their press edges must come out far below the zeros control.
    config = tiny_config(
        d_model=32,
        num_layers=2,
        batch_size=8,
        dropout=0.0,
        lr=5e-3,
        known_share=1.0,
        prediction_type="x0",
        contacts=True,
    )
    x_0, steps = make_gestures(8, seed=5), 400
    torch.manual_seed(0)
    model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
    state = TrainState(model, scheduler, config, steps, tdd.NUM_TASKS)
    for _ in range(steps):
        tdd.train_step(state, x_0)
    mse = nn.functional.mse_loss(tdd.recreate(state.ema, scheduler, x_0), x_0).item()
    zeros = (x_0**2).mean().item()
    assert mse < 0.02 * zeros
