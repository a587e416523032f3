"""The polynomials that contacts are drawn with: orthogonal on every number of points.

python -m pytest tests/test_legendre.py
"""

import numpy as np
import pytest

from trainlib.legendre import legendre_table


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 40])
def test_legendre_table_is_the_orthogonal_basis_of_n_points(n):
    """Against Gram-Schmidt (QR) of the monomials at the same points, whose signs are free."""
    middles = (2 * np.arange(n) + 1) / n - 1
    degrees = min(n, 8)
    q, r = np.linalg.qr(np.vander(middles, degrees, increasing=True))
    expected = q * np.sign(np.diag(r)) * n**0.5
    table = legendre_table(40, 8)
    np.testing.assert_allclose(table[n, :n, :degrees], expected, atol=2e-5)
    assert not table[n, :, n:].any() and not table[n, n:].any() and not table[0].any()
