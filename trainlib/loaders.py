"""What a torch DataLoader visits in an epoch, as one tensor: the loop needs no more of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from trainlib.errors import UserError
from trainlib.gesture_files import as_data_units


def all_sequences(loader: DataLoader) -> Tensor:
    """Return the gestures that a loader visits in an epoch, float32 (N, L, 3), in data set order.

    UserError for a sampler that leaves open which they are, or for batches that are not gestures.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(getattr(loader, "dataset", loader)).__name__
        raise UserError(f"a loader must be a DataLoader of a set with a length, got {what}")
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    kind = type(sampler).__name__
    if kind == "SubsetRandomSampler":
        rows: Any = sorted(int(i) for i in sampler.indices)
    elif kind == "SequentialSampler" or (kind == "RandomSampler" and _is_whole(sampler)):
        rows = range(_length_of(sampler.data_source))
    else:
        raise UserError(f"a loader with a {kind} is not supported; use torch.utils.data.Subset")
    items = [loader.dataset[i] for i in rows]
    try:
        batch = loader.collate_fn(items)
        x_0 = batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch
        fits = x_0.ndim == 3 and x_0.shape[2] == 3 and x_0.numel() and x_0.is_floating_point()
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise UserError("a loader must give gestures [B, L, 3], floats, all of one length")
    frames = x_0.detach().cpu().float().clone().reshape(-1, 3).numpy()
    return torch.from_numpy(as_data_units("a loader", frames)).reshape(x_0.shape)


def _length_of(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        kind = type(dataset).__name__
        raise UserError(f"the data set of a loader must have a length, got {kind}") from None


def _is_whole(sampler: Any) -> bool:
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def batch_size_of(loader: DataLoader) -> int:
    """Return the gestures per batch of a loader; UserError where it has no fixed number."""
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    if not isinstance(size, int):
        raise UserError("the loader of the training set must have a batch size")
    return size
