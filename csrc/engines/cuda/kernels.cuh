// A cell's kernels, instantiated in a file of its own (made from cells.def by CMake), and the table by which engine.cu finds them.
#pragma once

#include <cuda_runtime.h>

#include "cells/list.h"
#include "engines/cuda/engine.h"
#include "engines/cuda/persistent.h"

namespace rnnkernels::cuda {

// What a thread knows of the machine, on the machine itself.
struct DeviceCta {
  RNN_FN int block() const {
#ifdef __CUDA_ARCH__
    return int(blockIdx.x);
#else
    return 0;
#endif
  }
  RNN_FN int thread() const {
#ifdef __CUDA_ARCH__
    return int(threadIdx.x);
#else
    return 0;
#endif
  }
  RNN_FN char* shared() const {
#ifdef __CUDA_ARCH__
    extern __shared__ __align__(16) char memory[];
    return memory;
#else
    return nullptr;
#endif
  }
  RNN_FN void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
  RNN_FN uint64_t load(const uint64_t* from) const {
    uint64_t word = 0;
#ifdef __CUDA_ARCH__
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from));
#endif
    return word;
  }
  RNN_FN void store(uint64_t* to, uint64_t word) const {
#ifdef __CUDA_ARCH__
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word));
#endif
  }
  // A look takes a trip to L2, more than half a microsecond, so a peer is given up after some ten seconds: an error, not a hang.
  RNN_FN void waiting(uint32_t tries) const {
#ifdef __CUDA_ARCH__
    if (tries == 1u << 24) __trap();
#endif
  }
};

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ PersistentForward r) {
  DeviceCta cta;
  persistent_forward<Cell, S>(cta, r);
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ PersistentBackward r) {
  DeviceCta cta;
  persistent_backward<Cell, S>(cta, r);
}

// The page of one stage over the rows of one step, a thread a unit; sums as a library's product left them.
template <class Cell, int stage, class V, class S>
__global__ void __launch_bounds__(kThreads) forward_step_kernel(const __grid_constant__ ForwardStep step, int64_t rows, const S* sums) {
  constexpr int columns = InfoOf<Cell>::value.hidden_slots(stage), vectors = InfoOf<Cell>::value.vectors;
  const int64_t width = stage_width<Cell, stage>(step.hidden, step.output), i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * width) return;
  const int64_t row = i / width, unit = i % width;
  V w[vectors ? vectors : 1];
  load_vectors<Cell, V, S>(step.vectors, unit, 1, w);
  typename V::element sum[columns ? columns : 1];
  RNN_UNROLL
  for (int c = 0; c < columns; ++c) sum[c] = sums ? widen(sums[(row * columns + c) * width + unit]) : 0;
  forward_units<Cell, stage, V, S>(step, w, row, unit, 1, sum, 1);
}

template <class Cell, int stage, class V, class S>
__global__ void __launch_bounds__(kThreads)
    backward_step_kernel(const __grid_constant__ BackwardStep step, int64_t rows, int64_t summed_rows, const S* sums) {
  constexpr int vectors = InfoOf<Cell>::value.vectors;
  const int64_t width = stage_width<Cell, stage>(step.hidden, step.output), i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * width) return;
  const int64_t row = i / width, unit = i % width;
  V w[vectors ? vectors : 1];
  load_vectors<Cell, V, S>(step.vectors, unit, 1, w);
  const typename V::element sum = row < summed_rows ? widen(sums[row * width + unit]) : 0;
  backward_units<Cell, stage, V, S>(step, w, row, unit, 1, &sum);
}

// ---- launches

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw CudaError(what, cudaGetErrorString(error));
}

template <class Argument>
void launch_together(void (*kernel)(Argument), const Argument& argument, void* stream) {
  const Tiling& t = argument.tiling;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(t.shared_bytes)),
        "shared memory of a persistent kernel");
  check(cudaMemsetAsync(argument.packets, 0, size_t(t.packet_count) * sizeof(uint64_t), static_cast<cudaStream_t>(stream)), "packets");
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(t.unit_ctas * t.row_tiles)), dim3(kThreads),
                                    arguments, size_t(t.shared_bytes), static_cast<cudaStream_t>(stream)),
        "launch of a persistent kernel");
}

template <class Cell, class S>
void launch_forward(const PersistentForward& r, void* stream) {
  launch_together(forward_kernel<Cell, S>, r, stream);
}
template <class Cell, class S>
void launch_backward(const PersistentBackward& r, void* stream) {
  launch_together(backward_kernel<Cell, S>, r, stream);
}

inline unsigned blocks_of(int64_t threads) { return unsigned(ceil_div(threads, kThreads)); }

template <class Cell, int stage, class V, class S>
void launch_forward_step(const ForwardStep& step, int64_t rows, const void* sums, void* stream) {
  const int64_t threads = rows * stage_width<Cell, stage>(step.hidden, step.output);
  if (threads == 0) return;
  forward_step_kernel<Cell, stage, V, S>
      <<<blocks_of(threads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(step, rows, static_cast<const S*>(sums));
  check(cudaGetLastError(), "launch of a step");
}
template <class Cell, int stage, class V, class S>
void launch_backward_step(const BackwardStep& step, int64_t rows, int64_t summed_rows, const void* sums, void* stream) {
  const int64_t threads = rows * stage_width<Cell, stage>(step.hidden, step.output);
  if (threads == 0) return;
  backward_step_kernel<Cell, stage, V, S>
      <<<blocks_of(threads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(step, rows, summed_rows, static_cast<const S*>(sums));
  check(cudaGetLastError(), "launch of a step");
}

template <class Cell, class V, class S>
constexpr StepKernels step_kernels() {
  constexpr int stages = InfoOf<Cell>::value.stages;
  StepKernels k{};
  k.forward[0] = launch_forward_step<Cell, 0, V, S>;
  k.backward[0] = launch_backward_step<Cell, 0, V, S>;
  if constexpr (stages > 1) k.forward[1] = launch_forward_step<Cell, 1, V, S>, k.backward[1] = launch_backward_step<Cell, 1, V, S>;
  if constexpr (stages > 2) k.forward[2] = launch_forward_step<Cell, 2, V, S>, k.backward[2] = launch_backward_step<Cell, 2, V, S>;
  return k;
}

template <class Cell>
constexpr CellKernels cell_kernels() {
  return {{launch_forward<Cell, float>, nullptr, launch_forward<Cell, bf16>, launch_forward<Cell, f16>},
          {launch_backward<Cell, float>, nullptr, launch_backward<Cell, bf16>, launch_backward<Cell, f16>},
          {step_kernels<Cell, scalar::F32, float>(), step_kernels<Cell, scalar::F64, double>(), step_kernels<Cell, scalar::F32, bf16>(),
           step_kernels<Cell, scalar::F32, f16>()}};
}

}  // namespace rnnkernels::cuda
