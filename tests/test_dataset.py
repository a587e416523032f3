"""The data set that a run trains on: what the files hold, its units, and its symmetric copies.

Why: everything else is computed from these gestures, in two units that are easily confused. What is
read from files, and what is refused, is tested in test_gesture_files.py.

    python -m pytest tests/test_dataset.py
"""

import numpy as np
import torch
from conftest import L, make_gestures, press
from scipy import stats
from torch.utils.data import DataLoader

from augmentation.click_aug import generate_augmented_dataset
from train_diffusion_ddim import (
    DiffusionActionDataset,
    all_sequences,
    augment,
    to_data_units,
    to_gesture,
    to_model_units,
)
from trainlib.gesture_files import action_files


def test_items_and_loaders(tmp_path):
    x_0 = make_gestures(4)
    np.save(tmp_path / "x_actions.npy", x_0.reshape(-1, 3))
    dataset = DiffusionActionDataset(str(tmp_path), seq_len=L)
    assert len(dataset) == 4 and dataset[2].dtype == torch.float32
    assert torch.equal(dataset[2], x_0[2])
    assert torch.equal(torch.cat(list(DataLoader(dataset, 3))), x_0)
    shuffled = DataLoader(dataset, 3, shuffle=True, drop_last=True)
    assert torch.equal(all_sequences(shuffled), x_0)
    assert torch.equal(all_sequences(DataLoader(list(x_0), 3)), x_0)  # any data set


def test_what_the_generator_writes_is_what_is_read(tmp_path):
    generate_augmented_dataset(tmp_path, 13, 5, 50, action_type="mixed", sequences_per_file=5)
    dataset, files = DiffusionActionDataset(tmp_path), action_files(tmp_path)
    assert dataset.sequences.shape == (13, 250, 3) and len(files) == 3
    flat = np.concatenate([np.load(p) for p in files])
    np.testing.assert_array_equal(dataset.sequences.reshape(-1, 3), flat)
    assert set(np.unique(dataset.sequences[..., 2])) == {0, 1}


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


def test_symmetries_are_the_sixteen_images_anywhere_they_fit():
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


def test_symmetries_keep_what_has_no_room_and_several_touches():
    torch.manual_seed(0)
    idle, held = torch.zeros(50, L, 3), press(L, (0, L - 1)).expand(50, L, 3)
    assert not augment(idle).any()
    assert (augment(held)[..., 2] == 1).all()
    gaps = set()
    for row in augment(press(L, (2, 4), (9, 10)).expand(50, L, 3))[..., 2].tolist():
        touched = [i for i, p in enumerate(row) if p]
        gaps.add(tuple(i - touched[0] for i in touched))
    assert gaps == {(0, 1, 2, 7, 8), (0, 1, 6, 7, 8)}  # as it was, and reversed


def test_symmetries_draw_each_gesture_by_itself_and_do_not_write_into_it():
    torch.manual_seed(0)
    x_0 = make_gestures(64)
    before = x_0.clone()
    x = augment(x_0)
    assert torch.equal(x_0, before) and x.dtype == x_0.dtype and x.shape == x_0.shape
    assert torch.equal(x[..., 2].sum(dim=1), x_0[..., 2].sum(dim=1))
    assert 0 <= x.min() and x.max() <= 1 and not torch.equal(x, x_0)
