"""Roofline: what the machine could do, what a step asks for, the fraction reached

    python -m benchmarks.roofline [--rounds 5] [--threads 2]

Peaks are measured: the best of several matrix products, and a copy far larger than the caches.
FLOPs are counted operator by operator (torch.utils.flop_counter, attention by its formula), bytes
as all inputs and outputs of all operators, as if nothing stayed in a cache.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, default_model, in_turn, main
from benchmarks.training import PLAN_NETWORK, our_state, our_step
from trainlib.gestures import SEQ_LEN

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (16000, 64, 256), (1600, 64, 256))


class ByteCounter(TorchDispatchMode):
    """Add up the bytes of every operator's tensor inputs and outputs; views move none."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it touched."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.total += sum(t.numel() * t.element_size() for t in flat if torch.is_tensor(t))
        return out


def attention_flops(function: Callable[[], Any]) -> float:
    """Count the products of the attention kernels that torch's counter does not know on a CPU."""
    total = 0.0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal total
            name = func.name()
            if "flash_attention_for_cpu" in name:
                q, k = (args[1], args[2]) if "backward" in name else (args[0], args[1])
                products = 5 if "backward" in name else 2  # q·k once more, then four gradients
                total += products * 2 * q.numel() * k.shape[-2]
            return func(*args, **(kwargs or {}))

    with Counter():
        function()
    return total


def peaks(rounds: int, copy_mb: int) -> Row:
    """Return the machine's GEMM peaks in GFLOP/s and its copy bandwidth in GB/s."""
    found: Row = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for m, k, n in SHAPES:
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            seconds = min(in_turn({"": partial(torch.mm, a, b)}, rounds)[""])
            rates.append(2e-9 * m * k * n / seconds)
        found[f"{str(dtype).removeprefix('torch.')} GEMM, GFLOP/s"] = max(rates)
    source, target = torch.ones(copy_mb * 2**18), torch.empty(copy_mb * 2**18)
    seconds = min(in_turn({"": lambda: target.copy_(source)}, rounds)[""])
    found["copy, GB/s"] = 2e-9 * source.numel() * 4 / seconds
    return found


def work(function: Callable[[], Any]) -> tuple[float, float]:
    """Return the FLOPs and bytes of one call."""
    with FlopCounterMode(display=False) as flops:
        function()
    with ByteCounter() as counter:
        function()
    return flops.get_total_flops() + attention_flops(function), counter.total


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the peaks, and a row per program against them."""
    machine = peaks(args.rounds, args.copy_mb)
    gemm, copy = machine["float32 GEMM, GFLOP/s"] * 1e9, machine["copy, GB/s"] * 1e9
    x_train = torch.rand(64, SEQ_LEN, 3).round(decimals=1)
    model, _ = default_model()
    x_t, t = torch.randn(1, SEQ_LEN, 3), torch.tensor([500])
    programs: dict[str, Callable[[], Any]] = {
        "step, default recipe": our_step(our_state(x_train), x_train),
        "step, plan's network": our_step(
            our_state(x_train, **PLAN_NETWORK, batch_size=64), x_train
        ),
        "forward, batch 1": torch.no_grad()(lambda: model(x_t, t)),
    }
    rows = []
    for name, function in programs.items():
        flops, moved = work(function)
        seconds = sorted(in_turn({"": function}, args.rounds)[""])[args.rounds // 2]
        row = {"": name, "GFLOP": flops / 1e9, "MB": moved / 1e6, "ms": seconds * 1e3}
        row |= {"ms at GEMM peak": flops / gemm * 1e3, "ms at copy speed": moved / copy * 1e3}
        rows.append(row | {"fraction of GEMM peak": flops / gemm / seconds})
    note = "Bytes are an upper bound: most of what a step touches stays in the caches."
    return [
        {"title": "The machine", "rows": [machine]},
        {"title": "The program, float32", "rows": rows, "note": note},
    ]


OPTIONS = {"rounds": 5, "threads": 2, "copy_mb": 512}

if __name__ == "__main__":
    sys.exit(main("roofline", __doc__ or "", measure, OPTIONS))
