"""What the library's loop takes from a DataLoader: its gestures and its batch size, or it refuses.

Why: the loop indexes a tensor and draws its own order, so of a loader only two things count. A
sampler that the loop ignored would train on the validation half of a split, in silence.

    python -m pytest tests/test_loaders.py
"""

import numpy as np
import pytest
import torch
from conftest import L, make_gestures
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trainlib.errors import UserError
from trainlib.loaders import all_sequences, batch_size_of

X_0 = make_gestures(10)
ROWS = list(X_0)
NAMED = [{"x": x} for x in ROWS]


class Stream(IterableDataset):
    """Gestures one after the other; their number is not known."""

    def __iter__(self):
        return iter(ROWS)


class Endless(Dataset):
    """Gestures by number; how many is not known."""

    def __getitem__(self, i):
        return ROWS[i % 10]


class Halves(BatchSampler):
    """Batches of the first half alone."""

    def __iter__(self):
        return iter([[0, 1], [2, 3, 4]])


LOADERS = {
    # name: (loader, the rows that it visits, its batch size)
    "a list": (DataLoader(ROWS, 4), range(10), 4),
    "shuffled": (DataLoader(ROWS, 3, shuffle=True), range(10), 3),
    "the last batch dropped": (DataLoader(ROWS, 4, drop_last=True), range(10), 4),
    "arrays": (DataLoader(list(X_0.numpy()), 4), range(10), 4),
    "press but for rounding": (DataLoader(list(X_0 * (1 - 5e-7)), 4), range(10), 4),
    "below zero by rounding": (DataLoader(list(X_0.where(X_0 > 0, -1e-7)), 4), range(10), 4),
    "float64": (DataLoader(list(X_0.double()), 4), range(10), 4),
    "tensors in tuples": (DataLoader(TensorDataset(X_0), 4), range(10), 4),
    "a subset": (DataLoader(Subset(ROWS, [7, 2, 5]), 2), [7, 2, 5], 2),
    "a subset of a subset": (DataLoader(Subset(Subset(ROWS, [7, 2, 5]), [2, 0]), 2), [5, 7], 2),
    "two data sets": (DataLoader(ConcatDataset([ROWS[:3], ROWS[8:]]), 2), [0, 1, 2, 8, 9], 2),
    "rows drawn from a subset": (
        DataLoader(ROWS, 2, sampler=SubsetRandomSampler([8, 1, 4])), [1, 4, 8], 2,
    ),
    "rows as an array": (
        DataLoader(ROWS, 2, sampler=SubsetRandomSampler(np.array([8, 1]))), [1, 8], 2,
    ),
    "a sampler of fewer": (DataLoader(ROWS, 2, sampler=SequentialSampler(range(6))), range(6), 2),
    "random ones of fewer": (DataLoader(ROWS, 2, sampler=RandomSampler(range(6))), range(6), 2),
    "its own collate_fn": (
        DataLoader(NAMED, 2, collate_fn=lambda items: torch.stack([i["x"] for i in items])),
        range(10),
        2,
    ),
    "a batch sampler": (
        DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 5, False)), range(10), 5,
    ),
    "a batch sampler of a subset": (
        DataLoader(ROWS, batch_sampler=BatchSampler(SubsetRandomSampler(range(6)), 2, False)),
        range(6), 2,
    ),
    "a batch sampler in order": (
        DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 3, True)),
        range(10), 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_the_gestures_are_those_that_an_epoch_visits(name):
    loader, rows, batch_size = LOADERS[name]
    x_0 = all_sequences(loader)
    assert x_0.dtype == torch.float32
    torch.testing.assert_close(x_0, X_0[list(rows)], rtol=0, atol=1e-6)
    assert torch.equal(x_0[..., 2], X_0[list(rows)][..., 2])
    assert batch_size_of(loader) == batch_size


REFUSED = {
    "drawn with replacement": DataLoader(ROWS, 2, sampler=RandomSampler(ROWS, replacement=True)),
    "some of them drawn": DataLoader(ROWS, 2, sampler=RandomSampler(ROWS, num_samples=4)),
    "drawn by weight": DataLoader(ROWS, 2, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "a list of rows": DataLoader(ROWS, 2, sampler=[0, 1, 2]),
    "a list of batches": DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3]]),
    "its own batch sampler": DataLoader(ROWS, batch_sampler=Halves(RandomSampler(ROWS), 2, False)),
    "a stream": DataLoader(Stream(), 2),
    "labels beside them": DataLoader(TensorDataset(X_0, torch.zeros(10)), 2),
    "no gesture": DataLoader([], 2),
    "two lengths": DataLoader([X_0[0], X_0[1, :5]], 2),
    "pixels": DataLoader(list(X_0 * 1920), 2),
    "model units": DataLoader(list(2 * X_0 - 1), 2),
    "integers": DataLoader(list(X_0.int()), 2),
    "switches": DataLoader(list(X_0 > 0), 2),
    "complex": DataLoader(list(X_0 + 0j), 2),
    "a pressure": DataLoader(list(X_0 * torch.tensor([1, 1, 254 / 255])), 2),
    "a set without a length": DataLoader(Endless(), 2),
    "the set itself": ROWS,
    "a tensor": X_0,
    "None": None,
    "NaN": DataLoader(list(X_0 * float("nan")), 2),
    "two channels": DataLoader(list(X_0[..., :2]), 2),
    "flat": DataLoader(list(X_0.reshape(-1, 3)), 2),
    "text": DataLoader(["a", "b"], 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_open_which_they_are_is_refused(name):
    with pytest.raises(UserError, match="loader") as error:
        all_sequences(REFUSED[name])
    assert "\n" not in str(error.value)


def test_a_loader_without_a_batch_size_is_refused():
    with pytest.raises(UserError, match="batch size"):
        batch_size_of(DataLoader(ROWS, batch_size=None))


def test_the_gestures_are_those_of_the_length_asked_for():
    assert all_sequences(DataLoader(list(make_gestures(3, 2 * L)), 2)).shape == (3, 2 * L, 3)
