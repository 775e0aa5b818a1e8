"""How long `import rnnkernels` takes on top of torch: a fresh interpreter each time, the median and the least of them, in ms."""

import compileall
import importlib.util
import statistics
import subprocess
import sys

PROGRAM = "import time, torch; start = time.perf_counter(); import rnnkernels; print((time.perf_counter() - start) * 1e3)"

if __name__ == "__main__":
    # As pip leaves it: otherwise this would be the time to compile Python.
    spec = importlib.util.find_spec("rnnkernels")
    assert spec is not None
    assert spec.submodule_search_locations
    compileall.compile_dir(spec.submodule_search_locations[0], quiet=1)
    times = [float(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout) for _ in range(9)]
    print(f"import rnnkernels, torch being there: {statistics.median(times):.1f} ms (least {min(times):.1f})")
