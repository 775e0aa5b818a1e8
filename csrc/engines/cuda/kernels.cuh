// A cell's kernels, instantiated in a file of its own (made from cells.def by CMake), and the table by which engine.cu finds them.
#pragma once

#include <cuda_runtime.h>

#include "cells/list.h"
#include "engines/cuda/engine.h"
#include "engines/cuda/persistent.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RNN_HAS_CLUSTERS 1
#else
#define RNN_HAS_CLUSTERS 0
#endif

namespace rnnkernels::cuda {

// A packet as the halves of a register of 128 bits.
struct Two {
  uint64_t low, high;
  Two() = default;
  RNN_FN explicit Two(const Packet& p) : low(uint64_t(p.word[1]) << 32 | p.word[0]), high(uint64_t(p.epoch) << 32 | p.word[2]) {}
  RNN_FN Packet packet() const { return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high)}, uint32_t(high >> 32)}; }
};

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
  RNN_FN void sync_cluster() const {
#if RNN_HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
  }

  // Device memory that blocks of the grid exchange packets through. That a .b128 is one access is more than PTX's memory model says, which
  // ends at 64 bits; libcu++ relies on it for atomics of 16 bytes, and bench/floors.cu looks.
  RNN_FN Packet load([[maybe_unused]] const Packet* from) const {
    Two x{};
#ifdef __CUDA_ARCH__
    asm volatile("{\n.reg .b128 x;\nld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}" : "=l"(x.low), "=l"(x.high) : "l"(from));
#endif
    return x.packet();
  }
  RNN_FN void store([[maybe_unused]] Packet* to, const Packet& packet) const {
    [[maybe_unused]] const Two x(packet);
#ifdef __CUDA_ARCH__
    asm volatile("{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], x;\n}" ::"l"(to), "l"(x.low), "l"(x.high));
#endif
  }
  // Shared memory that blocks of a cluster exchange packets through: each reads its own and writes everybody's.
  RNN_FN Packet load_near([[maybe_unused]] const Packet* from) const {
    Two x{};
#if RNN_HAS_CLUSTERS
    asm volatile("{\n.reg .b128 x;\nld.relaxed.cluster.shared::cta.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}"
                 : "=l"(x.low), "=l"(x.high)
                 : "r"(unsigned(__cvta_generic_to_shared(from))));
#elif defined(__CUDA_ARCH__)
    asm volatile("{\n.reg .b128 x;\nld.relaxed.cta.shared.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}"
                 : "=l"(x.low), "=l"(x.high)
                 : "r"(unsigned(__cvta_generic_to_shared(from))));
#endif
    return x.packet();
  }
  RNN_FN void store_near([[maybe_unused]] int peer, [[maybe_unused]] Packet* to, const Packet& packet) const {
    [[maybe_unused]] const Two x(packet);
#if RNN_HAS_CLUSTERS
    asm volatile(
        "{\n.reg .b128 x;\n.reg .u32 there;\nmov.b128 x, {%2, %3};\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "st.relaxed.cluster.shared::cluster.b128 [there], x;\n}" ::"r"(unsigned(__cvta_generic_to_shared(to))),
        "r"(peer), "l"(x.low), "l"(x.high));
#elif defined(__CUDA_ARCH__)
    asm volatile(
        "{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.cta.shared.b128 [%0], x;\n}" ::"r"(unsigned(__cvta_generic_to_shared(to))),
        "l"(x.low), "l"(x.high));
#endif
  }

  template <Fragment kind>
  RNN_FN void mma([[maybe_unused]] float (&d)[4], [[maybe_unused]] const uint32_t (&a)[4], [[maybe_unused]] const uint32_t* b) const {
#ifdef __CUDA_ARCH__
#define RNN_MMA(shape, type)                                                  \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, " \
               "%2, %3};"                                                     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (kind == Fragment::Bf16)
      RNN_MMA("m16n8k16", "bf16");
    else if constexpr (kind == Fragment::F16)
      RNN_MMA("m16n8k16", "f16");
    else
      RNN_MMA("m16n8k8", "tf32");
#undef RNN_MMA
#endif
  }

  // A look takes a trip to L2, more than half a microsecond, or some tens of nanoseconds in a cluster, so a peer is given up after ten
  // seconds, or a half: an error, not a hang.
  RNN_FN void waiting(uint32_t tries) const {
#ifdef __CUDA_ARCH__
    if (tries == 1u << 24) __trap();
#endif
  }
};

template <class Cell, class S, class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ PersistentForward r) {
  DeviceCta cta;
  persistent_forward<Cell, S, Arithmetic>(cta, r);
}

template <class Cell, class S, class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ PersistentBackward r) {
  DeviceCta cta;
  persistent_backward<Cell, S, Arithmetic>(cta, r);
}

