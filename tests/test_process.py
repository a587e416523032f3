"""The processes of a run: device, ranks, signals, progress bars, the lock of a run folder.

Why: two runs in one folder, a signal that is lost, or processes that draw alike spoil a run without
an error.

    python -m pytest tests/test_process.py
"""

import torch
import torch.nn.functional as F

from trainlib import process
from trainlib.process import own_rows


def test_processes_draw_their_dropout_apart(monkeypatch):
    drawn = []
    for rank, world in ((0, 2), (0, 2), (1, 2), (2, 3)):
        monkeypatch.setattr(process, "process_rank", lambda r=rank, w=world: (r, w))
        torch.manual_seed(7)
        assert own_rows() == slice(rank, None, world)
        drawn.append(F.dropout(torch.ones(60), 0.5))
    first, again, second, third = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(second, third)
