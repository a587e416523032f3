"""The data set, the units of the model and of the files, and the augmentation of a batch.

Why: the model sees [-1, 1] and everything else [0, 1]; a map that is off by a little shifts every
sample. An augmentation that draws one image too often teaches gestures that nobody makes. Files are
in test_gesture_files, loaders in test_loaders, the gate before a run in test_data_gate.

    python -m pytest tests/test_dataset.py
"""

import numpy as np
import pytest
import torch
from conftest import L, make_gestures, press
from torch.utils.data import DataLoader

from augmentation.click_aug import generate_augmented_dataset
from train_diffusion_ddim import (
    DiffusionActionDataset,
    augment,
    to_data_units,
    to_gesture,
    to_model_units,
)

stats = pytest.importorskip("scipy.stats")


def test_items_are_the_gestures_in_the_order_of_the_files(tmp_path):
    x_0 = make_gestures(7)
    for name, part in {"b": x_0[3:], "a": x_0[:3]}.items():
        np.save(tmp_path / f"{name}_actions.npy", part.numpy().reshape(-1, 3))
    dataset = DiffusionActionDataset(str(tmp_path), seq_len=L)
    assert len(dataset) == 7 and dataset.sequences.dtype == np.float32
    assert torch.equal(dataset[5], x_0[5]) and torch.equal(torch.stack(list(dataset)), x_0)
    assert torch.equal(torch.cat(list(DataLoader(dataset, 3))), x_0)


def test_what_the_generator_writes_is_what_is_read(tmp_path):
    generate_augmented_dataset(tmp_path, 13, 5, 50, action_type="mixed", sequences_per_file=5)
    x_0 = DiffusionActionDataset(tmp_path).sequences
    written = [np.load(path) for path in sorted(tmp_path.glob("*_actions.npy"))]
    assert x_0.shape == (13, 250, 3) and len(written) == 3
    np.testing.assert_array_equal(x_0.reshape(-1, 3), np.concatenate(written))


def test_units_are_each_others_inverse():
    x = torch.linspace(0, 1, 101)
    assert to_model_units(x).min() == -1 and to_model_units(x).max() == 1
    assert to_model_units(torch.tensor(0.5)) == 0 and to_data_units(torch.tensor(0.0)) == 0.5
    torch.testing.assert_close(to_data_units(to_model_units(x)), x)


def test_to_gesture_gives_the_file_format():
    x = torch.tensor([[[-0.2, 1.3, 0.6], [0.4, 0.5, 0.5], [0.1, 0.2, 0.9]]])
    expected = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.2, 1.0]]])
    assert torch.equal(to_gesture(x), expected)
    gestures = make_gestures(5)
    assert torch.equal(to_gesture(gestures), gestures)


def images_of(gesture):
    """The 16 mirrored, turned and reversed copies of the touched frames, (n, 2) each."""
    xy = gesture[gesture[:, 2] == 1][:, :2].double().numpy()
    copies = []
    for i in range(16):
        x, y = xy.T
        x, y = 1 - x if i & 1 else x, 1 - y if i & 2 else y
        copy = np.stack([y, x] if i & 4 else [x, y], axis=1)
        copies.append(copy[::-1] if i & 8 else copy)
    return np.stack(copies)


def test_augment_draws_the_sixteen_images_anywhere_they_fit():
    torch.manual_seed(0)
    gesture = press(L, (4, 9))
    gesture[0, 4:10, :2] = torch.rand(6, 2)
    x = augment(gesture.expand(4800, L, 3))
    images, counts, onsets = images_of(gesture[0]), np.zeros(16), np.zeros(L - 6 + 1)
    for row in x.numpy():
        touched = np.flatnonzero(row[:, 2])
        assert len(touched) == 6 == touched[-1] - touched[0] + 1
        assert not row[row[:, 2] == 0].any()
        distance = np.abs(images - row[touched, :2]).max(axis=(1, 2))
        assert distance.min() < 1e-6
        counts[distance.argmin()] += 1
        onsets[touched[0]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(onsets).pvalue > 1e-3


def test_augment_keeps_what_has_no_room_and_several_touches():
    torch.manual_seed(0)
    idle, held = torch.zeros(50, L, 3), press(L, (0, L - 1)).expand(50, L, 3)
    assert not augment(idle).any()
    assert (augment(held)[..., 2] == 1).all()
    gaps = set()
    for row in augment(press(L, (2, 4), (9, 10)).expand(50, L, 3))[..., 2].tolist():
        touched = [i for i, p in enumerate(row) if p]
        gaps.add(tuple(i - touched[0] for i in touched))
    assert gaps == {(0, 1, 2, 7, 8), (0, 1, 6, 7, 8)}  # as it was, and reversed


def test_augment_draws_each_gesture_by_itself_and_does_not_write_into_it():
    torch.manual_seed(0)
    x_0 = make_gestures(64)
    before = x_0.clone()
    x = augment(x_0)
    assert torch.equal(x_0, before) and x.dtype == x_0.dtype and x.shape == x_0.shape
    assert torch.equal(x[..., 2].sum(dim=1), x_0[..., 2].sum(dim=1))
    assert 0 <= x.min() and x.max() <= 1 and not torch.equal(x, x_0)