// A unit's part of the sums over its row, which a library adds up.
template <int count, class V>
RNN_FN void put_sums(const V* e, double* to) {
  RNN_UNROLL
  for (int j = 0; j < count; ++j) {
    const double x = e[j].v;
    to[2 * j] = x;
    to[2 * j + 1] = x * x;
  }
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
  constexpr int count = InfoOf<Cell>::value.stage[stage].sums;
  V e[count ? count : 1];
  forward_units<Cell, stage, V, S>(step, w, row, unit, 1, sum, 1, e);
  if constexpr (count > 0) put_sums<count>(e, step.partial + row * step.partial_row + unit * 2 * count);
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
  constexpr int count = InfoOf<Cell>::value.stage[stage].back_sums;
  V e[count ? count : 1];
  backward_units<Cell, stage, V, S>(step, w, row, unit, 1, &sum, e);
  if constexpr (count > 0) put_sums<count>(e, step.partial + row * step.partial_row + unit * 2 * count);
}

// ---- launches

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // said here, not again at the next launch
  throw CudaError(what, cudaGetErrorString(error));
}

// How a tiling is launched: shared memory, and blocks that are on the chip together where they wait for each other.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(const Tiling& t, void* stream) {
    config.gridDim = dim3(unsigned(t.blocks()));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(t.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    if (t.exchange == Exchange::Grid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    } else if (t.exchange == Exchange::Near && t.unit_ctas > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(t.unit_ctas), 1, 1};
      config.numAttrs = 1;
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

// All that the device gives: the limit is the kernel's, not the launch's, and threads launch the same kernel with different sizes.
inline void allow_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of a persistent kernel");
}

template <class Argument>
void launch_together(void (*kernel)(Argument), const Argument& argument, void* stream) {
  const Tiling& t = argument.tiling;
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  for (int i = 0; i < t.sequences && t.packet_count; ++i)
    check(cudaMemsetAsync(argument.workspace[i], 0, size_t(t.packet_count) * kPacketBytes, static_cast<cudaStream_t>(stream)), "packets");
  const Launch launch(t, stream);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), arguments), "launch of a persistent kernel");
}

// How many blocks of the tiling the device holds at once, as the driver sees it.
inline int residents(const void* kernel, const Tiling& t, int multiprocessors) {
  allow_shared_memory(kernel);
  const Launch launch(t, nullptr);
  int n = 0;
  if (t.exchange == Exchange::Near && t.unit_ctas > 1) {
    if (cudaOccupancyMaxActiveClusters(&n, kernel, &launch.config) == cudaSuccess) return n * t.unit_ctas;
    cudaGetLastError();
    return 0;  // a cluster of this size the device has not
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, kThreads, launch.config.dynamicSmemBytes),
        "blocks of a persistent kernel");
  return n * multiprocessors;
}

template <class Cell, class S, class Arithmetic>
constexpr PersistentKernels persistent_kernels() {
  return {[](const PersistentForward& r, void* stream) { launch_together(forward_kernel<Cell, S, Arithmetic>, r, stream); },
          [](const PersistentBackward& r, void* stream) { launch_together(backward_kernel<Cell, S, Arithmetic>, r, stream); },
          [](bool backward, const Tiling& t, int multiprocessors) {
            return residents(backward ? reinterpret_cast<const void*>(backward_kernel<Cell, S, Arithmetic>)
                                      : reinterpret_cast<const void*>(forward_kernel<Cell, S, Arithmetic>),
                             t, multiprocessors);
          }};
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
  if constexpr (stages > 3) k.forward[3] = launch_forward_step<Cell, 3, V, S>, k.backward[3] = launch_backward_step<Cell, 3, V, S>;
  return k;
}

// As cells.def has it.
enum class Heat { COLD, WARM, HOT };

template <Heat heat, class Cell>
constexpr CellKernels cell_kernels() {
  CellKernels k{};
  if constexpr (heat != Heat::COLD) {
    static_assert(
        InfoOf<Cell>::value.given_slots() == 0 && InfoOf<Cell>::value.writer == 0 && InfoOf<Cell>::value.moments() == 0,
        "the persistent engine has no given slots, no sums over a row, and its first stage writes all states but one: make it COLD");
    k.persistent[int(Storage::F32)] = k.tf32 = persistent_kernels<Cell, float, Exact>();
    k.persistent[int(Storage::BF16)] = persistent_kernels<Cell, bf16, Tensor<Fragment::Bf16>>();
    k.persistent[int(Storage::F16)] = persistent_kernels<Cell, f16, Tensor<Fragment::F16>>();
    if constexpr (InfoOf<Cell>::value.has_matrix()) k.tf32 = persistent_kernels<Cell, float, Tensor<Fragment::Tf32>>();
  }
  k.step[int(Storage::F32)] = step_kernels<Cell, scalar::F32, float>();
  k.step[int(Storage::F64)] = step_kernels<Cell, scalar::F64, double>();
  k.step[int(Storage::BF16)] = step_kernels<Cell, scalar::F32, bf16>();
  k.step[int(Storage::F16)] = step_kernels<Cell, scalar::F32, f16>();
  return k;
}

}  // namespace rnnkernels::cuda
