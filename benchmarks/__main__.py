"""Run all benchmarks, each in its own process, then write docs/BENCHMARKS.md: `make bench`.

python -m benchmarks [NAME ...]
"""

import subprocess
import sys
import time

from benchmarks import report

if __name__ == "__main__":
    for name in sys.argv[1:] or report.ORDER:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=report.ROOT, check=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    report.main()
