"""What the curve of a contact was before it was noised: a small network for a few numbers."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainlib.contact_chain import NEVER
from trainlib.lessons import CurveLessons
from trainlib.returns import by_neighbours
from trainlib.tensors import WideLinear, draw_eps, zero_init

NOTHING = -40.0  # log of what is left of a wave; denormal numbers take a CPU forty times as long
CURVES_BELOW = 0.05  # noise where a walk begins, data units
STILL = 5e-5  # of the screen, a twentieth of a pixel; less is no motion


class CurveWalk(NamedTuple):
    """How curves go on by themselves in the last step of a sample."""

    steps: int
    eta: float = 0.0  # 0 = deterministic, 1 = the variance of the DDPM posterior
    z: Tensor | None = None  # N(0, 1), (B, ...), of which as many steps as it has numbers for


def draw_walk(
    steps: int, eta: float, x_t: Tensor, generator: torch.Generator | None
) -> dict[str, CurveWalk]:
    """Return how a denoiser is asked for a walk at x_t, (B, L, C): `walk=`, or {} for no steps."""
    if not steps:
        return {}
    z = draw_eps(x_t.shape, x_t.device, generator, x_t.dtype) if eta else None
    return {"walk": CurveWalk(steps, eta, z)}


class CurveDenoiser(nn.Module):
    """Estimate the coefficients of contacts in x_0 from those in x_t, and from their tokens.

    An estimate is P(not 0) times what an MLP says, preconditioned as EDM's network (arXiv:
    2206.00364, eq. 7) by a std that is predicted, too, since a tap drifts by a hundredth of what a
    swipe moves. The MLP sees each coefficient relative to its noise, and waves of the place, each
    as far as the noise leaves something of it (arXiv:2103.13415, eq. 14), since people touch where
    buttons are. By P(return) the places of a contact and of the one before it are estimated as one.

    A student of windows with one contact takes curves `by_noise_alone`: where no frame is known,
    tokens tell it nothing, and it learns from CurveLessons alone.

    Coefficients are (B, S, axes * degrees), axis by axis, model units; their noise is independent,
    of variance (1 - ᾱ_t)/n for a contact of n frames.
    """

    STD = 0.6  # of x and y, the largest
    WIDTH, WAVES = 128, 5  # of the MLP; of the place, the longest over the whole screen twice
    LEVELS = 32  # of noise, in `practise`, at most
    LESSON_WEIGHT = 10.0  # what a student gets wrong in curves is small, and is seen
    RELATIVE, SHORT = 0.4, 0.02  # weight of errors over what they are errors of, or over SHORT
    by_noise_alone = False

    def __init__(self, d_model: int, axes: int, degrees: int) -> None:
        super().__init__()
        self.axes, numbers = axes, axes * degrees
        self.from_tokens = zero_init(WideLinear(d_model, self.WIDTH))
        self.from_x_t = WideLinear(3 * numbers + 2 + 2 * axes * self.WAVES, self.WIDTH)
        self.hidden = nn.ModuleList(WideLinear(self.WIDTH, self.WIDTH) for _ in range(2))
        self.out = zero_init(WideLinear(self.WIDTH, 3 * numbers))
        self.out.bias.data[:numbers] = 3.0 - torch.arange(degrees).repeat(axes)  # near a line
        self.returns = zero_init(WideLinear(d_model, 1))  # log odds, before the gap is seen

    def forward(
        self,
        c_t: Tensor,
        tokens: Tensor | None,
        log_snr: Tensor,
        n: Tensor,
        decided_below: float,
        known_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return coefficients of x_0, the log odds that each is not 0, and those of returns.

        Args:
            c_t: coefficients in x_t.
            tokens: means over the tokens of each contact, (B, S, D); None = they say nothing.
            log_snr: log ᾱ_t/(1 - ᾱ_t), (B, 1, 1).
            n: frames of each contact, (B, S, 1); 0 = there is none.
            decided_below: a value of 1 - ᾱ_t; below it the likelier answers are taken for true.
            known_mask: frames that are known, (B, L) bool; None = none. Read `by_noise_alone`.
        """
        told: Tensor | None = None
        if self.by_noise_alone and tokens is not None:
            told = torch.zeros_like(n[:, 0, 0]) if known_mask is None else known_mask.any(dim=1)
            told = told.bool()[:, None, None]
        alpha_bar_t, noise_t = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)  # without rounding
        prior = torch.zeros_like(n[..., 0]) if tokens is None else self.returns(tokens)[..., 0]
        prior, n = torch.where(n[..., 0] > 0, prior, NEVER), n.clamp(min=1)
        own, decided = noise_t / n, noise_t < decided_below
        c_t, noise, returns = by_neighbours(c_t, own, alpha_bar_t, prior, decided, self.axes)

        c_in, by_noise = (alpha_bar_t * self.STD**2 + noise).rsqrt(), c_t / noise.sqrt()
        features = [c_in * c_t, torch.asinh(by_noise), torch.log1p(by_noise**2)]
        features += [n.log(), own.log(), self.waves(c_t, own, alpha_bar_t)]
        hidden = self.from_x_t(torch.cat(features, dim=-1))
        if tokens is not None:
            heard = self.from_tokens(tokens)
            hidden = hidden + (heard if told is None else told * heard)
        for layer in self.hidden:
            hidden = layer(F.silu(hidden))
        gates, smaller, correction = self.out(F.silu(hidden)).chunk(3, dim=-1)

        std = self.STD * torch.exp(-F.softplus(smaller - 3))
        c_in = (alpha_bar_t * std**2 + noise).rsqrt()
        c_skip, c_out = std**2 * alpha_bar_t.sqrt() * c_in**2, std * noise.sqrt() * c_in
        share = torch.where(decided, gates > 0, torch.sigmoid(gates))
        c = share * (c_skip * c_t + c_out * correction)
        if told is not None:
            c, gates = (torch.where(told, x, x.detach()) for x in (c, gates))
        return c, gates, returns

    def walk(
        self,
        c_t: Tensor,
        tokens: Tensor | None,
        log_snr: Tensor,
        n: Tensor,
        decided_below: float,
        known_mask: Tensor | None = None,
        *,
        by: CurveWalk | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoise in steps of DDIM (eq. 12 and 16) to half of the noise that decides.

        Steps are even in log SNR. Arguments and result are those of `forward`, and `by`, what steps
        are to be taken; None = one, as `forward`.
        """
        steps, eta, z = by or CurveWalk(1)
        if z is not None:
            z, numbers = z.flatten(1), c_t.shape[1:].numel()
            steps = min(steps, 1 + z.shape[1] // numbers)
            z = z[:, : (steps - 1) * numbers].unflatten(1, (steps - 1, *c_t.shape[1:]))
        end = log_snr.clamp(min=math.log(4 / decided_below))
        result = self(c_t, tokens, log_snr, n, decided_below, known_mask)
        for i in range(1, steps):
            noise_t, now = torch.sigmoid(-log_snr), log_snr
            log_snr = torch.lerp(now, end, 1 / (steps - i))
            alpha_bar_prev, noise_prev = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
            variance = eta**2 * noise_prev / noise_t * (noise_t - noise_prev) / alpha_bar_prev
            eps = (c_t - torch.sigmoid(now).sqrt() * result[0]) / noise_t.sqrt()
            c_t = alpha_bar_prev.sqrt() * result[0] + (noise_prev - variance).sqrt() * eps
            if z is not None:
                c_t = c_t + (variance / n.clamp(min=1)).sqrt() * z[:, i - 1]
            result = self(c_t, tokens, log_snr, n, decided_below, known_mask)
        return result

    def waves(self, c_t: Tensor, own: Tensor, alpha_bar_t: Tensor) -> Tensor:
        """Return E[sin ωy], E[cos ωy] of places y = c_t/√ᾱ in their noise, (B, S, axes*2*WAVES)."""
        omega = math.pi * 2.0 ** torch.arange(self.WAVES, device=c_t.device, dtype=c_t.dtype)
        places = c_t.unflatten(2, (self.axes, -1))[..., :1] / alpha_bar_t.sqrt()[..., None]
        left = (-(omega**2) * (own / alpha_bar_t)[..., None] / 2).clamp(min=NOTHING).exp()
        turned = places * omega
        return torch.cat([turned.sin() * left, turned.cos() * left], dim=-1).flatten(2)

    def practise(
        self, c_0: Tensor, n: Tensor, eps: Tensor, t: Tensor, log_snr: Tensor, decided_below: float
    ) -> Tensor:
        """Return the loss of denoising the curves of x_0 at many noise levels at once, (B,).

        With one contact in a window, what x_t says of its curve is these few numbers, and tokens
        add nothing; so at each step the MLP can see a contact at M levels in place of one. At one
        it does not learn where people touch (docs/LOG.md). The loss is `loss`.

        Args:
            c_0: coefficients in x_0.
            n: frames of each contact, (B, S, 1).
            eps: N(0, 1), (B, ...); M levels are as many, up to LEVELS, as it has numbers for.
            t: the first of the levels, (B,); the others lie T/M apart.
            log_snr: of each t, (T,).
            decided_below: as in `forward`.
        """
        numbers, T = c_0.shape[2], len(log_snr)
        M = min(self.LEVELS, eps[0].numel() // numbers)
        if M == 0:
            return torch.zeros_like(c_0[:, 0, 0])
        noise = eps.flatten(1)[:, : M * numbers].unflatten(1, (M, 1, numbers))
        levels = (t[:, None] + torch.arange(M, device=t.device) * T // M) % T
        snr = log_snr[levels][..., None, None].to(c_0.dtype)  # (B, M, 1, 1)
        c_0, n = (x[:, None].expand(-1, M, -1, -1) for x in (c_0, n))
        return self.loss(c_0, noise, n, snr, decided_below)

    def learn(self, lessons: CurveLessons, log_snr: Tensor, decided_below: float) -> Tensor:
        """Return the loss of lessons of B gestures, each at one noise level, (B,).

        A lesson is no mean of curves, so errors may count by the size of what is moved: without
        that short moves come out too long, and clicks too seldom.
        """
        given = log_snr[:, None, None, None], decided_below, self.RELATIVE
        return self.LESSON_WEIGHT * self.loss(*lessons, *given)

    def loss(
        self,
        c_0: Tensor,
        eps: Tensor,
        n: Tensor,
        log_snr: Tensor,
        decided_below: float,
        relative: float = 0.0,
    ) -> Tensor:
        """Return the loss of denoising curves of B gestures at M noise levels, (B,).

        Squared errors relative to the noise and STD, mean over coefficients, and the cross-entropy
        of which are not 0, summed over degrees; mean over axes, levels and contacts.

        Args:
            c_0: coefficients in x_0, (B, M, S, axes * degrees).
            eps: N(0, 1), likewise, or of S = 1.
            n: frames of each contact, (B, M, S, 1); 0 = there is none.
            log_snr: (B, M, 1, 1), or of M = 1.
            decided_below: as in `forward`.
            relative: also the squared errors over c_0² + SHORT², times this.
        """
        exists, M = n > 0, c_0.shape[1]
        log_snr = log_snr.expand(-1, M, -1, -1)
        variance = torch.sigmoid(-log_snr) / n.clamp(min=1)
        c_t = torch.sigmoid(log_snr).sqrt() * c_0 + variance.sqrt() * eps
        c_t, given_snr, n = (x.flatten(0, 1) for x in (c_t, log_snr, n))
        c, gates, _ = self(c_t, None, given_snr, n, decided_below)
        c, gates = (x.unflatten(0, (-1, M)) for x in (c, gates))

        precision = torch.sigmoid(log_snr) / variance + 1 / self.STD**2
        if relative:
            precision = precision + relative / (c_0.square() + self.SHORT**2)
        error = ((c - c_0).square() * precision).mean(dim=3)
        moves = (c_0.abs() > 2 * STILL).to(gates.dtype)
        entropy = F.binary_cross_entropy_with_logits(gates, moves, reduction="none").sum(dim=3)
        loss = (error + entropy / self.axes) * exists[..., 0]
        return loss.sum(dim=(1, 2)) / exists.sum(dim=(1, 2, 3)).clamp(min=1)
