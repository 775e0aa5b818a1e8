#!/bin/bash
# On a machine with a GPU and its own torch, nvcc, cmake, ninja, pybind11, pytest and pytest-xdist, and nothing to download: build, test, check memory and races,
# measure. Results go to $OUT (build/gpu without it). Parts, each on its own: bench/gpu.sh build tests sanitizer floors bench
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu}
mkdir -p "$out" build
python=${PYTHON:-python3}
parts=${*:-build tests sanitizer floors bench}
status=0
note() { echo "== $1"; }

for part in $parts; do
  note "$part"
  case $part in
    build)
      cmake -S . -B build/gpu-build -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DRNNKERNELS_CUDA=1 \
        "-DRNNKERNELS_CUDA_ARCHS=90a-real" --log-level=WARNING &&
        cmake --build build/gpu-build --target _C &&
        cmake --install build/gpu-build --component python --prefix . > /dev/null &&
        "$python" -m rnnkernels info || exit 1
      ;;
    tests) "$python" -m pytest -q -n 8 -p no:cacheprovider -m gpu tests/test_cuda.py 2>&1 | tee "$out/tests.log" | tail -30 || status=1 ;;
    sanitizer)
      for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --kernel-regex kns=rnnkernels --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_cuda.py \
          -k 'odd and float32 and (lstm or gru)' > "$out/$tool.log" 2>&1 || status=1
        tail -3 "$out/$tool.log"
      done
      ;;
    floors)
      nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a bench/floors.cu -o build/floors && build/floors | tee "$out/floors.json" || status=1
      ;;
    bench)
      "$python" -m bench.gpu --out "$out/gpu.json" 2>&1 | tee "$out/bench.log" || status=1
      "$python" -m bench.gpu --bidirectional --hidden 128 512 --batch 1 16 --out "$out/bidirectional.json" 2>&1 | tee -a "$out/bench.log" || status=1
      ;;
    *) echo "no such part: $part" && exit 2 ;;
  esac
done
exit $status
