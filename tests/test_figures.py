"""The plan's two figures draw what they are given.

Why: a figure of the wrong gesture looks as good as the right one, so the drawn numbers are read
back.

    python -m pytest tests/test_figures.py
"""

import numpy as np
import torch
from conftest import L, make_gestures

from trainlib.figures import visualize_action_sequences, visualize_noise_comparison


def test_figures_take_what_the_plan_gives_them():
    x, y, z = (make_gestures(3, seed=i).numpy() for i in range(3))
    figure = visualize_action_sequences(x, y, z, title_prefix="Epoch 0", max_samples=2)
    assert len(figure.axes) == 6 and "Epoch 0" in figure.axes[0].get_title()
    np.testing.assert_allclose(figure.axes[2].lines[1].get_ydata(), y[0, :, 1])
    assert len(visualize_action_sequences(x[:1], y[:1], z[:1], "").axes) == 3
    tensors = (torch.from_numpy(a) for a in (x, y, z))
    mask = np.zeros((3, L), bool)
    mask[:, 4] = True
    assert len(visualize_action_sequences(*tensors, known_mask=mask).axes) == 9
    heat = visualize_noise_comparison(x, y, z, title_prefix="Epoch 0", max_samples=2)
    images = [image for ax in heat.axes for image in ax.images]
    np.testing.assert_allclose(images[1].get_array(), np.abs(y[0] - x[0]).T.clip(1e-3))
    rmse = np.sqrt(np.mean((y[0] - x[0]) ** 2))
    assert f"{rmse:.3f}" in heat.axes[1].get_title()
