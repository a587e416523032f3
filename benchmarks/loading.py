"""Loading: a million gestures, time and peak memory

    python -m benchmarks.loading [--sizes 10000 100000 1000000]

The gestures of the data set, repeated, in files of `--per_file` and in one file, read by the
trainer's own loader in a fresh process. Memory is the peak resident set of that process less what
it holds after its imports.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import train_diffusion_ddim as tdd
from benchmarks.measure import ROOT, Row, main, run_child
from trainlib.gestures import ACTION_DIM

LOAD = """
import json, resource, sys, time
import train_diffusion_ddim as tdd
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
data = tdd.DiffusionActionDataset(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps([len(data), data.sequences.nbytes, peak() - before, seconds]))
"""


def write_set(folder: Path, x_0: np.ndarray, num: int, per_file: int) -> None:
    """Write `num` gestures, x_0 repeated, as files of at most `per_file`, piece by piece."""
    folder.mkdir()
    for i, first in enumerate(range(0, num, per_file)):
        count = min(per_file, num - first)
        shape = (count * x_0.shape[1], ACTION_DIM)
        with (folder / f"batch_{i:06d}_actions.npy").open("wb") as f:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for start in range(0, count, len(x_0)):
                f.write(x_0[: min(len(x_0), count - start)].tobytes())


def load(folder: Path) -> Row:
    """Load a set in a fresh process."""
    answer = run_child("-c", LOAD, str(folder), stdout=subprocess.PIPE)
    num, size, peak, seconds = json.loads(answer)
    row = {"gestures": num, "GB": size / 1e9, "s": seconds, "GB/s": size / 1e9 / seconds}
    return row | {"peak memory / data": peak / size}


def measure(args: argparse.Namespace) -> list[Row]:
    """Return the table by number of gestures, whichever fit on the disk."""
    x_0 = tdd.DiffusionActionDataset(ROOT / args.data_dir).sequences
    rows: list[Row] = []
    left_out = []
    for num in args.sizes:
        for per_file in sorted({min(args.per_file, num), num}):
            with tempfile.TemporaryDirectory() as name:
                if shutil.disk_usage(name).free < 2 * num * x_0[0].nbytes:
                    left_out.append(str(num))
                    continue
                folder = Path(name) / "data"
                write_set(folder, x_0, num, per_file)
                rows.append({"files": len(list(folder.iterdir()))} | load(folder))
    note = f"Left out for want of disk: {', '.join(left_out)}." if left_out else ""
    return [{"title": "Loaded by DiffusionActionDataset", "rows": rows, "note": note}]


OPTIONS = {"sizes": [10000, 100000, 1000000], "per_file": 10000}
OPTIONS |= {"data_dir": "diffusion_test_data/train"}

if __name__ == "__main__":
    sys.exit(main("loading", __doc__ or "", measure, OPTIONS))
