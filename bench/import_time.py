"""How long `import rnnkernels` takes on top of torch: a fresh interpreter each time, the median and the least of them, in ms."""

import statistics
import subprocess
import sys

PROGRAM = "import time, torch; start = time.perf_counter(); import rnnkernels; print((time.perf_counter() - start) * 1e3)"

if __name__ == "__main__":
    times = [float(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout) for _ in range(9)]
    print(f"import rnnkernels, torch being there: {statistics.median(times):.1f} ms (least {min(times):.1f})")
