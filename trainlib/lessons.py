"""What a trained denoiser teaches about curves: noise, and the curves that its steps make of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainlib.gestures import PRESSED
from trainlib.legendre import coefficients, curves_at, mean_over, split_contacts
from trainlib.tensors import draw_eps, in_batches

PER_GESTURE, IN_ALL = 32, 160_000  # lessons in curves, at most
AT_ONCE = 2048  # that are made


class CurveLessons(NamedTuple):
    """M noises for each of N gestures, and the coefficients that a teacher makes of them."""

    c_0: Tensor  # (N, M, 1, axes * degrees), model units
    eps: Tensor  # likewise, that leads from c_0 to the noise where the teacher began
    n: Tensor  # frames of the contact, (N, M, 1, 1); 0 = there is none

    def at(self, rows: Any) -> "CurveLessons":
        """Return the lessons of some gestures."""
        return CurveLessons(*(x[rows] for x in self))


def curve_lessons(
    teacher: Any, scheduler: Any, steps: int, made: Tensor, drawn: Any, seed: int
) -> tuple[Tensor, CurveLessons | None]:
    """Let the CurveDenoiser of a teacher, without tokens, make curves of noise.

    A contact lies where the noise looks like one, so that this noise, projected on its curve, is
    N(m, 1) and not N(0, 1). Less its mean m it is what curves are denoised from; so they can make
    as many lessons as a student needs, each in a thousandth of the time of a whole gesture.

    Args:
        teacher: the denoiser.
        scheduler: of the teacher.
        steps: that it takes.
        made: gestures that it made, (N, L, 3), data units.
        drawn: of this noise, `eps`, given what `known_mask` and `context` say.
        seed: of the noise of further lessons.

    Returns:
        The gestures, those that were made of noise alone with curves that are made of it like this;
        and lessons in more such noise, for contacts as long as theirs. The gestures as they are,
        and None, where curves depend on more: on goals, or on other contacts in the window.
    """
    head: Any = getattr(teacher, "output_projection", None)
    if getattr(head, "max_contacts", 0) != 1 or drawn.context is not None:
        return made, None
    x_T, split = drawn.eps, split_contacts(made[..., -1] > PRESSED, head.shapes, 1)
    member, basis = (x.to(x_T.dtype) for x in split)
    n = member.sum(dim=1)[..., None]  # (N, 1, 1)
    free = ~drawn.known_mask.any(dim=1) & (n[:, 0, 0] > 0)
    if not free.any():
        return made, None
    z = coefficients(mean_over(member), basis, x_T[..., :-1]) * n.sqrt()
    mean = z[free].mean(dim=0)
    (start_t, _), *_ = scheduler.timestep_pairs(steps)

    def make(z: Tensor, n: Tensor) -> Tensor:
        def denoise(c_t: Tensor, t: Tensor) -> Tensor:
            level = head.log_snr[t, None, None]
            return head.curves(c_t, None, level, n, head.certain)[0]

        c_T, start = z / n.sqrt(), (tuple(z.shape), z.device, steps)
        return 2 * scheduler.sample(denoise, *start, sampler="dpmpp", x_T=c_T) - 1

    c = in_batches(make, z[free] - mean, n[free], batch_size=AT_ONCE)
    xy = (curves_at(c, member[free], basis[free]) + 1) / 2
    pressed = made[free][..., -1:]
    curved = torch.cat([xy.clamp(0, 1) * pressed, pressed], dim=-1)

    M = max(1, min(PER_GESTURE, IN_ALL // len(made)))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(int(free.sum()), (len(made) * M,), generator=generator)
    n = n[free][rows]
    z = draw_eps((*n.shape[:2], z.shape[2]), z.device, generator).to(z)
    c_0 = in_batches(make, z, n, batch_size=AT_ONCE)
    eps = scheduler.eps_from_x_0(c_0, (z + mean) / n.sqrt(), start_t) * n.sqrt()
    lessons = CurveLessons(*(x.unflatten(0, (-1, M)) for x in (c_0, eps, n)))
    return made.index_put((free,), curved), lessons
