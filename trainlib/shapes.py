"""What the contacts of a training set have in common: the shapes that their motions are made of."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainlib.contacts import FloatArray, contacts_of
from trainlib.legendre import legendre_table

SEEN = 10_000  # gestures that are looked at, about
MISSED = 1e-4  # of the screen, a tenth of a pixel
SMOOTH = 1e-6  # share of the motion that is taken to be polynomials, each a tenth of the one before


def missed_by(table: Tensor, contacts: list[FloatArray]) -> FloatArray:
    """Return what shapes leave of each axis of contacts, RMS, (contacts, 2).

    Args:
        table: as of `shapes_of`, or `legendre_table`.
        contacts: places, (n, 2) each.
    """
    missed, shapes = np.zeros((len(contacts), 2)), table.double().numpy()
    for row, xy in zip(missed, contacts, strict=True):
        basis = shapes[len(xy), : len(xy)]
        rest = xy - basis @ (basis.T @ xy) / len(xy)
        row[:] = np.sqrt((rest**2).mean(axis=0))
    return missed


def shapes_of(x_0: npt.NDArray[np.floating], num: int, reversible: bool = False) -> Tensor:
    """Return the principal shapes of the motions of contacts, on n points for every n.

    A motion is x or y over the time of its contact, less its mean. The first shape is constant, the
    others are principal components of motions over the root of their RMS, so that neither swipes
    alone nor the drift of taps decides. Where there are fewer motions than shapes, polynomials of
    low degree follow.

    Args:
        x_0: gestures, (N, L, 3), data units.
        num: of shapes.
        reversible: whether a motion is as likely as the same backwards.

    Returns:
        (L + 1, L, num): row n has them at the middles of n equal parts of the contact, of mean
        square 1 and orthogonal; from the n-th on there is none: 0. Likewise `legendre_table`.
    """
    L = x_0.shape[1]
    s = _middles(L)
    motions = [np.zeros(L)]
    for contact in contacts_of(x_0[:: max(1, len(x_0) // SEEN)]):
        for y in (contact.xy - contact.xy.mean(axis=0)).T:
            y = np.interp(s, _middles(len(y)), y)
            motions.append(y / np.sqrt(np.sqrt((y**2).mean()) + MISSED))
    together = np.stack(motions).T @ np.stack(motions)
    if reversible:
        together = together + together[::-1, ::-1]
    polynomials = np.polynomial.legendre.legvander(s, num - 1)[:, 1:]
    smooth = polynomials * 10.0 ** (-np.arange(num - 1) / 2)
    together += SMOOTH * max(np.trace(together), 1.0) / L * smooth @ smooth.T
    principal = np.linalg.eigh(together)[1][:, :-num:-1]
    shapes = np.concatenate([np.ones((L, 1)), principal], axis=1)
    table = np.zeros((L + 1, L, num))
    for n in range(1, L + 1):
        on_n = np.stack([np.interp(_middles(n), s, shape) for shape in shapes.T], axis=1)
        q, r = np.linalg.qr(on_n[:, :n])
        table[n, :n, :n] = q * np.sign(np.diag(r)) * np.sqrt(n)
    return torch.from_numpy(table).float()


def learn_shapes(model: Any, x_0: npt.NDArray[np.floating], reversible: bool) -> None:
    """Give a denoiser whose curves are made of shapes those of gestures; see `shapes_of`.

    Once: of a trained denoiser, or a student with its teacher's weights, they stay what they are.
    """
    options = getattr(model, "options", {})
    if options.get("contacts") and options.get("shapes"):
        table = model.output_projection.shapes
        untouched = legendre_table(table.shape[1], table.shape[2]).to(table)
        if torch.equal(table, untouched):
            table.copy_(shapes_of(x_0, options["shapes"], reversible))


def _middles(n: int) -> FloatArray:
    """Return the middles of n equal parts of [-1, 1]."""
    return (2 * np.arange(n) + 1 - n) / n
