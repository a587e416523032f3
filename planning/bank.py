"""Gestures drawn once and kept in a file, for those who draw more often than they have time for."""

from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_diffusion_ddim import to_gesture
from trainlib.errors import say
from trainlib.files import write_whole
from trainlib.gestures import SEQ_LEN


def kept_bank(path: Path, num: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return the `num` gestures that `path` holds, (num, L, 3) float32; draw and keep them if none.

    A file that holds anything else is replaced. If it cannot be written, a line says so.
    """
    with suppress(Exception):  # missing, or damaged: np.load raises errors of many kinds
        bank = torch.from_numpy(np.load(path, allow_pickle=False))
        fits = bank.shape == (num, SEQ_LEN, 3) and bank.dtype == torch.float32
        if fits and torch.equal(bank, to_gesture(bank)):
            return bank
    say(f"drawing {num} gestures, once")
    bank, content = to_gesture(draw(num)), BytesIO()
    np.save(content, bank.numpy())
    try:
        write_whole(path, content.getvalue())
    except OSError as e:
        say(f"warning: these gestures are not kept: {e}", err=True)
    return bank
